"""Owns what the command line says of checkpoints: the facts of one, and the verdict on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.errors import (
    CheckpointError,
    CheckpointLoadError,
    CheckpointNotFoundError,
    IncompatibleCheckpointError,
)
from sb3_mlflow_ckpt.journal import committed_episodes, saved_facts
from sb3_mlflow_ckpt.layout import RunFolder
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
    """Return the checkpoints that a path names: itself, or those of a run folder."""
    if not path.is_dir():
        return [path]
    folder = RunFolder.at(path)
    # A folder without checkpoints stays in the list, where it is reported as what it is.
    return [path / folder.model(episode).name for episode in committed_episodes(folder)] or [path]


def verdict(path: Path) -> dict[str, str | None]:
    """Return a checkpoint's `status` (ok, missing, incompatible, corrupt, unreadable) and `why`."""
    try:
        verify_checkpoint(path)
    except CheckpointNotFoundError as error:
        return {"status": "missing", "why": str(error)}
    except IncompatibleCheckpointError as error:
        return {"status": "incompatible", "why": error.cause}
    except CheckpointLoadError as error:
        return {"status": "corrupt", "why": error.cause}
    except OSError as error:
        return {"status": "unreadable", "why": error.strerror or str(error)}
    return {"status": "ok", "why": None}
