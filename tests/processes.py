"""Runs the product as a user does: in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
DEADLINE = 120.0


def environment(**extra: str) -> dict[str, str]:
    """Return an environment in which the package and the toy environments can be imported, and nothing else is set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SB3_MLFLOW_CKPT_"))}
    return {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", **extra}


def trainer(*flags: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sb3_mlflow_ckpt.trainer", *map(str, flags)],
        cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip


def start_trainer(*flags: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the trainer; its output goes to `trainer.log` in `cwd`."""
    with (cwd / "trainer.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "sb3_mlflow_ckpt.trainer", *map(str, flags)],
            cwd=cwd, env=env or environment(), stdout=log, stderr=log, text=True,
        )  # fmt: skip


def script(source: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a user's script to its end."""
    return subprocess.run(
        [sys.executable, "-c", source], cwd=cwd, env=env or environment(), capture_output=True, text=True,
        timeout=DEADLINE,
    )  # fmt: skip


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Return when a condition holds; fail after a deadline, or when the process that should bring it about ends."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended with {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {DEADLINE} s")
        time.sleep(0.05)


class Leash:
    """Holds a training: its environment takes no more steps than a test allowed."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._file = folder / "leash"
        self.allow(steps)

    @property
    def wrapper(self) -> str:
        """The value of `env_wrappers`."""
        return f'{{"processes:leashed": {{leash: "{self._file}"}}}}'

    def allow(self, steps: int) -> None:
        """Let it take so many steps in all."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(steps))
        os.replace(fresh, self._file)

    def release(self) -> None:
        """Let it take all its steps."""
        self.allow(sys.maxsize)


def leashed(env: Any, leash: str) -> Any:
    """Return an environment, made to wait before each step that the file `leash` does not allow yet."""
    take_step, taken = env.step, 0

    def step(action: Any) -> Any:
        nonlocal taken
        while int(Path(leash).read_text()) <= taken:
            time.sleep(0.01)
        taken += 1
        return take_step(action)

    env.step = step
    return env
