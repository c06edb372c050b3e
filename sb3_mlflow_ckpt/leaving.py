"""Owns ending the process at once, from any thread: what must not be left behind, one line, the exit code.

It is for the moments when raising does not do: an `except:` in a library would swallow it, and a call into C would
not see it. Imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_LAST_THINGS_SECONDS = 2.0
_folders: set[Path] = set()
_leaving = threading.Lock()
# The threads in `leave`: a signal's handler may run in the middle of it.
_leavers: set[int] = set()


def remove_when_leaving(folder: Path) -> None:
    """Have a temporary folder removed if the process is ended at once."""
    _folders.add(folder)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that is gone afterwards, also if the process is ended at once."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sb3_mlflow_ckpt-") as name:
        folder = Path(name)
        _folders.add(folder)
        try:
            yield folder
        finally:
            _folders.discard(folder)


def wait_if_leaving() -> None:
    """Go no further where another thread is about to end the process."""
    if threading.get_ident() not in _leavers:
        with _leaving:
            pass


def leave(code: int, line: str = "", *, unless: Callable[[], bool] = lambda: False) -> None:
    """End the process. Returns only where another thread is ending it already, or where it must not end.

    Args:
        code: The exit code.
        line: What is printed on stderr.
        unless: Tells whether it must not; asked while `wait_if_leaving` waits.
    """
    thread = threading.get_ident()
    if thread in _leavers:
        return
    _leavers.add(thread)
    if not _leaving.acquire(blocking=False):
        _leavers.discard(thread)
        return
    if unless():
        _leaving.release()
        _leavers.discard(thread)
        return
    # In a thread: a disk or a pipe that hangs must not keep the process from ending.
    last = threading.Thread(target=_last_things, args=(line,), daemon=True)
    last.start()
    last.join(_LAST_THINGS_SECONDS)
    os._exit(code)


def _last_things(line: str) -> None:
    _kill_workers()
    for folder in [*_folders]:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if line:
        os.write(2, f"{line}\n".encode())


def _kill_workers() -> None:
    """Kill the processes that this one would have ended at its normal exit."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None:
        return
    with contextlib.suppress(Exception):
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
