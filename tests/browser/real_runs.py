"""Trains the runs that the browser looks at: real ones, each in a process of its own, as a user's command does it."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from processes import DEADLINE, TESTS, Leash, environment, wait_for

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_PPO = ("--hyperparameters", "{n_steps: 128, batch_size: 64, n_epochs: 2}")
_DQN = ("--hyperparameters", "{learning_starts: 200, buffer_size: 4000}")
_CHECKPOINT_DIR = "checkpoints"
NAMES = (
    *("tracked", "first of three", "second of three", "third of three", "killed", "stopped", "baseline", "stalled"),
    *("quick a2c", "quick dqn", "broken simulator", "pruned", "damaged"),
)
"""What the runs are called."""


class RealRuns:
    """The runs, by what they were called when they were trained.

    Args:
        folder: Where they were trained: the working folder of their processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint_dir = folder / _CHECKPOINT_DIR
        self.store = FolderRuns(self.checkpoint_dir)

    def id(self, name: str) -> str:
        """Return the id of the run of a name."""
        (found,) = [run["run_id"] for run in self.store.list() if run["name"] == name]
        return str(found)

    def record(self, name: str) -> dict[str, Any]:
        """Return its record, with `checkpoint_paths`."""
        return self.store.get(self.id(name))

    def run_folder(self, name: str) -> RunFolder:
        """Return its folder."""
        record = self.store.record(self.id(name))
        return RunFolder(self.checkpoint_dir, record["agent_id"], record["run_id"])


class Trainers:
    """Starts trainings in processes that have imported torch already.

    Args:
        folder: Their working folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = multiprocessing.get_context("forkserver")
        # Starting one also looks after all others, and of two who look after one process only one learns its exit code.
        self._lock = threading.Lock()
        self._processes.set_forkserver_preload(["sb3_contrib", "torch._dynamo", "sb3_mlflow_ckpt.callback"])

    def start(self, name: str, *flags: object) -> multiprocessing.process.BaseProcess:
        """Start one; what it prints goes to `<name>.log`."""
        words = [*map(str, flags), "--run-name", name, "--seed", "3", "--device", "cpu"]
        process = self._processes.Process(target=_train, args=(words, str(self._folder), f"{name}.log"))
        with self._lock:
            process.start()
        return process

    def train(self, name: str, *flags: object, code: int = 0) -> None:
        """Run one to its end, which must have an exit code."""
        self.end(name, self.start(name, *flags), code)

    def end(self, name: str, process: multiprocessing.process.BaseProcess, code: int) -> None:
        """Wait for its end."""
        multiprocessing.connection.wait([process.sentinel], DEADLINE)
        with self._lock:
            process.join(0)
            found = process.exitcode
        assert found == code, (self._folder / f"{name}.log").read_text()[-3000:]


def _train(words: list[str], folder: str, log: str) -> None:
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    kept = environment()
    os.environ.clear()
    os.environ.update(kept)
    sys.path.insert(0, str(TESTS))
    # What a record says of its command is what a user types.
    sys.orig_argv[:] = [sys.executable, "-m", "sb3_mlflow_ckpt.trainer", *words]

    import torch

    from sb3_mlflow_ckpt.cli import train_command

    torch.set_num_threads(1)
    train_command(words)


def train_all(folder: Path) -> RealRuns:
    """Train every kind of run that the pages can show, two at a time."""
    runs, trainers = RealRuns(folder), Trainers(folder)
    stories: tuple[Callable[[RealRuns, Trainers], None], ...] = (
        _mirrored, _chain, _killed, _stopped, _baseline, _stalled, _other_algorithms, _failed, _pruned, _damaged
    )  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(story, runs, trainers) for story in stories]:
            done.result()
    return runs


def _baseline(runs: RealRuns, trainers: Trainers) -> None:
    keep = ("--keep-last-n-checkpoints", 0, "--checkpoint-interval-episodes", 25)
    trainers.train("baseline", *_PPO, *keep, "--total-timesteps", 8000, "--mlflow", "false")


def _other_algorithms(runs: RealRuns, trainers: Trainers) -> None:
    trainers.train("quick a2c", "--algo", "a2c", "--total-timesteps", 3000, "--mlflow", "false")
    trainers.train("quick dqn", "--algo", "dqn", *_DQN, "--total-timesteps", 3000, "--mlflow", "false")


def _failed(runs: RealRuns, trainers: Trainers) -> None:
    environment = ("--env-id", "toy_environments:FixedLength-v0", "--env-kwargs", "{length: 10, fails_at: 700}")
    flags = ("--agent-id", "toy", "--checkpoint-interval-episodes", 20, "--mlflow", "false")
    trainers.train("broken simulator", *_PPO, *environment, *flags, code=1)


def _chain(runs: RealRuns, trainers: Trainers) -> None:
    """Train a run, resume it, and resume that one with another learning rate."""
    flags = (*_PPO, "--agent-id", "chain", "--checkpoint-interval-episodes", 20, "--mlflow", "false")
    trainers.train("first of three", *flags, "--total-timesteps", 4000)
    for name, timesteps, changed in (("second of three", 8000, ()), ("third of three", 12000, ("--learning-rate", 0.001))):
        source = latest_checkpoint(runs.checkpoint_dir, agent_id="chain")
        trainers.train(name, *flags, *changed, "--total-timesteps", timesteps, "--resume-from-checkpoint", source)


def _mirrored(runs: RealRuns, trainers: Trainers) -> None:
    """Train a run whose checkpoints are in MLflow too, the older ones only there, and stop it long before its target."""
    tracking = ("--mlflow", "true", "--tracking-uri", f"sqlite:///{runs.folder / 'tracking.db'}")
    process = _until_saved(runs, trainers, "tracked", *tracking, "--keep-last-n-checkpoints", 1)
    process.terminate()
    trainers.end("tracked", process, 128 + signal.SIGTERM)


def _pruned(runs: RealRuns, trainers: Trainers) -> None:
    keep = ("--keep-last-n-checkpoints", 2, "--checkpoint-interval-episodes", 10)
    trainers.train("pruned", *_PPO, *keep, "--total-timesteps", 2500, "--mlflow", "false")


def _damaged(runs: RealRuns, trainers: Trainers) -> None:
    flags = ("--checkpoint-interval-episodes", 25, "--agent-id", "damaged", "--mlflow", "false")
    trainers.train("damaged", *_PPO, *flags, "--total-timesteps", 2500)
    newest = runs.run_folder("damaged").model(runs.record("damaged")["checkpoint_paths"][-1]["episode"])
    content = bytearray(newest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    newest.write_bytes(content)


def _until_saved(runs: RealRuns, trainers: Trainers, name: str, *flags: object) -> multiprocessing.process.BaseProcess:
    """Start a training that takes 1,500 steps and stands still; return it when its second checkpoint is committed."""
    folder = runs.folder / name
    folder.mkdir()
    leash = Leash(folder, 1500)
    words = (*_PPO, "--agent-id", name, "--env-wrappers", f"[{leash.wrapper}]", "--checkpoint-interval-episodes", 20)
    process = trainers.start(name, *words, "--total-timesteps", 20_000, *(flags or ("--mlflow", "false")))

    def saved() -> bool:
        assert process.is_alive(), (runs.folder / f"{name}.log").read_text()[-3000:]
        return any(runs.checkpoint_dir.glob(f"{name}/*/ep000040_metadata.json"))

    wait_for(saved, f"two checkpoints of {name}")
    return process


def _killed(runs: RealRuns, trainers: Trainers) -> None:
    process = _until_saved(runs, trainers, "killed")
    process.kill()
    trainers.end("killed", process, -signal.SIGKILL)
    long_ago = datetime.now(timezone.utc) - timedelta(hours=9)
    _rewrite(runs.run_folder("killed"), long_ago, heartbeat_at=_text(long_ago))


def _stopped(runs: RealRuns, trainers: Trainers) -> None:
    process = _until_saved(runs, trainers, "stopped")
    process.terminate()
    trainers.end("stopped", process, 128 + signal.SIGTERM)


def _stalled(runs: RealRuns, trainers: Trainers) -> None:
    """Leave a run as one looks whose process lives and takes no step: its heart beats for as long as the tests last."""
    process = _until_saved(runs, trainers, "stalled")
    process.kill()
    trainers.end("stalled", process, -signal.SIGKILL)
    now = datetime.now(timezone.utc)
    times = {"heartbeat_at": _text(now), "last_step_at": _text(now - timedelta(hours=1))}
    _rewrite(runs.run_folder("stalled"), now + timedelta(hours=1), **times)


def _rewrite(folder: RunFolder, written: datetime, **fields: str) -> None:
    folder.record.write_text(json.dumps(json.loads(folder.record.read_text()) | fields))
    os.utime(folder.record, (written.timestamp(), written.timestamp()))


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


if __name__ == "__main__":
    # For a look at the pages: python tests/browser/real_runs.py /tmp/runs
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    for each in train_all(target).store.list():
        print(each["run_id"], each["status"], each["name"])
