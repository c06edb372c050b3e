"""Owns a training in a process of its own that a test holds at a moment, signals, and asks what it left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from processes import DEADLINE, environment, start_python, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.runs.folder import FolderRuns

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TARGET = 10_000_000
PPO = ("--algo", "moments:UpdatingPPO", "--hyperparameters", "{n_steps: 64, n_epochs: 2}")
DQN = ("--algo", "moments:UpdatingDQN", "--hyperparameters", "{learning_starts: 20}")
_ENVIRONMENT = ("--env-id", "toy_environments:FixedLength-v0", "--env-wrappers", '["moments:Arriving"]')


class Preempted:
    """A training that goes to a moment of `moments` and waits there.

    Args:
        cwd: Its working directory.
        moment: The moment.
        flags: Of the trainer.
        env: Variables of its environment.
    """

    def __init__(self, cwd: Path, moment: str, *flags: object, env: Mapping[str, str] | None = None) -> None:
        self.cwd = cwd
        self.checkpoint_dir = cwd / "checkpoints"
        self._reached = cwd / "reached"
        # A short path: processes of environments meet at a socket in it.
        self.temporary = Path(tempfile.mkdtemp(prefix="ckpt-"))
        settings = {"MOMENT": moment, "MOMENT_FOLDER": str(cwd), "TMPDIR": str(self.temporary), **(env or {})}
        words = [*_ENVIRONMENT, "--checkpoint-interval-episodes", 10, "--total-timesteps", TARGET, *flags]
        self._log = cwd / "trainer.log"
        self.process = start_python(
            "-m", "sb3_mlflow_ckpt.trainer", *words,
            cwd=cwd, log=self._log, env=environment(**settings), new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Wait until it is there."""
        wait_for(self._reached.exists, "the moment", self.process)

    def release(self) -> None:
        """Let it go on."""
        (self.cwd / "released").touch()

    def send(self, signum: int, *, to_group: bool = False) -> None:
        """Send it a signal."""
        os.killpg(self.process.pid, signum) if to_group else self.process.send_signal(signum)

    @property
    def threads(self) -> int:
        """How many threads it has."""
        return psutil.Process(self.process.pid).num_threads()

    def end(self) -> int:
        """Wait for its end; return its exit code, once none of its processes is left."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        code = self.process.wait(DEADLINE)
        _, alive = psutil.wait_procs(children, timeout=DEADLINE)
        assert not alive, "a worker outlived its trainer"
        assert "Traceback" not in self.log, self.log
        assert not list(self.temporary.glob("sb3_mlflow_ckpt-*")), "a download is left"
        shutil.rmtree(self.temporary)
        return code

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def records(self) -> list[dict[str, Any]]:
        return FolderRuns(self.checkpoint_dir).list()

    @property
    def newest(self) -> CheckpointMetadata:
        return verify_checkpoint(list_checkpoints(self.checkpoint_dir)[-1])

    def assert_interrupted(self) -> dict[str, Any]:
        """Return its record; the record must say that it was interrupted."""
        [record] = self.records
        assert (record["status"], record["error"]) == ("interrupted", None)
        assert record["ended_at"] is not None
        return record

    def resume(self, *flags: object) -> subprocess.CompletedProcess[str]:
        """Run it again as a scheduler does, with `auto`, to shortly beyond where it was saved."""
        target = self.newest.num_timesteps + 64
        words = [*_ENVIRONMENT, "--resume-from-checkpoint", "auto", *flags, "--total-timesteps", target]
        return trainer(*words, cwd=self.cwd)


def saved_at_signal(checkpoint_dir: Path) -> CheckpointMetadata:
    """Return the newest checkpoint of the only run, which must be of the moment at which a signal stopped it.

    It says `interval` where one fell due in that very moment.
    """
    [record] = FolderRuns(checkpoint_dir).list()
    newest = verify_checkpoint(list_checkpoints(checkpoint_dir)[-1])
    assert newest.trigger in ("signal", "interval")
    assert newest.num_timesteps == record["progress"]["num_timesteps"]
    return newest


def shell_code(returncode: int) -> int:
    """Return the exit code that a shell reports: one that died of a signal counts as 128 + its number."""
    return 128 - returncode if returncode < 0 else returncode


def shadowing(folder: Path, source: str, name: str = "torch") -> dict[str, str]:
    """Return an environment in which a module of a test is imported in place of the real one."""
    (folder / f"{name}.py").write_text(source)
    inherited = environment()["PYTHONPATH"]
    return {"PYTHONPATH": f"{folder}{os.pathsep}{inherited}"}
