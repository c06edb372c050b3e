"""Owns our JSON member of a checkpoint's zip. Imports no torch: verifying and listing must start quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointLoadError, ForeignCheckpointError
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, check_metadata
from sb3_mlflow_ckpt.state.container import READ_ERRORS, Container, open_container

STATE_MEMBER = "sb3_mlflow_ckpt/state.json"


def dump_state(metadata: CheckpointMetadata, state: str) -> bytes:
    """Return the member's content.

    Args:
        metadata: As it is known inside the zip, without hashes.
        state: What stands beside it: the text of a JSON object that is not empty.
    """
    text = f'{{"metadata": {metadata.to_text()}, {state[1:]}'
    # As in the metadata file: what UTF-8 lacks is written as JSON's own escape.
    return text.encode("utf-8", "backslashreplace")


def read_state(container: Container) -> dict[str, Any]:
    """Return the member's content.

    Raises:
        ForeignCheckpointError: The zip was not written by this package.
        CheckpointCorruptError: The member is not a JSON object.
    """
    if STATE_MEMBER not in container:
        raise ForeignCheckpointError(container.where)
    try:
        state = container.read_json(STATE_MEMBER)
    except READ_ERRORS as error:
        raise CheckpointCorruptError(container.where, f"{STATE_MEMBER} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointCorruptError(container.where, f"{STATE_MEMBER} is not a JSON object")
    return state


def read_embedded_metadata(path: Path, *, check_members: bool) -> CheckpointMetadata:
    """Return the metadata inside a checkpoint's zip.

    Args:
        path: The zip.
        check_members: Whether the CRC of every member is checked too: all that can be, without the hashes.

    Raises:
        ForeignCheckpointError: The zip was not written by this package.
        CheckpointCorruptError: It is no zip, or a member is damaged.
    """
    try:
        with open_container(path) as container:
            if check_members:
                container.check_members()
            return check_metadata(read_state(container).get("metadata"), path)
    except CheckpointLoadError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({error})") from error


def read_part(path: Path, key: str) -> dict[str, Any] | None:
    """Return a mapping within the member, or None where there is none.

    `built` is how the model's constructor would be told, `replay` what the chunks of its buffer are.

    Raises:
        CheckpointLoadError: The zip cannot be read.
    """
    try:
        with open_container(path) as container:
            part = read_state(container).get(key)
    except CheckpointLoadError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({error})") from error
    return part if isinstance(part, dict) else None
