"""Owns the removal of replay chunks that no committed checkpoint of a run needs."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointNotFoundError
from sb3_mlflow_ckpt.layout import RunFolder, chunk_range, entry_chunk, metadata_episode
from sb3_mlflow_ckpt.leases import leased_episodes
from sb3_mlflow_ckpt.ledger import committed_episodes
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, parse_metadata
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

    def sweep(self) -> list[str]:
        """Remove the chunks that no checkpoint needs; never while one of the run's checkpoints is being written.

        Returns:
            Their names.
        """
        swept = []
        for name in self.orphans():
            try:
                self._folder.chunk(name).unlink(missing_ok=True)
                swept.append(name)
            except OSError as error:
                logger.warning("An old replay chunk could not be removed: %s", error)
        return swept

    def orphans(self) -> list[str]:
        """Return the chunks that nothing needs: no checkpoint, none that was set aside, and no resume."""
        if self._unknown:
            return []
        names = self._names()
        if not names:
            return []  # Without a replay buffer there are none, however many checkpoints there are.
        orphans = names - frozenset().union(*self._needed.values())
        if orphans and leased_episodes(self._folder):
            return []  # A resume may still read what an episode that was saved again needed before.
        return sorted(orphans - self._set_aside()) if orphans else []

    def _set_aside(self) -> set[str]:
        """Return the chunks that a checkpoint needs which a repair set aside: somebody may still mend it."""
        needed: set[str] = set()
        if not self._folder.set_aside.is_dir() or self._folder.set_aside.is_symlink():
            return needed
        for path in self._folder.set_aside.iterdir():
            if metadata_episode(path.name) is not None:
                with suppress(CheckpointError, OSError):
                    needed |= needed_chunks(parse_metadata(atomic.read_bytes(path), path))
        return needed

    def _names(self) -> set[str]:
        if self._folder.replay.is_symlink():
            return set()  # What lies elsewhere is not this run's.
        try:
            return {name for name in os.listdir(self._folder.replay) if chunk_range(name) is not None}
        except (FileNotFoundError, NotADirectoryError):
            return set()
