"""`checkpoints repair`: every kind of damage, mended or set aside, once; killed at every call that changes the disk."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, python, trainer
from stable_baselines3 import DQN, PPO

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror
from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, save_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.journal import RunJournal, read_record
from sb3_mlflow_ckpt.layout import RunFolder, metadata_path
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.repair import LEFT_ALONE, Repair, repair_runs
from sb3_mlflow_ckpt.runs.curve import read_curve
from sb3_mlflow_ckpt.runs.folder import FolderRuns

TINY = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An off-policy run with several checkpoints and their chunks."""
    checkpoints = tmp_path_factory.mktemp("trained") / "checkpoints"
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, buffer_size=500, seed=0, **TINY)
    model.learn(150, callback=EpisodeCheckpointCallback(2, 4, checkpoints, agent_id="a", run_id="r"))
    assert len(list_checkpoints(checkpoints)) == 4
    return checkpoints


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(trained, tmp_path / "checkpoints")
    return RunFolder(tmp_path / "checkpoints", "a", "r")


def repair(folder: RunFolder, **options: object) -> list[Repair]:
    done = [*repair_runs([folder], **options)]  # type: ignore[arg-type]
    again = [*repair_runs([folder], **options)]  # type: ignore[arg-type]
    assert [item for item in again if item.mended] == []
    return done


def content(folder: RunFolder) -> dict[str, bytes]:
    return {str(p.relative_to(folder.path)): p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


def checkpoints(folder: RunFolder) -> list[Path]:
    return list_checkpoints(folder.checkpoint_dir)


def test_a_whole_folder_is_left_as_it_is(folder: RunFolder) -> None:
    before = content(folder)
    assert repair(folder) == []
    assert content(folder) == before


def test_temporaries_and_torn_lines_are_mended_and_a_dry_run_changes_nothing(folder: RunFolder) -> None:
    points = read_curve(folder)
    (folder.path / ".tmp-1-ab-ep000099.zip").write_bytes(b"half")
    (folder.replay / ".tmp-1-cd-x.zst").write_bytes(b"half")
    for path in (folder.metrics, folder.events):
        with path.open("ab") as file:
            file.write(b'{"event": "sav')
    before = content(folder)
    planned = [*repair_runs([folder], dry_run=True)]
    assert content(folder) == before
    done = repair(folder)
    assert [item.defect for item in done] == [item.defect for item in planned]
    assert len(done) == 4
    assert read_curve(folder) == points


def test_a_zip_whose_metadata_was_never_written_is_taken_up(folder: RunFolder) -> None:
    newest = checkpoints(folder)[-1]
    before = json.loads(metadata_path(newest).read_text())
    metadata_path(newest).unlink()
    assert len(checkpoints(folder)) == 3
    (done,) = repair(folder)
    assert "taken up" in done.action
    assert len(verify_checkpoint(newest).files) > 1
    assert json.loads(metadata_path(newest).read_text()) == before


def test_a_zip_that_a_crash_cut_is_set_aside_and_never_deleted(folder: RunFolder) -> None:
    newest = checkpoints(folder)[-1]
    half = newest.read_bytes()[:-100]
    metadata_path(newest).unlink()
    newest.write_bytes(half)
    repair(folder)
    assert (folder.set_aside / newest.name).read_bytes() == half
    assert not newest.exists()
    assert len(checkpoints(folder)) == 3


@pytest.mark.parametrize("damage", ["metadata", "zip", "no zip", "no chunk", "chunk"])
def test_what_is_damaged_and_has_no_copy_is_no_longer_listed(folder: RunFolder, damage: str) -> None:
    newest = checkpoints(folder)[-1]
    chunk = folder.path / verify_checkpoint(newest).files[-1].name
    if damage == "metadata":
        metadata_path(newest).write_text("{")
    elif damage == "zip":
        newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    elif damage == "no zip":
        newest.unlink()
    elif damage == "no chunk":
        chunk.unlink()
    else:
        chunk.write_bytes(b"x" * chunk.stat().st_size)
    done = repair(folder)
    assert done
    for path in checkpoints(folder):
        verify_checkpoint(path)
    if damage == "metadata":
        assert newest in checkpoints(folder)
    else:
        assert newest not in checkpoints(folder)
        assert (folder.set_aside / metadata_path(newest).name).exists()
    states = {item["episode"]: item["on_disk"] for item in FolderRuns(folder.checkpoint_dir).get("r")["checkpoint_paths"]}
    assert sum(states.values()) == len(checkpoints(folder))


def test_a_replacement_that_a_crash_cut_is_settled(folder: RunFolder) -> None:
    newest = checkpoints(folder)[-1]
    document = json.loads(metadata_path(newest).read_text())
    metadata_path(newest).write_text(json.dumps({**document, "replacement": document}))
    (done,) = repair(folder)
    assert done.action == "settled"
    assert json.loads(metadata_path(newest).read_text()) == document


@pytest.mark.parametrize("damage", ["missing", "torn", "zeros"])
def test_a_record_that_was_lost_is_rebuilt(folder: RunFolder, damage: str) -> None:
    before = read_record(folder)
    if damage == "missing":
        folder.record.unlink()
    else:
        folder.record.write_bytes(folder.record.read_bytes()[:100] if damage == "torn" else b"\0" * 500)
    repair(folder)
    after = read_record(folder)
    for key in ("run_id", "agent_id", "algo", "env_id", "config", "status", "root_run_id", "parent"):
        assert after[key] == before[key], key
    assert after["progress"]["num_timesteps"] == before["progress"]["num_timesteps"]
    assert after["started_at"] <= after["ended_at"]
    # It can be trained in and shown again.
    RunJournal(folder).close()
    assert len(FolderRuns(folder.checkpoint_dir).get("r")["checkpoint_paths"]) >= 4


def test_checkpoints_of_a_script_without_a_run_get_no_record(tmp_path: Path) -> None:
    save_checkpoint(PPO("MlpPolicy", "CartPole-v1", **TINY), tmp_path, agent_id="a", run_id="r", episode=1)
    assert repair(RunFolder(tmp_path, "a", "r")) == []


def test_a_ledger_that_lost_its_lines_is_made_to_agree_in_the_order_of_the_commits(folder: RunFolder) -> None:
    lines = folder.events.read_text().splitlines(keepends=True)
    folder.events.write_text("".join(lines[-1:]))
    repair(folder)
    journal = RunJournal(folder)
    assert journal.ledger.pruned.isdisjoint({int(p.stem[2:]) for p in checkpoints(folder)})
    record = journal.record
    journal.close()
    live = LiveRun(folder, record, (), RunOptions(), fresh=False)
    live._prune()
    live.finish("completed")
    assert [p.name for p in checkpoints(folder)] == sorted(p.name for p in folder.path.glob("ep*.zip"))[-3:]


def test_chunks_of_what_was_set_aside_stay_and_others_that_nobody_needs_go(folder: RunFolder) -> None:
    newest = checkpoints(folder)[-1]
    newest.write_bytes(b"x")
    (folder.chunk("000000000900-000000000901-0123abcd.zst")).write_bytes(b"orphan")
    needed = [folder.path / entry["name"] for entry in json.loads(metadata_path(newest).read_text())["files"][1:]]
    done = repair(folder)
    assert any("no checkpoint needs" in item.defect for item in done)
    assert all(path.exists() for path in needed)


def test_a_run_that_trains_is_left_alone(folder: RunFolder) -> None:
    journal = RunJournal(folder)
    metadata_path(checkpoints(folder)[-1]).write_text("{")
    before = content(folder)
    [told] = repair_runs([folder])
    assert (told.folder, told.action, told.mended) == (folder.path, LEFT_ALONE, True)
    assert content(folder) == before
    journal.close()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> Path:
    checkpoints = tmp_path_factory.mktemp("tracked") / "checkpoints"
    model = DQN("MlpPolicy", "CartPole-v1", learning_starts=10, buffer_size=500, seed=0, **TINY)
    callback = EpisodeCheckpointCallback(4, 3, checkpoints, agent_id="a", mirrors=[MLflowMirror(mlflow_uri)])
    model.learn(150, callback=callback)
    assert callback.behind == []
    return checkpoints


@pytest.mark.parametrize("damage", ["zip", "no zip", "chunk"])
def test_what_is_damaged_is_fetched_from_mlflow(tracked: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(tracked, tmp_path / "checkpoints")
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    folder = RunFolder.at(newest.parent)
    before = content(folder)
    chunk = folder.path / verify_checkpoint(newest).files[-1].name
    (newest if damage != "chunk" else chunk).write_bytes(b"x")
    if damage == "no zip":
        newest.unlink()
    done = repair(folder)
    assert [item.mended for item in done] == [True] * len(done)
    assert "fetched from runs:/" in done[0].action
    assert before.items() <= content(folder).items()


def test_what_has_a_copy_is_left_where_it_is_while_mlflow_does_not_answer(tracked: Path, tmp_path: Path) -> None:
    shutil.copytree(tracked, tmp_path / "checkpoints")
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(b"x")
    words = ("checkpoints", "repair", "--tracking-uri", "http://127.0.0.1:9", "--json")
    done = python("-m", "sb3_mlflow_ckpt", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (item,) = json.loads(done.stdout)
    assert not item["mended"]
    assert "does not answer" in item["action"]
    assert newest.read_bytes() == b"x"


# Repairs a folder that has every kind of damage; dies before the N-th call that changes the disk.
_REPAIRER = """
import os, signal, sys
from pathlib import Path
calls, last = 0, int(sys.argv[1])
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.repair import repair_runs
for name in ("replace", "rename", "fsync", "unlink", "mkdir"):
    setattr(os, name, dying(getattr(os, name)))
assert all(item.mended for item in repair_runs([RunFolder(Path("checkpoints"), "a", "r")]))
print(calls)
"""


def test_a_repair_that_is_killed_anywhere_loses_nothing_and_the_next_one_ends_it(folder: RunFolder, tmp_path: Path) -> None:
    one, two, three, four = checkpoints(folder)
    metadata_path(one).unlink()
    two.write_bytes(b"x")
    metadata_path(three).write_text("{")
    folder.record.write_bytes(b"{")
    (folder.path / ".tmp-1-ab-ep000099.zip").write_bytes(b"half")

    def run(cwd: Path, last: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _REPAIRER, str(last)],
            cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    whole = tmp_path / "whole"
    shutil.copytree(folder.checkpoint_dir, whole / "checkpoints")
    calls = int(run(whole, 0).stdout)
    assert calls > 20
    for last in range(random.randint(1, 5), calls + 1, 6):
        cwd = tmp_path / str(last)
        shutil.copytree(folder.checkpoint_dir, cwd / "checkpoints")
        assert run(cwd, last).returncode == -signal.SIGKILL
        here = RunFolder(cwd / "checkpoints", "a", "r")
        newest = latest_checkpoint(cwd / "checkpoints")
        assert newest is not None
        assert newest.name == four.name
        repair(here)
        assert [path.name for path in checkpoints(here)] == [one.name, three.name, four.name]
        for path in checkpoints(here):
            verify_checkpoint(path)
        assert (here.set_aside / two.name).read_bytes() == b"x"
        assert read_record(here)["run_id"] == "r"


def test_a_repaired_run_is_resumed(folder: RunFolder) -> None:
    folder.record.write_bytes(b"")
    checkpoints(folder)[-1].write_bytes(b"")
    repair(folder)
    done = trainer(
        *("--resume-from-checkpoint", "latest", "--agent-id", "a", "--mlflow", "false", "--total-timesteps", 200),
        *("--env-id", "CartPole-v1"),
        cwd=folder.checkpoint_dir.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
