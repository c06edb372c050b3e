"""Owns the training configuration: its fields, their defaults, and how layers of settings become one.

Pure: reads no file and imports neither torch nor stable-baselines3. Flags, the reference in docs/training.md and
the parameters of MLproject are all made from, or tested against, `TrainingConfig`.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from sb3_mlflow_ckpt.errors import ConfigError, InvalidIdError
from sb3_mlflow_ckpt.layout import check_id
from sb3_mlflow_ckpt.redaction import hidden_in, redact, redact_all
from sb3_mlflow_ckpt.runs.document import plain

ENVIRONMENT_PREFIX = "SB3_MLFLOW_CKPT_"
INHERIT = "inherit"
"""The flag value that stands for "not given": MLproject must pass every parameter, given or not."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LARGEST_WHOLE = 2.0**63
_NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
_SCHEDULE = re.compile(r"lin_(?P<start>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")
_LONGEST_SHOWN = 400
_OWN_SETTINGS = frozenset({"env", "policy", "learning_rate", "seed", "device"})
# What belongs to a machine or to one launch: a resumed run takes these anew, not from the checkpoint.
_PER_LAUNCH: dict[str, Any] = {"per_launch": True}


def _number(value: Any) -> Any:
    """Turn a text such as `1e6` into a number: YAML 1.1 reads `3e-4` as a text, and flags are texts."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        number = float(value)
        # Beyond 2**53 not every integer is a float, nor is such a number a count.
        whole = number.is_integer() and abs(number) <= LARGEST_WHOLE and not set(value) & {".", "-"}
        return int(number) if whole else number
    return value


def _integer(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, bool):
        raise ValueError("is not an integer")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _schedule(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, bool):
        raise ValueError("is not a number")
    if isinstance(value, str) and not _SCHEDULE.fullmatch(value):
        raise ValueError("is neither a number nor a schedule such as lin_3e-4")
    if isinstance(value, (int, float)) and not 0 <= value <= sys.float_info.max:
        raise ValueError("must be a finite number, 0 or greater")
    return float(value) if isinstance(value, int) else value


def _numbers_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _numbers_within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_within(item) for item in value]
    if isinstance(value, str) and _NOT_FINITE.fullmatch(value):
        return float(value.replace(".", ""))
    return _number(value)


Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]


class TrainingConfig(BaseModel):
    """Everything that decides a training run. Validated and immutable.

    `model_fields_set` tells what was given explicitly; the rest is inherited from the checkpoint on a resume.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    mode: Literal["full", "smoke"] = Field(
        "full",
        description="`full` trains to the target; `smoke` is a trial of the same configuration within a minute",
        json_schema_extra=_PER_LAUNCH,
    )
    total_timesteps: Integer = Field(
        1_000_000, ge=1, description="Environment steps of the whole training, over resumes and all environments"
    )
    learning_rate: Annotated[float | str | None, BeforeValidator(_schedule)] = Field(
        None, description="A number, or `lin_3e-4` for a linear decay to 0; unset takes the algorithm's default"
    )
    checkpoint_interval_episodes: Integer = Field(
        50, ge=0, description="Episodes between checkpoints; 0 saves only at the end"
    )
    keep_last_n_checkpoints: Integer = Field(3, ge=0, description="Checkpoints kept on disk; 0 keeps all")
    keep_best_n: Integer = Field(
        0, ge=0, description="Checkpoints of the highest mean reward that are kept beside the last"
    )
    keep_every_n_episodes: Integer = Field(
        0,
        ge=0,
        description="Milestones: the first checkpoint at or after each multiple of it is kept as well; 0 is none",
    )
    checkpoint_dir: str = Field(
        "checkpoints", min_length=1, description="Where run folders are made", json_schema_extra=_PER_LAUNCH
    )
    resume_from_checkpoint: str | None = Field(
        None,
        min_length=1,
        description="A zip, its metadata, a run folder, `runs:/<id>[/checkpoints/ep000100.zip]`, `latest`, "
        "or `auto` (`latest` if there is one, else a new training)",
        json_schema_extra=_PER_LAUNCH,
    )

    resume_own_run: bool = Field(
        False,
        description="Where this very run (run_id, or MLFLOW_RUN_ID) has a checkpoint, on disk or in MLflow, go on from "
        "its newest, whatever resume_from_checkpoint says: for whoever starts one run again and again",
        json_schema_extra=_PER_LAUNCH,
    )
    resume_state: Literal["auto", "exact", "weights"] = Field(
        "auto",
        description="What checkpoints hold and a resume restores: `exact` is everything that decides how training "
        "goes on, `auto` the same but for a replay buffer of over 2 GiB, `weights` only parameters and counters",
        json_schema_extra=_PER_LAUNCH,
    )
    save_replay_buffer: Literal["auto", "always", "never"] = Field(
        "auto", description="Whether checkpoints hold the replay buffer; `auto` up to a full capacity of 2 GiB"
    )
    trust_checkpoint: bool = Field(
        False,
        description="Unpickle what the checkpoint holds: that can run any code, so only of a file that you trust",
        json_schema_extra=_PER_LAUNCH,
    )

    algo: str = Field(
        "ppo", min_length=1, description="An algorithm of SB3 or sb3-contrib by its lower-case name, or `module:Class`"
    )
    policy: str | None = Field(
        None, description="Policy alias such as `MlpPolicy`, or `module:Class`; unset is chosen by the observations"
    )
    hyperparameters: dict[str, Any] = Field(
        default_factory=dict, description="Anything that the algorithm's constructor takes"
    )
    env_id: str = Field("CartPole-v1", min_length=1, description="A gymnasium id, also `module:Id-v0`")
    env_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the environment")
    env_wrappers: list[str | dict[str, dict[str, Any]]] = Field(
        default_factory=list, description="`module:Wrapper` of each environment, innermost first, or `{name: kwargs}`"
    )
    n_envs: Integer = Field(1, ge=1, description="Parallel environments")
    vec_env: Literal["dummy", "subproc"] = Field(
        "dummy", description="`dummy` steps environments in this process, `subproc` in one process each"
    )
    normalize: bool | dict[str, Any] = Field(False, description="VecNormalize: `true`, or a mapping of its arguments")
    frame_stack: Integer = Field(1, ge=1, description="Observations that are stacked (VecFrameStack); 1 stacks none")
    seed: Annotated[int | None, BeforeValidator(_integer)] = Field(
        None, ge=0, lt=2**32, description="Seed of everything random; unset draws one"
    )
    device: str = Field("auto", min_length=1, description="PyTorch device", json_schema_extra=_PER_LAUNCH)

    agent_id: str | None = Field(None, description="Folder of the agent; unset is `<algo>_agent`")
    run_id: str | None = Field(
        None, description="Folder of the run; unset is the MLflow run's id", json_schema_extra=_PER_LAUNCH
    )
    run_name: str | None = Field(None, description="What MLflow and lists call the run", json_schema_extra=_PER_LAUNCH)

    mlflow: bool = Field(True, description="Track the run in MLflow", json_schema_extra=_PER_LAUNCH)
    tracking_uri: str | None = Field(
        None,
        description="MLflow tracking URI; unset is MLflow's own setting (MLFLOW_TRACKING_URI, else a local sqlite)",
        json_schema_extra=_PER_LAUNCH,
    )
    experiment_name: str | None = Field(
        None, description="MLflow experiment; unset is MLflow's own setting", json_schema_extra=_PER_LAUNCH
    )
    mlflow_keep_last_n_checkpoints: Integer = Field(
        0, ge=0, description="Checkpoints kept as MLflow artifacts; 0 keeps all"
    )
    mongo_uri: str | None = Field(
        None, description="MongoDB that run records are mirrored to; unset is none", json_schema_extra=_PER_LAUNCH
    )
    mongo_db: str = Field(
        "sb3_mlflow_ckpt", min_length=1, description="Database of the run records", json_schema_extra=_PER_LAUNCH
    )
    heartbeat_seconds: Number = Field(
        10.0, gt=0, le=3600, description="How often the record says that the run lives", json_schema_extra=_PER_LAUNCH
    )
    start_offline: bool = Field(
        False,
        description="Train even if MLflow or MongoDB does not answer at the start, and send the records later",
        json_schema_extra=_PER_LAUNCH,
    )
    sync_timeout_seconds: Number = Field(
        60.0,
        ge=0,
        description="How long the end of a run waits for a mirror that is behind",
        json_schema_extra=_PER_LAUNCH,
    )
    grace_seconds: Number = Field(
        30.0,
        gt=0,
        le=86_400,
        description="The longest time from a signal (SIGTERM, Ctrl-C, SIGUSR1) to the end of the process",
        json_schema_extra=_PER_LAUNCH,
    )
    max_unmirrored_checkpoints: Integer = Field(
        50,
        ge=1,
        description="Checkpoints that an outage of MLflow may keep on disk beyond keep_last_n_checkpoints",
        json_schema_extra=_PER_LAUNCH,
    )
    on_save_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="What a checkpoint that cannot be written does to the training",
        json_schema_extra=_PER_LAUNCH,
    )

    @field_validator("hyperparameters", mode="before")
    @classmethod
    def _check_hyperparameters(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key in _OWN_SETTINGS:
                    own = "env_id" if key == "env" else key
                    raise ValueError(f"holds {key!r}, which is a setting of its own: write '{own}:' beside it")
            return _numbers_within(value)
        return value

    @field_validator("checkpoint_dir")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        # `--checkpoint-dir=~/x` reaches us as it is: the shell expands `~` only at the start of a word.
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @field_validator("agent_id", "run_id")
    @classmethod
    def _check_id(cls, value: str | None, info: Any) -> str | None:
        if value is not None:
            try:
                check_id(value, info.field_name)
            except InvalidIdError as error:
                raise ValueError(str(error).removeprefix(f"{info.field_name} {value!r} ")) from error
        return value

    @property
    def agent(self) -> str:
        """The agent's id: as given, else `<algo>_agent`."""
        return self.agent_id or f"{self.algo.rpartition(':')[2].lower()}_agent"

    @property
    def own_run_id(self) -> str | None:
        """The id of the run that this launch is of, where it was named before: by `run_id`, or by `mlflow run`."""
        return self.run_id or (os.environ.get("MLFLOW_RUN_ID") if self.mlflow else None) or None

    def inherit(self, parent: Mapping[str, Any]) -> TrainingConfig:
        """Return this configuration with what was not given explicitly taken from a checkpoint's.

        Mappings merge key by key. Settings that belong to one launch are not inherited, nor are keys that this
        version does not know.

        Args:
            parent: The checkpoint's `config`.

        Raises:
            ConfigError: A value of the parent is not valid.
        """
        own = {key: getattr(self, key) for key in self.model_fields_set}
        inherited = {key: parent[key] for key in inheritable_fields() if parent.get(key) is not None}
        for name in hidden_settings(inherited, own):
            raise ConfigError(
                name,
                "looked like a credential and was not recorded",
                "the checkpoint's config",
                f"Give it again: {_flag(name)}",
            )
        return build_config([Layer("the settings given", own), Layer("the checkpoint's config", inherited)])

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a record stores it: plain JSON, without credentials."""
        document: dict[str, Any] = redact_all(plain(self.model_dump()))
        document["agent_id"] = self.agent
        return document


def inheritable_fields() -> list[str]:
    """Return the names of the settings that a resumed run takes from its checkpoint."""
    return [name for name, info in TrainingConfig.model_fields.items() if info.json_schema_extra is not _PER_LAUNCH]


def hidden_settings(config: Mapping[str, Any], own: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """Return the settings of a recorded configuration that lack a credential, as far as `own` does not give them."""
    names = []
    for name, value in config.items():
        given = own.get(name)
        if isinstance(value, Mapping):
            keys = given if isinstance(given, Mapping) else ()
            names += [f"{name}.{key}" for key, item in value.items() if key not in keys and hidden_in(item)]
        elif given is None and hidden_in(value):
            names.append(name)
    return names


@dataclass(frozen=True)
class Layer:
    """Settings from one place.

    Attributes:
        source: What an error calls the place.
        values: The settings.
        labels: A more exact name of the place for some keys (the flag, say).
    """

    source: str
    values: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)

    def label(self, key: str) -> str:
        return self.labels.get(key, self.source)


def build_config(layers: Sequence[Layer]) -> TrainingConfig:
    """Return the configuration that layers of settings make, the first layer winning.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or impossible; the message names the key,
            the value, where it came from and the nearest valid name.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.values.items():
            _check_key(key, layer)
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = {**value, **merged[key]}
                sources |= {f"{key}.{inner}": layer.label(key) for inner in value if f"{key}.{inner}" not in sources}
            elif key not in merged:
                merged[key] = value
                sources[key] = layer.label(key)
                if isinstance(value, Mapping):
                    sources |= {f"{key}.{inner}": layer.label(key) for inner in value}
    try:
        return TrainingConfig.model_validate(merged)
    except ValidationError as error:
        raise _config_error(error.errors(include_url=False)[0], merged, sources) from error


def nearest(name: str, names: Sequence[str]) -> str:
    """Return a sentence that names the valid name nearest to a wrong one, or all of a short list."""
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}" if len(names) <= 20 else ""


def schedule_start(value: str) -> float:
    """Return the initial value of a schedule such as `lin_3e-4`, which decays linearly to 0.

    Raises:
        ValueError: The text is no schedule.
    """
    match = _SCHEDULE.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a schedule such as lin_3e-4")
    return float(match["start"])


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what differs between two configurations as `{dotted key: {"from": ..., "to": ...}}`.

    Only settings that a resume inherits count: where a run writes to is not what it trains. A setting that
    `before` does not know (an older version wrote it) counts as unchanged.
    """
    keys = [key for key in inheritable_fields() if key in before or isinstance(after.get(key), Mapping)]
    old, new = (dict(_flat({key: config.get(key, {}) for key in keys})) for config in (before, after))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: {"from": old.get(key), "to": new.get(key)} for key in changed}


def _flag(name: str) -> str:
    setting, _, key = name.partition(".")
    return f"--{setting.replace('_', '-')}" + (f" {key}=..." if key else " ...")


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with nested mappings as dotted keys."""
    return dict(_flat(config))


def _check_key(key: Any, layer: Layer) -> None:
    if key not in TrainingConfig.model_fields:
        hint = nearest(key[:80], list(TrainingConfig.model_fields)) if isinstance(key, str) else ""
        hint = hint or "Settings of the algorithm's own constructor go under 'hyperparameters:'"
        # A key with a line break in it must not break the one line of the error.
        shown = _shown(key) if not isinstance(key, str) else key if key.isprintable() else repr(key)
        raise ConfigError(shown[:_LONGEST_SHOWN], "is not a setting", layer.label(key), hint)


def _shown(value: Any) -> str:
    try:
        text = redact(repr(value))
    except (ValueError, RecursionError):
        return f"a value of the type {type(value).__name__}"  # An integer of more digits than Python writes out.
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _config_error(detail: ErrorDetails, merged: Mapping[str, Any], sources: Mapping[str, str]) -> ConfigError:
    key = str(detail["loc"][0]) if detail["loc"] else "config"
    value = merged.get(key)
    shown = _shown(value)
    source = sources.get(key, "")
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
        return ConfigError(key, f"{shown} is not one of {', '.join(allowed)}", source, nearest(str(value), allowed))
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return ConfigError(key, f"{shown} {message}", source)
    return ConfigError(key, f"{shown} is not valid: {message[0].lower()}{message[1:]}", source)
