"""Runs the product as a user does: in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import prefork
import psutil

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
DEADLINE = 300.0


def environment(**extra: str) -> dict[str, str]:
    """Return an environment in which the package and the toy environments can be imported, and nothing else is set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SB3_MLFLOW_CKPT_"))}
    return {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", **extra}


def python(*words: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python <words>` to its end."""
    given = environment() if env is None else env
    arguments = [*map(str, words)]
    if _needs_its_own_start(given):
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=given, capture_output=True, text=True, timeout=DEADLINE
        )
    return prefork.run(arguments, cwd=cwd, env=given, timeout=DEADLINE)


def start_python(
    *words: object, cwd: Path, log: Path, env: Mapping[str, str] | None = None, new_session: bool = False
) -> Any:
    """Start `python <words>`; its output goes to a file. What is returned is like a `subprocess.Popen`."""
    given = environment() if env is None else env
    arguments = [*map(str, words)]
    with log.open("a") as file:
        if not _needs_its_own_start(given):
            files = {"output": file.fileno(), "errors": file.fileno()}
            return prefork.start(arguments, cwd=cwd, env=given, new_session=new_session, **files)
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=given, stdout=file, stderr=file, text=True,
            start_new_session=new_session,
        )  # fmt: skip


def _needs_its_own_start(env: Mapping[str, str]) -> bool:
    """Tell whether an environment says what is imported, or how."""
    ours = environment()
    return any(env.get(name) != ours.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "LD_PRELOAD"))


def trainer(*flags: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end."""
    return python("-m", "sb3_mlflow_ckpt.trainer", *flags, cwd=cwd, env=env)


def start_trainer(*flags: object, cwd: Path, env: Mapping[str, str] | None = None) -> Any:
    """Start the trainer; its output goes to `trainer.log` in `cwd`."""
    return start_python("-m", "sb3_mlflow_ckpt.trainer", *flags, cwd=cwd, log=cwd / "trainer.log", env=env)


def script(source: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a user's script to its end."""
    return python("-c", source, cwd=cwd, env=env)


def wait_for(condition: Callable[[], object], what: str, process: Any = None) -> None:
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


def lockstep(env: Any, folder: str, lead: int = 256) -> Any:
    """Return an environment, made to wait for another process's: none is more than `lead` steps of its own before it.

    The first step waits until there are two, and gives whose is first ten times the reward: it is the better one for
    sure. A process that has ended is waited for no more.
    """
    take_step, close, taken = env.step, env.close, 0
    own, together = Path(folder) / str(os.getpid()), Path(folder) / "together"
    Path(folder).mkdir(exist_ok=True)
    scale = 1.0

    def behind() -> bool:
        others = [path for path in Path(folder).iterdir() if path.name.isdigit() and path != own]
        if others and not together.exists():
            together.touch()
        return not together.exists() or any(lives(int(path.name)) and _count(path) < taken - lead for path in others)

    def step(action: Any) -> Any:
        nonlocal taken, scale
        if taken == 0:
            with suppress(FileExistsError):
                Path(folder, "first").open("x").close()
                scale = 10.0
        if taken % (lead // 4) == 0:
            fresh = own.with_suffix(".new")
            fresh.write_text(str(taken))
            os.replace(fresh, own)
            while behind():
                time.sleep(0.01)
        taken += 1
        observation, reward, terminated, truncated, info = take_step(action)
        if "episode" in info:
            # As the monitor beneath has counted it.
            info["episode"]["r"] *= scale
        return observation, reward, terminated, truncated, info

    def leave() -> None:
        own.unlink(missing_ok=True)
        close()

    env.step, env.close = step, leave
    return env


def lives(pid: int) -> bool:
    """Tell whether a process runs: it may end while it is looked at."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _count(path: Path) -> int:
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return sys.maxsize  # It has left.
