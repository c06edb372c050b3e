"""Owns the removal of replay chunks that no committed checkpoint of a run needs."""

from __future__ import annotations

import logging
import os

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointNotFoundError
from sb3_mlflow_ckpt.journal import committed_episodes, sweep
from sb3_mlflow_ckpt.layout import RunFolder, chunk_range, entry_chunk
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.verification import read_metadata, replacement_of

logger = logging.getLogger(__name__)


def needed_chunks(metadata: CheckpointMetadata) -> frozenset[str]:
    """Return the chunks that a checkpoint needs; both contents' while it is being replaced."""
    newer = replacement_of(metadata)
    entries = [*metadata.files, *(newer.files if newer is not None else ())]
    return frozenset(name for entry in entries if (name := entry_chunk(entry.name)) is not None)


class ChunkSweeper:
    """Knows which chunks the committed checkpoints of a run need. Used by the holder of the folder's lock only.

    Checkpoints are removed before their chunks, so a crash leaves at most chunks that nobody needs.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._needed: dict[int, frozenset[str]] = {}
        self._unknown: set[int] = set()
        if not self._names():
            return
        for episode in committed_episodes(folder):
            self.look_at(episode)

    def add(self, metadata: CheckpointMetadata) -> None:
        """Note a checkpoint that was committed."""
        self._unknown.discard(metadata.episode)
        self._needed[metadata.episode] = needed_chunks(metadata)

    def look_at(self, episode: int) -> None:
        """Note what a checkpoint needs by its metadata on disk: nothing, where it has none."""
        self.discard(episode)
        try:
            self._needed[episode] = needed_chunks(read_metadata(self._folder.model(episode), settle=False))
        except CheckpointNotFoundError:
            return
        except (CheckpointError, OSError) as error:
            logger.warning("No replay chunks are removed from %s: %s", self._folder.path, error)
            self._unknown.add(episode)

    def discard(self, episode: int) -> None:
        """Note that a checkpoint's metadata and zip were removed."""
        self._unknown.discard(episode)
        self._needed.pop(episode, None)

    def sweep(self) -> None:
        """Remove the chunks that no checkpoint needs; never while one of the run's checkpoints is being written."""
        if self._unknown:
            return
        orphans = self._names() - frozenset().union(*self._needed.values())
        for name in orphans:
            try:
                self._folder.chunk(name).unlink(missing_ok=True)
            except OSError as error:
                logger.warning("An old replay chunk could not be removed: %s", error)

    def _names(self) -> set[str]:
        try:
            return {name for name in os.listdir(self._folder.replay) if chunk_range(name) is not None}
        except (FileNotFoundError, NotADirectoryError):
            return set()


def sweep_run(folder: RunFolder) -> None:
    """Remove what dead writers left, and chunks that nobody needs, unless a live run holds the folder: it does so."""
    try:
        with FileLock(folder.lock, timeout=0):
            sweep(folder)
            ChunkSweeper(folder).sweep()
    except (Timeout, OSError) as error:
        logger.debug("What lies about in %s is left as it is: %s", folder.path, error)
