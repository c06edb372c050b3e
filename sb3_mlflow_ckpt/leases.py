"""Owns the locks that say which checkpoints are in use: who resumes from one shares it, who removes one needs it alone.

The operating system releases a lock when its process dies, so a crash leaves nothing behind. Where a folder cannot
be written to, or its file system has no locks, a checkpoint is used without one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.layout import RunFolder, lease_path, marker_episode, metadata_path, model_path

try:
    import fcntl
except ImportError:  # Windows: a file that is open cannot be removed there.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
# Nobody can hold a lease: no locks in this file system, a full disk without the lock's file, a link in its place.
_NO_LEASE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.ELOOP)
# A lock file may be removed between its opening and its locking; each round meets a newer one.
_ROUNDS = 1000


class Lease:
    """A checkpoint that must not be removed until `release`, or until the process ends."""

    def __init__(self, descriptor: int, file: Path) -> None:
        self._descriptor: int | None = descriptor
        self._file = file
        self._pid = os.getpid()

    def release(self) -> None:
        """Give it up, and leave the folder as it was; the same again does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            if self._pid == os.getpid():
                self._remove_file(descriptor)
                # Closing alone would leave it to a worker that was forked meanwhile.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _remove_file(self, descriptor: int) -> None:
        """Remove the lock's file where nobody else uses the checkpoint; who has opened it meanwhile makes a new one."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(descriptor, self._file):
                self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.debug("%s stays: %s", self._file, error)

    def __del__(self) -> None:
        # A model that was loaded and forgotten holds its checkpoint no longer.
        try:
            self.release()
        except (OSError, AttributeError, TypeError):
            return


def lease_checkpoint(path: Path) -> Lease | None:
    """Take a committed checkpoint into use.

    Args:
        path: Its zip, or its metadata file.

    Returns:
        The lease; None where none can be had: the folder is read-only, is none of ours, or has no locks.
        Whoever takes one looks afterwards whether the checkpoint is still there.
    """
    path = model_path(Path(path))
    if fcntl is None or not atomic.is_own_file(metadata_path(path)):
        return None
    try:
        descriptor = _locked(path, exclusive=False)
    except OSError as error:
        logger.debug("%s is used without a lease: %s", path, error)
        return None
    return Lease(descriptor, lease_path(path).absolute()) if descriptor is not None else None


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Tell whether nobody uses a checkpoint, and keep it so meanwhile; never waits. The lock's file goes afterwards.

    Args:
        path: Its zip.
    """
    descriptor = None
    if fcntl is not None:
        try:
            descriptor = _locked(path, exclusive=True)
        except OSError as error:
            if error.errno not in _NO_LEASE:
                yield False
                return
            logger.debug("%s cannot be locked: %s", path, error)
    try:
        yield True
    finally:
        if descriptor is not None:
            if not metadata_path(path).exists():
                lease_path(path).unlink(missing_ok=True)
            os.close(descriptor)


def leased_episodes(folder: RunFolder) -> set[int]:
    """Return the episodes of a run that are in use."""
    return {episode for episode in _lease_files(folder) if _in_use(lease_path(folder.model(episode)))}


def sweep_leases(folder: RunFolder) -> list[int]:
    """Remove the lock files whose checkpoint is gone; return their episodes. The caller holds the folder's lock."""
    swept = []
    for episode in _lease_files(folder):
        if not folder.metadata(episode).exists() and not _in_use(lease_path(folder.model(episode))):
            lease_path(folder.model(episode)).unlink(missing_ok=True)
            swept.append(episode)
    return swept


@contextmanager
def saving(folder: RunFolder) -> Iterator[None]:
    """Keep `nobody_saves` from being true meanwhile; waits for a sweep that is under way."""
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):  # Whatever is wrong with the folder, the save tells.
            folder.path.mkdir(parents=True, exist_ok=True)
            descriptor = _open(folder.saving)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def nobody_saves(folder: RunFolder) -> Iterator[bool]:
    """Tell whether no process saves to a folder without holding its lock, and keep it so meanwhile."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = _open(folder.saving)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def _locked(path: Path, *, exclusive: bool) -> int | None:
    """Return a descriptor of the lock file that lies there now, locked; None where the checkpoint went meanwhile.

    Who removes or gives up holds the lock alone for a moment only: who wants to share it waits for that.
    """
    file = lease_path(path)
    for _ in range(_ROUNDS):
        descriptor = _open(file)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            if _is_there(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not exclusive and not metadata_path(path).exists():
            return None
    raise OSError(errno.EWOULDBLOCK, "its lock is taken and given up all the time", str(file))


def _in_use(file: Path) -> bool:
    if fcntl is None:
        return False
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return error.errno in _BUSY  # It may be: that nobody may look at it.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


def _open(file: Path) -> int:
    # A lock needs no right to write: another user's file, left by a process that was killed, must not stand in the way.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(file, flags | os.O_CREAT, 0o666)


def _is_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _lease_files(folder: RunFolder) -> list[int]:
    try:
        names = os.listdir(folder.path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (marker_episode(name) for name in names)
    return sorted(marker[0] for marker in found if marker is not None and marker[1] == "lease")
