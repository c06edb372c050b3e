"""Owns what runs on the node: one attempt of a project's command. Ray starts it again after a death."""

from __future__ import annotations

import contextlib
import os
import subprocess

from sb3_mlflow_ckpt.scale.fate_sharing import SharedFate, path_of_this_python

FINAL_EXIT_CODES = (0, 2)
"""Trained, and a wrong setting: starting it again would change nothing."""
_STEP_SECONDS = 0.5
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


def run_command(command: str, cwd: str | None, grace_seconds: float) -> int:
    """Run a command to its end, which goes on from what its run has reached; return its exit code if that is final.

    Args:
        command: What `bash -c` is given.
        cwd: Where it runs; this process's own folder where it is None.
        grace_seconds: How long it may take to end when the task is cancelled.

    Raises:
        TrainerDied: It ended otherwise.
    """
    env = {**os.environ, "PATH": path_of_this_python(os.environ)}
    env.setdefault(RESUME_VARIABLE, "true")
    trainer = SharedFate(command, cwd, env)
    try:
        code = _ended(trainer)
    except BaseException:
        # Ray cancels a task by raising KeyboardInterrupt in it.
        trainer.stop(grace_seconds)
        raise
    trainer.kill()
    if code not in FINAL_EXIT_CODES:
        raise TrainerDied(code)
    return code


def _ended(trainer: SharedFate) -> int:
    # In steps: what Ray raises in this thread is heard between them, not within a call that waits in the system.
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return trainer.wait(_STEP_SECONDS)
