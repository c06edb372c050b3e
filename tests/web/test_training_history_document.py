"""docs/training-history.md: its commands, its requests, its snippet and its tables are tried, and nothing is left out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import pytest
from click.testing import CliRunner
from processes import ROOT, environment, script
from stable_baselines3 import PPO
from toy_environments import FixedLength
from web_server import ServeCommand, ServedApp, ask

from sb3_mlflow_ckpt import EpisodeCheckpointCallback
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.cli.runs import runs_group
from sb3_mlflow_ckpt.cli.serve import serve_command
from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.web.settings import WebSettings

DOCUMENT = (ROOT / "docs" / "training-history.md").read_text()
RUN, OTHER = "550e8400e29b41d4a716446655440000", "7c9e6679742540de944be07fc1f90ae7"
_BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for found, text in _BLOCKS if found == kind]


def commands(name: str) -> list[list[str]]:
    lines = [shlex.split(line) for text in blocks("bash") for line in text.splitlines()]
    assert all(words[0] == "sb3-mlflow-ckpt" for words in lines)
    return [words[2:] for words in lines if words[1] == name]


def rows(heading: str) -> dict[str, str]:
    """Return the second cell of each row of the table below a heading, by the first cell's code."""
    part = re.split(r"^## ", DOCUMENT.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    found = re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", part, re.MULTILINE)
    assert found
    return dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the runs of the document were trained."""
    place = tmp_path_factory.mktemp("document")
    for run_id, name in ((RUN, "night on cartpole"), (OTHER, None)):
        config = {"algo": "ppo", "env_id": "CartPole-v1", "seed": len(run_id)}
        callback = EpisodeCheckpointCallback(50, 3, place / "checkpoints", run_id=run_id, run_name=name, config=config)
        PPO("MlpPolicy", FixedLength(), n_steps=100, batch_size=100, n_epochs=1).learn(300, callback=callback)
    return place


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[ServedApp]:
    app = ServedApp(FolderRuns(folder / "checkpoints"), WebSettings(checkpoint_dir=folder / "checkpoints"))
    yield app
    app.close()


def requests() -> list[str]:
    lines = [line.split(" ", 1) for text in blocks("http") for line in text.splitlines()]
    assert {method for method, _ in lines} == {"GET"}
    return [target for _, target in lines]


@pytest.mark.parametrize("target", requests())
def test_a_documented_request_is_answered(served: ServedApp, target: str) -> None:
    answer = served.ask(target)
    assert answer.status == 200, answer.body
    if target.endswith("/download"):
        assert answer.body.startswith(b"PK")
        return
    found: Any = answer.json
    if "?status=" in target:
        assert found["items"] == []
    elif "?q=" in target:
        assert [run["run_id"] for run in found["items"]] == [RUN]
    elif target.endswith("/50"):
        assert found["verification"]["state"] == "verified"


def test_every_route_is_in_the_table_and_has_an_example() -> None:
    described = set(json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]) | {"/api/openapi.json"}
    assert set(rows("The REST API")) == described
    shown = {re.sub(r"550e[0-9a-f-]+", "{run_id}", urlsplit(target).path) for target in requests()}
    assert {re.sub(r"/50\b", "/{episode}", path) for path in shown} == described


def test_every_parameter_of_an_example_is_described() -> None:
    paths = json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"]
    names = {parameter["name"] for path in paths.values() for parameter in path["get"].get("parameters", ())}
    used = {pair.partition("=")[0] for target in requests() for pair in urlsplit(target).query.split("&") if pair}
    assert used and used <= names


def test_the_snippet_prints_the_checkpoints(served: ServedApp, tmp_path: Path) -> None:
    [snippet] = blocks("python")
    assert "http://localhost:8000/api/training-runs/" in snippet
    done = script(snippet.replace("localhost:8000", f"localhost:{served.port}"), tmp_path, environment())
    assert done.returncode == 0, done.stderr
    items = served.ask(f"/api/training-runs/{RUN}").json["checkpoint_paths"]
    assert items and done.stdout == "".join(f"Episode {item['episode']}: {item['path']}\n" for item in items)


def test_the_flags_of_serve_are_those_of_the_table() -> None:
    table = rows("Start it")
    flags = {p.opts[0]: p for p in serve_command.params if isinstance(p, click.Option)}
    assert set(table) == set(flags)
    for name, option in flags.items():
        default = option.to_info_dict()["default"]
        assert table[name] == ("unset" if default in (None, "", (), []) or default is False else f"`{default}`"), name


@pytest.mark.parametrize("words", commands("serve"), ids=" ".join)
def test_a_documented_server_takes_its_flags(words: list[str]) -> None:
    serve_command.make_context("serve", list(words))


def test_the_documented_server_behind_a_proxy_starts_and_answers_under_its_path(folder: Path) -> None:
    [words] = [words for words in commands("serve") if "--root-path" in words]
    command = ServeCommand(folder, *words, "--port", 0, "--ui-port", 0)
    try:
        for port in command.ports():
            answer = ask(port, "/history/api/training-runs", host="gpu.example")
            assert (answer.status, answer.json["total"]) == (200, 2)
            assert ask(port, "/history/api/training-runs", host="evil.example").status == 421
    finally:
        command.stop()


@pytest.mark.parametrize("words", commands("runs"), ids=" ".join)
def test_a_documented_command_on_runs_succeeds(folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    opened: list[str] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(click, "launch", opened.append)
    done = CliRunner().invoke(main, ["runs", *words])
    assert done.exit_code == 0, done.output
    assert RUN in done.stdout or "550e8400" in done.stdout or "--status" in words
    assert opened == ([f"http://localhost:5173/training/{RUN}"] if words[0] == "open" else [])


def test_every_command_on_runs_that_looks_is_shown() -> None:
    assert {words[0] for words in commands("runs")} == set(runs_group.commands) - {"reap"}
    assert "sb3-mlflow-ckpt runs reap" in DOCUMENT


def test_every_status_is_explained() -> None:
    assert tuple(rows("What a status means")) == STATUSES


def test_the_pages_that_are_named_are_served(served: ServedApp) -> None:
    assert re.findall(r"^- \*\*`(/[^`]*)`\*\*", DOCUMENT, re.MULTILINE) == [
        "/training", "/training/<run id>", "/training/compare?run=<id>&run=<id>", "/api"
    ]  # fmt: skip
    for target in ("/training", f"/training/{RUN}", f"/training/compare?run={RUN}&run={OTHER}", "/api"):
        answer = served.ask(target)
        assert answer.status == 200 and b"<html" in answer.body, target
