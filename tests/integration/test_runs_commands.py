"""`runs list|show|compare|open`: what a person sees of trainings at a terminal, and what a script reads of them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from processes import DEADLINE, environment
from stable_baselines3 import PPO
from toy_environments import FixedLength

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, load_checkpoint
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.cli.cells import age, short_ids, size, sparkline
from sb3_mlflow_ckpt.cli.runs import _SORTS, _STATUSES
from sb3_mlflow_ckpt.resume_commands import resume_command
from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.summaries import SORTS
from sb3_mlflow_ckpt.web.documents import run_document, run_list
from sb3_mlflow_ckpt.web.settings import WebSettings

FIRST, SECOND, BROKEN = (digit * 32 for digit in "abc")
FIRST = "abcd" + FIRST[4:]
_NAME = "A name that no column of a narrow terminal has room for: [bold]x[/] \x1b[2J and on and on"
_HYPERPARAMETERS: Any = {"n_steps": 20, "batch_size": 20, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, one that went on from it with other settings, and one that failed."""
    place = tmp_path_factory.mktemp("runs") / "checkpoints"

    def callback(run_id: str, **more: Any) -> EpisodeCheckpointCallback:
        config = {"algo": "ppo", "env_id": "toy_environments:FixedLength-v0", **more.pop("config", {})}
        return EpisodeCheckpointCallback(2, 1, place, run_id=run_id, config=config, **more)

    learning = {"learning_rate": 3e-4, "total_timesteps": 40}
    PPO("MlpPolicy", FixedLength(), **_HYPERPARAMETERS).learn(40, callback=callback(FIRST, config=learning))
    newest = FolderRuns(place).get(FIRST)["checkpoint_paths"][-1]
    model, _, _ = load_checkpoint(newest["path"], env=FixedLength())
    changes = {"learning_rate": {"from": 3e-4, "to": 1e-3}}
    again = callback(SECOND, run_name=_NAME, overrides=changes, config={**learning, "learning_rate": 1e-3, "seed": 7})
    model.learn(40, callback=again, reset_num_timesteps=False)
    with pytest.raises(RuntimeError), callback(BROKEN, agent_id="other") as last:
        PPO("MlpPolicy", FixedLength(fails_at=25), **_HYPERPARAMETERS).learn(40, callback=last)
    return place


def run(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["runs", *words, "--checkpoint-dir", str(folder)])


def told(folder: Path, *words: str) -> Any:
    done = run(folder, *words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def at_a_terminal(folder: Path, columns: int, *words: str) -> list[str]:
    """Return the lines that a command prints at a terminal of that width, without colours."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_mlflow_ckpt", "runs", *words, "--checkpoint-dir", str(folder)],
        stdin=there, stdout=there, stderr=there, env=environment(TERM="xterm", COLUMNS=str(columns)),
    )  # fmt: skip
    os.close(there)
    output = b""
    try:
        while part := os.read(here, 65536):
            output += part
    except OSError:  # Linux' way to say that nobody writes any more.
        pass
    os.close(here)
    assert process.wait(DEADLINE) == 0, output
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).splitlines()


def test_the_words_of_the_help_are_those_of_the_runs() -> None:
    assert (STATUSES, tuple(SORTS)) == (_STATUSES, _SORTS)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), [BROKEN, SECOND, FIRST]),
        (("--limit", "2"), [BROKEN, SECOND]),
        (("--status", "completed"), [SECOND, FIRST]),
        (("--status", "failed", "--status", "lost"), [BROKEN]),
        (("--status", "stalled"), []),
        (("--agent-id", "other"), [BROKEN]),
        (("--algo", "PPO", "--env", "toy_environments:FixedLength-v0", "--sort", "started_at"), [FIRST, SECOND, BROKEN]),
        (("--algo", "sac"), []),
        (("--search", "NARROW terminal"), [SECOND]),
        (("--sort", "-num_timesteps", "--limit", "1"), [SECOND]),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, tuple) else None,
)
def test_a_list_answers_a_question(folder: Path, words: tuple[str, ...], found: list[str]) -> None:
    assert [item["run_id"] for item in told(folder, "list", *words)] == found


def test_json_is_what_the_api_answers(folder: Path) -> None:
    from sb3_mlflow_ckpt.runs.summaries import RunQuery, select

    reader = FolderRuns(folder)
    page = run_list(select(reader.summaries(), RunQuery()), reader.glances([FIRST, SECOND, BROKEN]))
    assert told(folder, "list") == json.loads(json.dumps(page["items"]))
    detail = run_document(reader.get(SECOND), WebSettings(folder))
    assert told(folder, "show", SECOND) == json.loads(json.dumps(detail))
    assert told(folder, "compare", FIRST, SECOND)["differences"][0]["key"] == "learning_rate"


def test_nothing_is_cut_in_a_pipe(folder: Path) -> None:
    lines = run(folder, "list").stdout.splitlines()
    assert len(lines) == 4
    assert all(run_id in line for run_id, line in zip([BROKEN, SECOND, FIRST], lines[1:], strict=True))
    assert _NAME.replace("\x1b", "\\x1b") in lines[2]
    path = FolderRuns(folder).get(SECOND)["checkpoint_paths"][-1]["path"]
    assert path in lines[2]
    assert path in run(folder, "show", SECOND).stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_a_list_fits_the_terminal_and_keeps_what_is_read_off(folder: Path, columns: int) -> None:
    lines = at_a_terminal(folder, columns, "list")
    assert len(lines) == 4
    assert max(map(len, lines)) <= columns
    for run_id, status, line in zip("cba", ("failed", "completed", "completed"), lines[1:], strict=True):
        begin = "abcdaaaa" if run_id == "a" else run_id * 8
        assert line.startswith(f"{begin} {status}")
        assert "5.0" in line
    assert "A name that" in lines[2] and "…" in lines[2]
    assert re.search(r" 16 \(\d+ (s|min)\) .*\d (s|min)$", lines[2])


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_is_shown_with_its_kin_its_changes_and_a_command_that_can_be_copied(folder: Path, columns: int) -> None:
    lines = at_a_terminal(folder, columns, "show", SECOND)
    told = "\n".join(lines)
    [command] = [line for line in lines if line.startswith("Resume with: ")]
    record = FolderRuns(folder).get(SECOND)
    expected = resume_command(record, record["checkpoint_paths"][-1], program="trainer", source="path")
    assert command == f"Resume with: {expected}"
    assert max(len(line) for line in lines if line != command) <= columns
    assert re.search(r"learning_rate +0\.0003 +0\.001", told)
    assert re.search(rf"ancestor +{FIRST[:8]} ", told) and re.search(rf"this run +{SECOND[:8]} +8 ", told)
    assert re.search(r"ep0000\d\d\.zip ", told)
    assert "\\x1b[2J" in told and "\x1b" not in told
    broken = "\n".join(at_a_terminal(folder, columns, "show", "cccc"))
    assert "RuntimeError: the simulator broke" in broken and "Traceback (most recent call last)" in broken


def test_runs_are_compared_side_by_side(folder: Path) -> None:
    lines = at_a_terminal(folder, 100, "compare", FIRST[:6], "bbbb", BROKEN)
    assert lines[0].split() == [FIRST[:8], "b" * 8, "c" * 8]
    told = "\n".join(lines)
    assert re.search(r"status +completed +completed +failed", told)
    assert re.search(r"learning_rate +0\.0003 +0\.001 +not set", told)
    assert re.search(r"curve .*[▁-█]", told)
    assert max(map(len, lines)) <= 100
    for words in ((), (FIRST,), (FIRST, FIRST[:5])):
        done = run(folder, "compare", *words)
        assert done.exit_code == 2 and "Two to 8 different runs" in done.stderr


def test_an_id_may_be_shortened_while_it_means_one_run(folder: Path, tmp_path: Path) -> None:
    dashed = f"{FIRST[:8]}-{FIRST[8:12]}"
    for beginning in (FIRST[:4], FIRST[:9].upper(), dashed, FIRST):
        assert told(folder, "show", beginning)["run_id"] == FIRST
    for beginning in ("abc", "abce", "*", "", "a" * 40):
        done = run(folder, "show", beginning)
        assert done.exit_code == 1 and "Run not found" in done.stderr, beginning
    twins = tmp_path / "twins"
    for run_id in (FIRST, FIRST[:10] + "0" * 22):
        (twins / "agent" / run_id).mkdir(parents=True)
        record = {"run_id": run_id, "agent_id": "agent", "status": "completed", "name": f"of {run_id[-1]}\x1b"}
        (twins / "agent" / run_id / "run.json").write_text(json.dumps(record))
    done = run(twins, "show", FIRST[:10])
    assert done.exit_code == 2
    assert "is the beginning of 2 runs: " in done.stderr
    assert all(f"{run_id} (of {run_id[-1]}\\x1b, completed)" in done.stderr for run_id in (FIRST, FIRST[:10] + "0" * 22))


def test_a_run_is_opened_in_the_browser(folder: Path, tmp_path: Path) -> None:
    browser = tmp_path / "xdg-open"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/opened\n')
    browser.chmod(0o755)
    env = environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    unknown = "d" * 32
    addresses = {
        "bbbb": f"http://localhost:5173/training/{SECOND}", unknown: f"https://gpu.example/history/training/{unknown}"
    }  # fmt: skip
    for words in (["bbbb"], [unknown, "--url", "https://gpu.example/history/"]):
        done = subprocess.run(
            [sys.executable, "-m", "sb3_mlflow_ckpt", "runs", "open", *words, "--checkpoint-dir", str(folder)],
            env=env, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, f"{addresses[words[0]]}\n"), done.stderr
    assert (tmp_path / "opened").read_text().split() == list(addresses.values())
    done = run(folder, "open", "bbbb", "--url", "localhost:5173")
    assert done.exit_code == 2 and "is not an address" in done.stderr


def test_a_sparkline_shows_where_a_curve_rises() -> None:
    points = [(step, float(step)) for step in range(0, 80, 10)]
    assert sparkline(points, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(points, 8, ascii_only=True) == "_.-~=+*#"
    assert sparkline([(5, 1.0)], 4) == "▅   "
    # A part of a common scale; a gap holds the value before it; what is no number is nothing.
    assert sparkline([(40, 5.0), (70, 5.0)], 8, bounds=(0.0, 10.0), reach=(0, 80)) == "    ▅▅▅▅"
    assert sparkline([(0, float("nan"))], 4) == "" == sparkline([], 4)


def test_values_read_as_a_person_says_them() -> None:
    from datetime import datetime, timedelta, timezone

    now = datetime(2026, 1, 2, tzinfo=timezone.utc)
    spans = {3: "3 s", 90: "1 min", 7300: "2 h", 200_000: "2 d", -5: "0 s"}
    assert {s: age((now - timedelta(seconds=s)).isoformat(), now) for s in spans} == spans
    assert [age(None), age("yesterday"), age(5)] == ["-", "yesterday", "5"]
    assert [size(999), size(145_540), size(2.5e9), size(None), size("x")] == ["999 B", "145.5 kB", "2.5 GB", "-", "x"]
    ids = ["ab" * 16, "ab" * 8 + "cd" * 8, "my-run"]
    assert list(short_ids(ids).values()) == [ids[0][:17], ids[1][:17], "my-run"]
