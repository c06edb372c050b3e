"""Owns what the command line says of checkpoints: the facts of one, and the verdict on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.checkpoints import list_checkpoints
from sb3_mlflow_ckpt.errors import (
    CheckpointError,
    CheckpointLoadError,
    CheckpointNotFoundError,
    IncompatibleCheckpointError,
    InvalidIdError,
)
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import committed_episodes, saved_facts
from sb3_mlflow_ckpt.pins import is_pinned
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's metadata says of it, or why that cannot be read."""
    try:
        metadata = read_metadata(path)
    except CheckpointError as error:
        return {"path": str(path), "error": str(error)}
    return {
        "path": str(path),
        "agent_id": metadata.agent_id,
        "run_id": metadata.run_id,
        **saved_facts(metadata),
        "pinned": is_pinned(path),
    }


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoints that a path names: itself, those of a run folder, of an agent's, or of all agents'."""
    if not path.is_dir():
        return [path]
    try:
        folder = RunFolder.at(path)
    except InvalidIdError:
        return [*list_checkpoints(path)] or [path]
    if not committed_episodes(folder):
        below = [*list_checkpoints(path)] or [*list_checkpoints(path.absolute().parent, agent_id=folder.run_id)]
        if below:
            return below
    # A folder without checkpoints stays in the list, where it is reported as what it is.
    return [path / folder.model(episode).name for episode in committed_episodes(folder)] or [path]


def verdict(path: Path) -> dict[str, Any]:
    """Return a checkpoint's `status` (ok, missing, incompatible, corrupt, unreadable), `why`, and what was hashed."""
    why: str | None = None
    try:
        metadata = verify_checkpoint(path)
    except CheckpointNotFoundError as error:
        status, why = "missing", str(error)
    except IncompatibleCheckpointError as error:
        status, why = "incompatible", error.cause
    except CheckpointLoadError as error:
        status, why = "corrupt", error.cause
    except OSError as error:
        status, why = "unreadable", error.strerror or str(error)
    else:
        # A zip that was copied without its metadata has no hashes: its members' CRCs were checked.
        hashed = {"files": len(metadata.files), "bytes": sum(entry.bytes for entry in metadata.files)}
        return {"status": "ok", "why": None, **hashed}
    return {"status": status, "why": why, "files": None, "bytes": None}
