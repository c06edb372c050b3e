"""A run folder that is removed, renamed or taken over in mid-run, and a clock that was wrong, under a real trainer."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from injector import library
from processes import DEADLINE, Leash, environment, start_trainer, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.errors import RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.curve import read_curve
from sb3_mlflow_ckpt.runs.folder import FolderRuns

# Episodes of five steps, a checkpoint every fifty steps.
_FLAGS = (
    *("--env-id", "toy_environments:FixedLength-v0", "--hyperparameters", "{n_steps: 64}", "--mlflow", "false"),
    *("--checkpoint-interval-episodes", 10, "--keep-last-n-checkpoints", 0, "--run-id", "run"),
    *("--heartbeat-seconds", 0.1, "--total-timesteps", 256),
)


class Training:
    """A trainer that takes the steps that a test allows."""

    def __init__(self, cwd: Path, *flags: object, env: Mapping[str, str] | None = None) -> None:
        self.leash = Leash(cwd, 60)
        self.folder = RunFolder(cwd / "checkpoints", "ppo_agent", "run")
        self.log = cwd / "trainer.log"
        self.process = start_trainer(*_FLAGS, "--env-wrappers", self.leash.wrapper, *flags, cwd=cwd, env=env)
        self.wait_for(lambda: self.committed == [10], "the first checkpoint")

    @property
    def committed(self) -> list[int]:
        return [int(path.stem[2:]) for path in list_checkpoints(self.folder.checkpoint_dir)]

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, what, self.process)

    def end(self) -> int:
        self.leash.release()
        return self.process.wait(DEADLINE)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    started = Training(tmp_path)
    yield started
    started.process.kill()


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_goes_in_mid_run_is_made_again(training: Training, tmp_path: Path, how: str) -> None:
    elsewhere = tmp_path / "elsewhere" / "ppo_agent" / "run"
    if how == "removed":
        # Held: it could put a file into a folder that is about to be empty.
        training.process.send_signal(signal.SIGSTOP)
        shutil.rmtree(training.folder.path)
        training.process.send_signal(signal.SIGCONT)
    else:
        elsewhere.parent.mkdir(parents=True)
        training.folder.path.rename(elsewhere)
    training.wait_for(training.folder.record.exists, "a record at the old place")
    assert trainer(*_FLAGS, cwd=tmp_path).returncode == 1, "the folder that was made again must be locked as well"
    assert training.end() == 0, training.log.read_text()

    log = training.log.read_text()
    assert log.count("was removed or renamed while its run trains") == 1
    assert "Traceback" not in log
    run = FolderRuns(training.folder.checkpoint_dir).get("run")
    assert run["status"] == "completed"
    # What was there is known and told to be gone; what came later is there.
    states = {entry["episode"]: entry["state"] for entry in run["checkpoint_paths"]}
    assert states.pop(10) == "pruned"
    assert set(states.values()) == {"local"}
    assert training.committed == sorted(states)
    for path in list_checkpoints(training.folder.checkpoint_dir):
        verify_checkpoint(path)
    if how == "renamed":
        assert [path.name for path in list_checkpoints(tmp_path / "elsewhere")] == ["ep000010.zip"]
        verify_checkpoint(elsewhere / "ep000010.zip")


def test_a_lock_that_somebody_removed_is_taken_again(training: Training, tmp_path: Path) -> None:
    training.folder.lock.unlink()
    training.wait_for(training.folder.lock.exists, "the lock")
    refused = trainer(*_FLAGS, cwd=tmp_path)
    assert refused.returncode == 1
    assert "Another training is writing to" in refused.stderr
    assert training.end() == 0
    assert training.committed == [10, 20, 30, 40, 50, 51]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_zombie_whose_folder_was_taken_over_stops_and_writes_nothing_more(tmp_path: Path, policy: str) -> None:
    training = Training(tmp_path, "--on-save-failure", policy)
    # A network file system forgot the lock: another process starts the run again.
    successor = _take(training)
    successor.start({**successor.record, "pid": "of the successor"})
    written = _contents(training.folder)
    assert training.end() == 1

    log = training.log.read_text()
    assert "another process has taken over this run folder" in log
    assert "Traceback" not in log
    assert _contents(training.folder) == written
    successor.close()


def test_a_later_attempt_fences_out_an_earlier_one_where_locks_do_nothing(tmp_path: Path) -> None:
    # A heartbeat that is being written would lie over the record of the later attempt, which writes it once only here.
    training = Training(tmp_path, "--heartbeat-seconds", 3600)
    record = json.loads(training.folder.record.read_bytes())
    fresh = training.folder.record.with_suffix(".new")
    fresh.write_text(json.dumps({**record, "attempt": record["attempt"] + 1}))
    fresh.replace(training.folder.record)
    written = _contents(training.folder)
    assert training.end() == 1
    assert "another process has taken over" in training.log.read_text()
    assert _contents(training.folder) == written


def test_the_newest_checkpoint_is_the_last_one_although_the_clock_was_put_back(tmp_path: Path) -> None:
    def train(run_id: str, target: int) -> tuple[str, int]:
        resuming = ("--resume-from-checkpoint", "auto", "--run-id", run_id, "--total-timesteps", target)
        done = trainer(*_FLAGS, *resuming, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        newest = latest_checkpoint(tmp_path / "checkpoints")
        assert newest is not None
        return newest.parent.name, verify_checkpoint(newest).num_timesteps

    assert train("run", 256) == ("run", 256)
    # The machine's clock was ahead when that ran.
    folder = RunFolder(tmp_path / "checkpoints", "ppo_agent", "run")
    for path in (*folder.path.glob("*_metadata.json"), folder.events, folder.metrics):
        path.write_text(re.sub(r'"20\d\d-(?=\d\d-\d\dT)', '"2099-', path.read_text()))
    assert train("run", 512) == ("run", 512)
    assert train("child", 768) == ("child", 768)
    for path in list_checkpoints(folder.checkpoint_dir):
        assert verify_checkpoint(path).timestamp > "2099"
    steps = [point["num_timesteps"] for point in read_curve(folder)]
    assert steps == sorted(steps)


@pytest.mark.parametrize("seconds", [-7200, 7200], ids=["back", "forward"])
def test_a_clock_that_jumps_in_mid_run_loses_nothing_and_no_order(tmp_path: Path, seconds: int) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    training = Training(tmp_path, env=environment(LD_PRELOAD=str(library()), FAULTS_CLOCK=str(clock)))
    clock.write_text(str(seconds))
    training.leash.allow(160)
    training.wait_for(lambda: training.committed == [10, 20, 30], "the third checkpoint")
    # Judged by the file system's clock as well: it lives, whatever its own clock says.
    assert FolderRuns(training.folder.checkpoint_dir).get("run")["status"] == "running"
    clock.write_text("0")
    assert training.end() == 0, training.log.read_text()
    paths = list_checkpoints(training.folder.checkpoint_dir)
    times = [verify_checkpoint(path).timestamp for path in paths]
    assert times == sorted(set(times))
    assert latest_checkpoint(training.folder.checkpoint_dir) == paths[-1]
    points = [(point["time"], point["num_timesteps"]) for point in read_curve(training.folder)]
    assert points == sorted(set(points))
    assert [steps for _, steps in points] == sorted(steps for _, steps in points)


def _take(training: Training) -> RunJournal:
    """Open the folder as its successor, before its owner notices that the lock is gone."""
    while True:
        training.folder.lock.unlink(missing_ok=True)
        try:
            return RunJournal(training.folder)
        except RunFolderBusyError:
            continue


def _contents(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir() if path.name != folder.lock.name}
