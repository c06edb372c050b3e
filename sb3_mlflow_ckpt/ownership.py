"""Owns the right to write to a run folder: its lock, which the operating system releases if the process dies."""

from __future__ import annotations

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt.errors import RunFolderBusyError
from sb3_mlflow_ckpt.layout import RunFolder


class FolderClaim:
    """A run folder's lock, held.

    Args:
        folder: The run folder; made if it is missing.

    Raises:
        RunFolderBusyError: A live process holds the folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        folder.path.mkdir(parents=True, exist_ok=True)
        # A lock of this process's threads alike: the file stays, since removing it would race with its takers.
        self._lock = FileLock(folder.lock, timeout=0, thread_local=False)
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
