"""Owns chunks as files of a run folder: written once, never changed, shared by hard link with a run that resumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.layout import RunFolder, chunk_name
from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows, write_chunk
from sb3_mlflow_ckpt.state.replay.plan import Chunk, Span
from sb3_mlflow_ckpt.tree import NotPlainError

logger = logging.getLogger(__name__)


def write_rows(rows: ChunkRows, span: Span, folder: RunFolder, token: str) -> Chunk:
    """Write rows as a chunk of a run; when this returns it survives a power cut.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    name = chunk_name(span.start, span.end, token)
    path, reason = folder.chunk(name), ""
    with atomic.staged(path) as (file, temporary):
        hashed = atomic.HashedFile(file)
        try:
            write_chunk(cast("IO[bytes]", hashed), rows)
        except NotPlainError as error:
            reason = f"the infos of the replay buffer are not kept ({error})"
            write_chunk(cast("IO[bytes]", hashed), replace(rows, infos=None))
        hashed.flush()
    atomic.commit(temporary, path)
    return Chunk(name, span.start, span.end, hashed.bytes, hashed.sha256, reason)


def take_over(chunks: Iterable[Chunk], source: Path | None, folder: RunFolder) -> set[str]:
    """Make chunks lie in a run's folder: by hard link or copy from the folder of the run that it goes on from.

    Args:
        chunks: The chunks.
        source: The folder that holds them; it is only read.
        folder: The run that needs them.

    Returns:
        The names of those that are in neither.

    Raises:
        OSError: One cannot be copied.
    """
    lost, linked = set(), False
    for chunk in chunks:
        path = folder.chunk(chunk.name)
        if _has_size(path, chunk):
            continue
        path.unlink(missing_ok=True)
        if source is None or not _has_size(source / chunk.name, chunk):
            lost.add(chunk.name)
            continue
        try:
            os.link(source / chunk.name, path)
        except OSError as error:
            logger.debug("%s is copied: %s", chunk.name, error)
            _copy(source / chunk.name, path, chunk)
        linked = True
    if linked:
        atomic.fsync_dir(folder.replay)
    return lost


def _has_size(path: Path, chunk: Chunk) -> bool:
    try:
        return path.stat().st_size == chunk.bytes
    except FileNotFoundError:
        return False


def _copy(source: Path, path: Path, chunk: Chunk) -> None:
    with open(source, "rb") as original, atomic.staged(path) as (file, temporary):
        hashed = atomic.HashedFile(file)
        while piece := original.read(1 << 20):
            hashed.write(piece)
        hashed.flush()
        if hashed.sha256 != chunk.sha256:
            raise OSError(f"{source} differs from what its checkpoint says")
    atomic.commit(temporary, path)
