"""Owns the read protocol of a checkpoint: its metadata, and the checks before anything in it is believed.

Imports no torch: listing and verifying must start quickly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointNotFoundError
from sb3_mlflow_ckpt.layout import chunk_path, entry_chunk, metadata_path, model_episode, model_path
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, parse_metadata
from sb3_mlflow_ckpt.state.embedded import read_embedded_metadata


def read_metadata(path: str | Path, *, settle: bool = True) -> CheckpointMetadata:
    """Return the metadata of a committed checkpoint, given its zip or its metadata file; hashes nothing.

    Args:
        path: The zip, or its metadata file.
        settle: Whether to tell, where a crash came while the episode was written anew, which content the zip has.

    Raises:
        CheckpointNotFoundError: There is no metadata file.
        CheckpointCorruptError: It is not valid.
    """
    file = metadata_path(model_path(Path(path)))
    try:
        metadata = parse_metadata(atomic.read_bytes(file), file)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(path, "It has no metadata file, so it was never committed") from error
    except OSError as error:
        raise CheckpointCorruptError(file, f"its metadata cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # A path with a NUL in it.
        raise CheckpointNotFoundError(path, f"It is not a path: {error}") from error
    newer = replacement_of(metadata)
    if newer is None or not settle:
        return metadata
    # A crash came while this episode was written anew: the zip itself says which of the two it is.
    zip_path = model_path(Path(path))
    if not _is(zip_path, Path.is_file):
        raise CheckpointNotFoundError(path, _what_is_there(zip_path))
    return newer if newer.files and atomic.sha256(zip_path) == newer.files[0].sha256 else metadata


def replacement_of(metadata: CheckpointMetadata) -> CheckpointMetadata | None:
    """Return what a checkpoint was being replaced by, or None."""
    replacement = (metadata.model_extra or {}).get("replacement")
    return None if replacement is None else parse_metadata(json.dumps(replacement), f"episode {metadata.episode}")


def verify_checkpoint(path: str | Path) -> CheckpointMetadata:
    """Check everything that can be checked of a checkpoint without loading it, and return its metadata.

    Sizes and hashes are compared with the metadata, and the metadata with what the zip says of itself. A zip
    that was copied without its metadata is checked by its members' CRCs.

    Args:
        path: The zip, or its metadata file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointCorruptError: A file is truncated, altered, or belongs to another checkpoint.
        IncompatibleCheckpointError: The zip was not written by this package.
    """
    zip_path = model_path(Path(path))
    if not _is(zip_path, Path.is_file):
        raise CheckpointNotFoundError(path, _what_is_there(zip_path))
    if not _is(metadata_path(zip_path), Path.exists):
        return read_embedded_metadata(zip_path, check_members=True)
    metadata = read_metadata(zip_path)
    if not metadata.files:
        raise CheckpointCorruptError(zip_path, "its metadata names no files")
    _check_file(zip_path, zip_path, metadata.files[0])
    for entry in metadata.files[1:]:
        name = entry_chunk(entry.name)
        if name is None:
            raise CheckpointCorruptError(
                zip_path, f"its metadata names a file {entry.name!r}, which is none of its own"
            )
        _check_file(zip_path, chunk_path(zip_path.parent, name), entry)
    named = model_episode(zip_path.name)
    if named is not None and named != metadata.episode:
        raise CheckpointCorruptError(
            zip_path, f"its file name says episode {named}, its metadata episode {metadata.episode}"
        )
    inside = read_embedded_metadata(zip_path, check_members=False)
    for key in ("run_id", "agent_id", "algo", "episode", "num_timesteps"):
        if getattr(inside, key) != getattr(metadata, key):
            raise CheckpointCorruptError(
                zip_path,
                f"its metadata says {key} {getattr(metadata, key)!r}, the zip itself {getattr(inside, key)!r}",
            )
    return metadata


def _check_file(zip_path: Path, path: Path, entry: FileEntry) -> None:
    what = "it" if path == zip_path else f"its file {entry.name}"
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointCorruptError(zip_path, f"{what} is missing") from error
    if size != entry.bytes:
        kind = "truncated" if size < entry.bytes else "altered"
        raise CheckpointCorruptError(
            zip_path, f"{what} has {size} bytes, its metadata says {entry.bytes}: it is {kind}"
        )
    if atomic.sha256(path) != entry.sha256:
        whose = "its" if path == zip_path else f"the file {entry.name}: its"
        raise CheckpointCorruptError(zip_path, f"{whose} SHA-256 differs from its metadata's: the content was altered")


def _is(path: Path, test: Callable[[Path], bool]) -> bool:
    """Ask for a file or folder by a name that may be too long to be one."""
    try:
        return test(path)
    except OSError:
        return False


def _what_is_there(path: Path) -> str:
    """Return a sentence that says what lies where a checkpoint was expected."""
    folder = path.parent
    if not _is(folder, Path.is_dir):
        return f"There is no folder {folder}; the path is taken relative to {Path.cwd()}"
    others = sorted(name for name in os.listdir(folder) if model_episode(name) is not None)
    if not others:
        return f"The folder {folder} holds no checkpoints"
    return f"The folder holds {', '.join(others[-5:])}"
