"""Owns what `mlflow run --backend ray --backend-config ray.json` may say. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sb3_mlflow_ckpt.config import nearest
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.redaction import redact

SOURCE = "the backend configuration"
_LONGEST_SHOWN = 100


def _number(value: Any) -> Any:
    # In JSON true is no number; in Python it is 1.
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


_Amount = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class RaySettings(BaseModel):
    """The keys of `ray.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    address: str | None = Field(
        None,
        description="The cluster's dashboard, such as `http://head:8265`; unset is RAY_ADDRESS, else a cluster of this "
        "machine alone is started and lives as long as the command",
    )
    max_retries: Annotated[int, BeforeValidator(_number)] = Field(
        3,
        ge=-1,
        description="How often the trainer is started again after the death of its node, its worker or itself; -1 is "
        "without end",
    )
    num_cpus: _Amount = Field(1, description="CPUs that the training takes of a node")
    num_gpus: _Amount = Field(0, description="GPUs that it takes; with 0 it sees none")
    resources: dict[str, _Amount] = Field(
        default_factory=dict, description="Other resources that it takes, by the names that the cluster gives them"
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description="As Ray takes it (`env_vars`, `excludes`, `pip`, ...). The project's folder is the `working_dir` "
        "where none is given",
    )
    grace_seconds: Annotated[float, BeforeValidator(_number)] = Field(
        45,
        gt=0,
        le=86_400,
        description="How long a cancelled trainer may take to end; more than its own `--grace-seconds`",
    )


def parse_settings(given: Any) -> RaySettings:
    """Return the settings of a backend configuration.

    Raises:
        ConfigError: It is no JSON object, a key is unknown, or a value is of the wrong type or impossible.
    """
    if not isinstance(given, Mapping):
        kind = "a list" if isinstance(given, list) else repr(given)[:_LONGEST_SHOWN]
        raise ConfigError("backend_config", f"is {kind}, not a JSON object", SOURCE, 'Write {"max_retries": 3}')
    for key in given:
        if key not in RaySettings.model_fields:
            names = list(RaySettings.model_fields)
            raise ConfigError(str(key)[:_LONGEST_SHOWN], "is not a key", SOURCE, nearest(str(key)[:80], names))
    try:
        return RaySettings.model_validate(dict(given))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in detail["loc"])
        shown = redact(repr(detail["input"]))[:_LONGEST_SHOWN]
        message = detail["msg"].removeprefix("Value error, ").removeprefix("is ")
        raise ConfigError(name, f"{shown} is not valid: {message[0].lower()}{message[1:]}", SOURCE) from error
