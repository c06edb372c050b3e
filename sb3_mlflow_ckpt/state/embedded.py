"""Owns our JSON member of a checkpoint's zip. Imports no torch: verifying and listing must start quickly."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, IncompatibleCheckpointError
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, parse_metadata

STATE_MEMBER = "sb3_mlflow_ckpt/state.json"
READ_ERRORS = (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError, RuntimeError, NotImplementedError)


def dump_state(metadata: CheckpointMetadata, state: dict[str, Any]) -> str:
    """Return the member's content: the metadata as it is known inside the zip (no hashes), and the state."""
    return json.dumps({"metadata": metadata.to_json(), **state}, ensure_ascii=False)


def read_state(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    """Return the member's content.

    Raises:
        IncompatibleCheckpointError: The zip was not written by this package.
        CheckpointCorruptError: The member is not a JSON object.
    """
    if STATE_MEMBER not in archive.namelist():
        raise IncompatibleCheckpointError(
            path,
            "it was not written by sb3_mlflow_ckpt: its configuration and counters are unknown",
            "Load its weights with the algorithm's own load(), for example PPO.load(path)",
        )
    state = json.loads(archive.read(STATE_MEMBER))
    if not isinstance(state, dict):
        raise CheckpointCorruptError(path, f"{STATE_MEMBER} is not a JSON object")
    return state


def read_embedded_metadata(path: Path, *, check_members: bool) -> CheckpointMetadata:
    """Return the metadata inside a checkpoint's zip.

    Args:
        path: The zip.
        check_members: Whether the CRC of every member is checked too: all that can be, without the hashes.

    Raises:
        IncompatibleCheckpointError: The zip was not written by this package.
        CheckpointCorruptError: It is no zip, or a member is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if check_members else None
            if damaged is not None:
                raise CheckpointCorruptError(path, f"its member {damaged!r} is damaged")
            return parse_metadata(json.dumps(read_state(archive, path).get("metadata")), path)
    except (CheckpointCorruptError, IncompatibleCheckpointError):
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({error})") from error
