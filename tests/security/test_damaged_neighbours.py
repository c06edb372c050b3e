"""One damaged run never hides the others: every walk over run folders comes through, and shows what is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import journals
import pytest
from click.testing import CliRunner
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import latest_checkpoint, list_checkpoints, prune_checkpoints, save_checkpoint
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.sync import sync_runs

Damage = Callable[[RunFolder], object]


def _instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: RunFolder) -> None:
        path = folder.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return damage


def _fields(file: str, /, **fields: Any) -> Damage:
    def damage(folder: RunFolder) -> None:
        path = folder.path / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def _line(name: str, text: bytes) -> Damage:
    def damage(folder: RunFolder) -> None:
        with (folder.path / name).open("ab") as file:
            file.write(text + b"\n")

    return damage


RECORD, EVENTS, METRICS, ZIP, METADATA = (
    "run.json", "checkpoints.jsonl", "metrics.jsonl", "ep000001.zip", "ep000001_metadata.json",
)  # fmt: skip
_SAVED = b'{"event": "saved", "episode": %s}'
DAMAGES: dict[str, Damage] = {
    **{f"{name} is a folder": _instead(name, Path.mkdir) for name in (RECORD, EVENTS, METRICS, ZIP, METADATA, ".lock")},
    **{f"{name} is a pipe": _instead(name, os.mkfifo) for name in (RECORD, EVENTS, METRICS, ZIP, METADATA)},
    **{f"{name} is a link to itself": _instead(name, lambda p: p.symlink_to(p)) for name in (RECORD, EVENTS, METRICS, ZIP, METADATA, "replay", ".lock")},
    **{f"{name} is a link to nothing": _instead(name, lambda p: p.symlink_to("gone")) for name in (RECORD, EVENTS, METRICS, ZIP, METADATA, "replay", ".lock")},
    **{f"{name} is empty": _instead(name, Path.touch) for name in (RECORD, EVENTS, METRICS, ZIP, METADATA)},
    **{f"{name} is nested deeply": _instead(name, lambda p: p.write_text("[" * 100_000 + "]" * 100_000)) for name in (RECORD, EVENTS, METADATA)},
    **{f"{name} is not text": _instead(name, lambda p: p.write_bytes(b"\xff\xfe\0" * 1000)) for name in (RECORD, EVENTS, METRICS, METADATA)},
    **{f"{name} is endless": _instead(name, lambda p: os.truncate(p, 1 << 34) if p.write_bytes(b"{") else None) for name in (RECORD, METADATA)},
    **{f"episode {value.decode()[:9]}": _line(EVENTS, _SAVED % value) for value in (b"-1", b"true", b"null", b'"1"', b"[]", b"1e5", b"9" * 30, b"9" * 5000, b"NaN")},
    "replay is a file": _instead("replay", lambda p: p.write_text("x")),
    "chunks that are none": _line(EVENTS, b'{"event": "saved", "episode": 1, "replay": [{}, 5, "../../x"]}'),
    "chunks are a number": _line(EVENTS, b'{"event": "saved", "episode": 1, "replay": 5}'),
    "a hash that is a list": _line(EVENTS, b'{"event": "saved", "episode": 1, "sha256": []}'),
    "an address that is none": _line(EVENTS, b'{"event": "mirrored", "episode": 1, "uri": {}}'),
    "a reward that is a text": _line(EVENTS, b'{"event": "saved", "episode": 1, "mean_reward": "x"}'),
    "a point that is none": _line(METRICS, b'{"num_timesteps": "x", "time": [], "ep_rew_mean": {}}'),
    "a record of other kinds": _fields(RECORD, status=[], progress=5, started_at={}, mirrors=7, mlflow=[], config="x"),
    "mirrors that are numbers": _fields(RECORD, mirrors=[1, None], mongo="x", attempt="x"),
    "a mirror without address": _fields(RECORD, mirrors=["MLflow", "MongoDB"], mlflow=3, mongo=[], config=[]),
    "another run's record": _fields(RECORD, run_id="another"),
    "half a surrogate": _fields(RECORD, name="\ud800", status="\udcff"),
    "an endless time": _fields(RECORD, heartbeat_at="9999-12-31T23:59:59+00:00", heartbeat_seconds=1e308),
    "metadata of another kind": _fields(METADATA, files=[{"name": "../../x", "bytes": 1, "sha256": "0" * 64}]),
    "a replacement that is none": _fields(METADATA, replacement=[1]),
    "a replacement of a replacement": _fields(METADATA, replacement={"replacement": {}}),
    "chunks outside": _fields(METADATA, files=[{"name": "x", "bytes": 1, "sha256": "0" * 64}, {"name": "replay/../../x", "bytes": 1, "sha256": "0" * 64}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PPO:
    return PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs={"net_arch": [4]})


def _run(checkpoint_dir: Path, run_id: str, model: PPO) -> RunFolder:
    journal = journals.start_run(checkpoint_dir, run_id)
    journals.add_point(journal, 10, ep_rew_mean=1.0)
    journal.close()
    save_checkpoint(model, checkpoint_dir, agent_id="ppo_agent", run_id=run_id, episode=1)
    save_checkpoint(model, checkpoint_dir, agent_id="ppo_agent", run_id=run_id, episode=2)
    (journal.folder.path / "replay").mkdir()
    return journal.folder


def test_every_walk_comes_through_whatever_lies_in_a_run_folder(tmp_path: Path, model: PPO) -> None:
    good = [_run(tmp_path, f"{name}-good", model) for name in ("a", "z")]
    bad = {}
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = _run(tmp_path, f"m{number:02d}", model)
        damage(folder)
        bad[folder.run_id] = name
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "ppo_agent" / "loop").symlink_to("loop")
    (tmp_path / "ppo_agent" / "a file").write_text("x")
    Path(os.fsdecode(bytes(tmp_path) + b"/ppo_agent/\xff\xfe")).mkdir()
    before = {path: path.read_bytes() for folder in good for path in sorted(folder.path.iterdir()) if path.is_file()}

    assert {folder.model(e) for folder in good for e in (1, 2)} <= set(list_checkpoints(tmp_path))
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    runs = FolderRuns(tmp_path)
    listed = {run["run_id"] for run in runs.list()}
    assert {folder.run_id for folder in good} <= listed
    for folder in good:
        assert len(runs.get(folder.run_id)["checkpoint_paths"]) == 2
        assert runs.curve(folder.run_id)
    for words in (
        ["checkpoints", "list"], ["checkpoints", "list", "--json"], ["checkpoints", "verify", "--json"],
        ["runs", "list"], ["runs", "list", "--json"],
        *(["runs", "show", run_id] for run_id in bad),
        ["checkpoints", "prune", "--keep-last-n", "1", "--dry-run"],
        ["checkpoints", "sync"],
    ):  # fmt: skip
        done = CliRunner().invoke(main, [*words, "--checkpoint-dir", str(tmp_path)])
        what = f"{words}: {bad.get(words[-1], '')}"
        assert done.exception is None or isinstance(done.exception, SystemExit), (what, repr(done.exception))
        assert all(line.isprintable() for line in done.output.split("\n")), what
        if "show" not in words:
            assert all(folder.run_id in done.output for folder in good), what
    synced = {result.folder.name for result in sync_runs(tmp_path) if result.error is None}
    assert {folder.run_id for folder in good} <= synced
    removed = prune_checkpoints(tmp_path, keep_last_n=1)
    assert {folder.model(1) for folder in good} <= set(removed)
    for path, content in before.items():
        assert "ep000001" in path.name or path.name == "checkpoints.jsonl" or path.read_bytes() == content
