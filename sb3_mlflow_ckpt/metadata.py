"""Owns the schema of `ep000050_metadata.json`: the commit record of one checkpoint. Pure: touches no disk."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticSerializationError

from sb3_mlflow_ckpt import strict_json
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, IncompatibleCheckpointError, InvalidIdError
from sb3_mlflow_ckpt.layout import LARGEST_EPISODE, check_id

FORMAT_VERSION = 1


def timestamp_now() -> str:
    """Return the present as RFC 3339 in UTC with milliseconds: such strings sort by time."""
    return timestamp(time.time())


def timestamp(seconds: float) -> str:
    """Return an instant, in seconds since 1970, in that form."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class FileEntry(BaseModel):
    """One file of a checkpoint: `bytes` and `sha256` are checked before anything in it is read."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    bytes: int = Field(ge=0, le=LARGEST_EPISODE)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ParentReference(BaseModel):
    """The checkpoint that a run was resumed from."""

    model_config = ConfigDict(extra="allow", frozen=True)

    run_id: str
    checkpoint: str
    episode: int = Field(ge=0, le=LARGEST_EPISODE)
    sha256: str | None = None
    timestamp: str | None = None


class CheckpointMetadata(BaseModel):
    """What is known of a checkpoint. The first five fields are the documented ones and never change.

    Unknown keys are kept: a later version may add some.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    episode: int = Field(
        ge=0, le=LARGEST_EPISODE, description="Finished episodes of the whole training, over all environments"
    )
    run_id: str = Field(description="The run that saved it")
    config: dict[str, Any] = Field(description="The run's training configuration")
    timestamp: str = Field(description="When it was captured; RFC 3339, UTC")
    extra_state: dict[str, Any] = Field(default_factory=dict, description="What the caller added; plain JSON")

    format_version: int = Field(default=FORMAT_VERSION, ge=1, description="Version of this schema")
    agent_id: str = Field(description="The agent, as in the folder's name")
    algo: str = Field(description="Name of the algorithm, or `module:Class`")
    num_timesteps: int = Field(ge=0, le=LARGEST_EPISODE, description="Environment steps of the whole training")
    finished_episodes: int = Field(
        default=-1,
        ge=-1,
        le=LARGEST_EPISODE,
        validate_default=True,
        description="Finished episodes at the save: `episode` or more, where several environments ended in one step",
    )
    n_updates: int = Field(default=0, ge=0, le=LARGEST_EPISODE, description="Gradient updates of the whole training")
    trigger: str = Field(default="interval", description="Why it was saved: interval, end, signal, exception, manual")
    files: list[FileEntry] = Field(default_factory=list, description="Name, bytes and SHA-256 of each file")
    versions: dict[str, str] = Field(default_factory=dict, description="Versions of what made it")
    spaces: dict[str, Any] = Field(default_factory=dict, description="The observation and action space")
    parent: ParentReference | None = Field(default=None, description="The checkpoint that its run was resumed from")
    root_run_id: str | None = Field(default=None, description="The first run of the chain of resumes")
    resume_state: dict[str, Any] = Field(
        default_factory=dict, description="What of the training's state is in it, `exact`, and why not"
    )
    metrics: dict[str, float | None] = Field(
        default_factory=dict, description="Mean reward and length of the last episodes"
    )

    @field_validator("finished_episodes")
    @classmethod
    def _at_least_the_label(cls, value: int, info: ValidationInfo) -> int:
        return max(value, int(info.data.get("episode", 0)))

    def to_json(self) -> dict[str, Any]:
        """Return the document as plain JSON values, the documented keys first."""
        return self.model_dump(mode="json")

    def to_text(self, indent: int | None = None) -> str:
        """Return `to_json` as a JSON text, without NaN and infinities."""
        try:
            return self.model_dump_json(indent=indent)
        except PydanticSerializationError:
            # Half of a surrogate pair, say: it is for the caller to encode.
            return json.dumps(self.to_json(), indent=indent, allow_nan=False, ensure_ascii=False)

    def to_bytes(self) -> bytes:
        """Return the content of the metadata file."""
        return (self.to_text(2) + "\n").encode("utf-8", "backslashreplace")


def parse_metadata(content: bytes | str, where: object) -> CheckpointMetadata:
    """Return the validated metadata in a JSON text.

    Args:
        content: The text.
        where: The path or URI that an error names.

    Raises:
        CheckpointCorruptError: It is not the JSON of a checkpoint's metadata.
        IncompatibleCheckpointError: A newer version of this package wrote it.
    """
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise CheckpointCorruptError(where, f"its metadata is not JSON ({error})") from error
    return check_metadata(document, where)


def check_metadata(document: Any, where: object) -> CheckpointMetadata:
    """Return the validated metadata in a JSON document; raises as `parse_metadata` does."""
    if not isinstance(document, dict):
        raise CheckpointCorruptError(where, "its metadata is not a JSON object")
    version = document.get("format_version", FORMAT_VERSION)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise IncompatibleCheckpointError(
            where,
            f"its metadata has format version {version}, this package reads up to {FORMAT_VERSION}",
            "Upgrade sb3-mlflow-ckpt",
        )
    try:
        metadata = CheckpointMetadata.model_validate(document)
        for key in ("agent_id", "run_id"):
            check_id(getattr(metadata, key), key)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:80]
        raise CheckpointCorruptError(where, f"its metadata is not valid at {key!r}: {first['msg'].lower()}") from error
    except InvalidIdError as error:
        raise CheckpointCorruptError(where, f"its metadata is not valid: {error}") from error
    return metadata
