"""Owns what runs on the node: one attempt of a project's command. Ray starts it again after a death."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any

from sb3_mlflow_ckpt.scale.fate_sharing import SharedFate, path_of_this_python

FINAL_EXIT_CODES = (0, 2)
"""Trained, and a wrong setting: starting it again would change nothing."""
STOPPED = 128 + signal.SIGTERM
"""The exit code of a job that was stopped."""
_STEP_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
RESUME_VARIABLE = "SB3_MLFLOW_CKPT_RESUME_OWN_RUN"


class TrainerDied(Exception):
    """The command ended in a way that starting it again may mend.

    Args:
        code: Its exit code, as a shell reports it.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        cause = f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        super().__init__(f"The trainer {cause}")

    def __reduce__(self) -> tuple[type[TrainerDied], tuple[int]]:
        return TrainerDied, (self.code,)


class StopFlag:
    """Tells a task that its job is stopped: an actor beside the driver.

    Ray's own cancel gives the driver its answer before the task has ended, and the trainer no time to save.
    """

    def __init__(self) -> None:
        self._raised = False

    def hoist(self) -> None:
        """Stop the job."""
        self._raised = True

    def is_raised(self) -> bool:
        """Return whether the job is stopped."""
        return self._raised


def run_command(command: str, cwd: str | None, grace_seconds: float, flag: Any) -> int:
    """Run a command to its end, which goes on from what its run has reached; return its exit code if that is final.

    Args:
        command: What `bash -c` is given.
        cwd: Where it runs; this process's own folder where it is None.
        grace_seconds: How long it may take to end when the job is stopped.
        flag: A handle of a `StopFlag`.

    Raises:
        TrainerDied: It ended otherwise.
    """
    if is_raised(flag):
        return STOPPED
    env = {**os.environ, "PATH": path_of_this_python(os.environ)}
    env.setdefault(RESUME_VARIABLE, "true")
    trainer = SharedFate(command, cwd, env)
    try:
        while (code := _exit_code(trainer)) is None:
            if is_raised(flag):
                trainer.stop(grace_seconds)
                return STOPPED
    except BaseException:
        # Somebody cancels the task itself, say: Ray raises KeyboardInterrupt in it.
        trainer.stop(grace_seconds)
        raise
    trainer.kill()
    if code not in FINAL_EXIT_CODES:
        raise TrainerDied(code)
    return code


def _exit_code(trainer: SharedFate) -> int | None:
    # In steps: what Ray raises in this thread is heard between them, not within a call that waits in the system.
    with contextlib.suppress(subprocess.TimeoutExpired):
        return trainer.wait(_STEP_SECONDS)
    return None


def is_raised(flag: Any) -> bool:
    """Return whether a flag says that what it is of is stopped; False where it does not answer."""
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.get(flag.is_raised.remote(), timeout=_ANSWER_SECONDS))
    except RayError:
        # The head is slow, or gone; with it this process goes, too.
        return False
