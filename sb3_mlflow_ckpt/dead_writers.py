"""Owns what processes that died left half-written in a run folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt.errors import InvalidIdError
from sb3_mlflow_ckpt.layout import (
    LOCK_NAME,
    REPLAY_FOLDER,
    TEMPORARY_PREFIX,
    RunFolder,
    metadata_episode,
    temporary_target,
)
from sb3_mlflow_ckpt.leases import nobody_saves

logger = logging.getLogger(__name__)


def sweep_dead_writers(agent_folder: Path, *, besides: Path | None = None) -> None:
    """Remove what dead writers left half-written in the folders of an agent's runs, if nobody holds their lock.

    Args:
        agent_folder: The folder that the run folders are in.
        besides: The run folder of who asks: opening a journal does so in its own.
    """
    for other in _subfolders(agent_folder):
        if other == besides or not temporaries(other):
            continue
        try:
            with FileLock(other / LOCK_NAME, timeout=0):
                sweep(RunFolder.at(other))
        except (Timeout, OSError, InvalidIdError) as error:
            logger.debug("%s is left as it is: %s", other, error)


def sweep(folder: RunFolder) -> None:
    """Remove what dead writers left half-written in a run's folder, whose lock the caller holds."""
    with nobody_saves(folder) as free:
        for path in temporaries(folder.path) if free else ():
            discard_temporary(folder, path)


def discard_temporary(folder: RunFolder, path: Path) -> None:
    """Remove one file that a dead writer left half-written.

    Metadata under a temporary name is that of a commit or a removal that was not finished. Its zip goes first, so
    that the next one knows it, too, if this process dies in between.
    """
    episode = metadata_episode(temporary_target(path.name) or "")
    if episode is not None and not folder.metadata(episode).exists():
        folder.model(episode).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def temporaries(folder: Path) -> list[Path]:
    """Return what writers left half-written in a run folder; of a live one it is under way."""
    found: list[Path] = []
    for part in (folder, folder / REPLAY_FOLDER):
        if part.is_dir() and not part.is_symlink():
            with os.scandir(part) as entries:
                found += [
                    Path(entry.path)
                    for entry in entries
                    if entry.name.startswith(TEMPORARY_PREFIX) and entry.is_file(follow_symlinks=False)
                ]
    return found


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        logger.debug("%s is not swept: %s", folder, error)
        return []
