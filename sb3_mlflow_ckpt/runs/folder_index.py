"""Owns what is kept in memory of the runs in a checkpoint folder: safe to lose, and never older than the files.

A file is known by its inode, size and time: whoever rewrites a record replaces the file.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeAlias

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, InvalidIdError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.document import derived_status, last_sign_of_life
from sb3_mlflow_ckpt.runs.reader import Document, Documents, may_change_by_itself
from sb3_mlflow_ckpt.runs.summaries import summarize

logger = logging.getLogger(__name__)

Stamp: TypeAlias = tuple[int, int, int]

# A look at all files that takes longer than this is not repeated at once: it takes at most a fifth of the time, however
# slow a network's file system is.
_QUICK_SECONDS = 0.02
_PAUSE_PER_LOOK = 4


def stamp(path: Path) -> Stamp | None:
    """Return what is another whenever a file or a folder is changed; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def run_stamps(folder: RunFolder) -> tuple[Stamp | None, ...]:
    """Return what is another whenever anything that is shown of a run is changed."""
    return *checkpoint_stamps(folder), stamp(folder.record), stamp(folder.metrics)


def checkpoint_stamps(folder: RunFolder) -> tuple[Stamp | None, ...]:
    """Return what is another whenever anything that is shown of a run's checkpoints is changed."""
    # The folder itself: a checkpoint or a pin that comes or goes.
    return stamp(folder.events), stamp(folder.path)


class FolderIndex:
    """The summaries of the runs in a checkpoint folder. Safe to use from any thread.

    Args:
        checkpoint_dir: The folder.
        read: Returns the record in a run folder.
    """

    def __init__(self, checkpoint_dir: Path, read: Callable[[RunFolder], Document]) -> None:
        self._checkpoint_dir = checkpoint_dir
        self._read = read
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._folders: dict[str, RunFolder] = {}
        self._lock = threading.Lock()
        self._looked = (float("-inf"), 0.0)

    def summaries(self) -> Documents:
        """Return the summary of every run that can be read."""
        with self._lock:
            ended, took = self._looked
            if took < _QUICK_SECONDS or time.monotonic() - ended > _PAUSE_PER_LOOK * took:
                began = time.monotonic()
                self._look()
                ended = time.monotonic()
                self._looked = (ended, ended - began)
            kept = [*self._kept.values()]
        now = datetime.now(timezone.utc)
        return [shown for entry in kept if (shown := entry.shown(now)) is not None]

    def folder(self, run_id: str) -> RunFolder | None:
        """Return the folder of a run whose summary was read; whether it is still there is not looked at."""
        return self._folders.get(run_id)

    def _look(self) -> None:
        there = set()
        for key in self._names():
            there.add(key)
            known = self._kept.get(key)
            if known is None:
                try:
                    known = self._kept[key] = _Kept(RunFolder(self._checkpoint_dir, *key))
                except InvalidIdError:
                    continue
                self._folders.setdefault(key[1], known.folder)
            known.refresh(self._read)
        for key in self._kept.keys() - there:
            self._folders.pop(key[1], None)
            del self._kept[key]

    def _names(self) -> Iterator[tuple[str, str]]:
        for agent in subfolders(self._checkpoint_dir):
            for name in subfolders(self._checkpoint_dir / agent):
                yield agent, name


class _Kept:
    """What is kept of one run.

    Args:
        folder: The run's.
    """

    __slots__ = ("_path", "_stamp", "_summary", "folder")

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._path = folder.record
        self._stamp: Stamp | None = None
        self._summary: Document | None = None

    def refresh(self, read: Callable[[RunFolder], Document]) -> None:
        now = stamp(self._path)
        if now == self._stamp:
            return
        self._stamp, self._summary = now, None
        if now is not None:
            try:
                self._summary = summarize(read(self.folder))
            except (OSError, CheckpointCorruptError) as error:
                logger.warning("A run is passed over: %s", error)

    def shown(self, now: datetime) -> Document | None:
        found, at = self._summary, self._stamp
        if found is None or at is None or not may_change_by_itself(found["status"]):
            return found
        written = datetime.fromtimestamp(at[2] / 1e9, timezone.utc)
        return {**found, "status": derived_status(found, now, last_sign_of_life(found, written, now))}


def subfolders(path: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; what cannot be looked at is passed over with a warning."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if _is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        logger.warning("A folder is passed over: %s", error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself, say.
        return False
