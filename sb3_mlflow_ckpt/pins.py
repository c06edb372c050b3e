"""Owns the markers that keep checkpoints from being removed: an empty file beside the zip, made and removed at once.

A live run holds its folder's lock, and sees the pin of another process when it next prunes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sb3_mlflow_ckpt.atomic import fsync_dir
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError, CheckpointSaveError
from sb3_mlflow_ckpt.layout import RunFolder, marker_episode, metadata_path, model_path, pin_path
from sb3_mlflow_ckpt.leases import lease_checkpoint

_NOT_THERE = "It is not there, or was never committed; list those that are with: sb3-mlflow-ckpt checkpoints list"


def pin_checkpoint(path: str | Path) -> Path:
    """Keep a checkpoint from being removed, by its run and by `prune_checkpoints`; return its zip.

    Args:
        path: The zip, or its metadata file. Pinning it again changes nothing.

    Raises:
        CheckpointNotFoundError: There is no such committed checkpoint.
        CheckpointSaveError: The folder cannot be written to.
    """
    zip_path = model_path(Path(path))
    # With it nobody removes the checkpoint between the look and the marker.
    lease = lease_checkpoint(zip_path)
    try:
        _check_committed(zip_path, path)
        with suppress(FileExistsError), _writing(pin_path(zip_path)):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            os.close(os.open(pin_path(zip_path), flags, 0o666))
            fsync_dir(zip_path.parent)
        _check_committed(zip_path, path)
    finally:
        if lease is not None:
            lease.release()
    return zip_path


def unpin_checkpoint(path: str | Path) -> Path:
    """Let a checkpoint be removed again when its turn comes; return its zip. Without a pin nothing changes.

    Args:
        path: The zip, or its metadata file.

    Raises:
        CheckpointNotFoundError: There is neither such a checkpoint nor its pin.
        CheckpointSaveError: The folder cannot be written to.
    """
    zip_path = model_path(Path(path))
    if not os.path.lexists(pin_path(zip_path)):
        _check_committed(zip_path, path)
        return zip_path
    with _writing(pin_path(zip_path)):
        pin_path(zip_path).unlink(missing_ok=True)
        fsync_dir(zip_path.parent)
    return zip_path


@contextmanager
def _writing(marker: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise CheckpointSaveError(marker, error, "Check that the run's folder is a writable folder") from error


def is_pinned(path: Path) -> bool:
    """Return whether a checkpoint's marker is there."""
    return os.path.lexists(pin_path(path))


def pinned_episodes(folder: RunFolder) -> set[int]:
    """Return the episodes of a run whose marker is there, whether or not the checkpoint is."""
    try:
        names = os.listdir(folder.path)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    found = (marker_episode(name) for name in names)
    return {marker[0] for marker in found if marker is not None and marker[1] == "pin"}


def sweep_pins(folder: RunFolder) -> list[int]:
    """Remove the markers whose checkpoint is gone; return their episodes. The caller holds the folder's lock."""
    swept = [
        episode
        for episode in sorted(pinned_episodes(folder))
        if not folder.metadata(episode).exists() and not folder.model(episode).exists()
    ]
    for episode in swept:
        with suppress(IsADirectoryError):  # Somebody else's.
            pin_path(folder.model(episode)).unlink(missing_ok=True)
    return swept


def _check_committed(zip_path: Path, given: object) -> None:
    if not (zip_path.is_file() and metadata_path(zip_path).is_file()):
        raise CheckpointNotFoundError(given, _NOT_THERE)
