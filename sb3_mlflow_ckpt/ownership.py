"""Owns the right to write to a run folder: its lock, which the operating system releases if the process dies."""

from __future__ import annotations

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt.atomic import is_own_file
from sb3_mlflow_ckpt.errors import ForeignFileError, RunFolderBusyError
from sb3_mlflow_ckpt.layout import RunFolder

TIDYING_SECONDS = 2.0
"""How long somebody who does not train holds a folder at most: a prune, a sweep of dead writers."""


class FolderClaim:
    """A run folder's lock, held.

    Args:
        folder: The run folder; made if it is missing.
        patience: How long to wait for somebody who holds it, in seconds.

    Raises:
        RunFolderBusyError: A live process holds the folder.
        ForeignFileError: Something else lies where its lock belongs.
    """

    def __init__(self, folder: RunFolder, patience: float = 0.0) -> None:
        self._folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.lock.is_symlink() or (folder.lock.exists() and not is_own_file(folder.lock)):
            raise ForeignFileError(folder.lock)
        # A lock of this process's threads alike: the file stays, since removing it would race with its takers.
        self._lock = FileLock(folder.lock, timeout=patience, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunFolderBusyError(folder.path) from error
        self._identity = self._at_path()

    def holds(self) -> bool:
        """Return whether the lock at the folder's path is still the one that is held.

        It is not where the folder was removed, renamed or replaced: then nothing keeps others out of it.
        """
        return self._identity is not None and self._at_path() == self._identity

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def _at_path(self) -> tuple[int, int] | None:
        try:
            found = self._folder.lock.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino
