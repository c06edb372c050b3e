"""Pastes what was copied from a page into a shell, and waits for the run that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from processes import environment, wait_for

from sb3_mlflow_ckpt.runs.folder import FolderRuns


@contextmanager
def pasted(command: str, cwd: Path, parent: str, checkpoint_dirs: tuple[Path, ...]) -> Iterator[dict[str, Any]]:
    """Run a command in a shell until its run has saved something, and give the run's record; end it behind the block.

    Args:
        command: The text as it was copied.
        cwd: Where the shell is.
        parent: The run that it resumes.
        checkpoint_dirs: Where its run may be written.
    """
    stores = [FolderRuns(folder) for folder in checkpoint_dirs]
    before = _children(stores, parent)
    log = cwd / "shell.log"
    with log.open("w") as output:
        shell = subprocess.Popen(
            ["bash", "-c", command], cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True,
            env=environment(PATH=f"{_programs()}{os.pathsep}{os.environ['PATH']}"), start_new_session=True,
        )  # fmt: skip
    started: dict[str, dict[str, Any]] = {}

    def trains() -> bool:
        started.update({key: run for key, run in _children(stores, parent).items() if key not in before})
        return any(store.checkpoints(key) for store in stores for key in started)

    try:
        wait_for(trains, f"a run that goes on; the shell said: {log.read_text()}", shell)
        yield next(iter(started.values()))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{command}\n{log.read_text()}") from error
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGTERM)
            shell.wait(300)


def _children(stores: list[FolderRuns], parent: str) -> dict[str, dict[str, Any]]:
    runs = [run for store in stores for run in store.list()]
    return {run["run_id"]: run for run in runs if (run.get("parent") or {}).get("run_id") == parent}


def _programs() -> Path:
    """Return where the programs of this Python are: a user has activated the environment."""
    return Path(sys.executable).parent


