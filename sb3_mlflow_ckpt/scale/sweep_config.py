"""Owns `sweep.yaml`: its fields, and the configuration of each trial. Importing it imports neither Ray nor torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sb3_mlflow_ckpt.config import (
    Integer,
    Layer,
    Number,
    TrainingConfig,
    build_config,
    inheritable_fields,
    nearest,
)
from sb3_mlflow_ckpt.errors import ConfigError, InvalidIdError
from sb3_mlflow_ckpt.layout import check_id
from sb3_mlflow_ckpt.scale.search_space import Distribution

_FOLDER = "sweeps"
THE_SWEEPS_OWN = {
    "seed": "list them under 'seeds:'",
    "run_id": "each trial has an id of its own: give the sweep a 'name:'",
    "run_name": "give the sweep a 'name:'",
    "resume_from_checkpoint": "a sweep that was stopped goes on with --resume",
    "mode": "a sweep trains to its target: give 'total_timesteps:'",
}
"""Settings that each trial has for itself, or the sweep decides, with what to write instead."""
# What is sampled is a setting, or a key of one of these.
_MAPPINGS = ("hyperparameters", "env_kwargs")
# What a checkpoint's tensors have their shape or kind from.
_PERTURBED_NEVER = ("n_steps", "buffer_size", "policy_kwargs", "use_sde", "use_rms_prop")
# Beside the learning rate and the algorithm's arguments: how checkpoints are kept.
_PERTURBED_SETTINGS = (
    "learning_rate",
    "checkpoint_interval_episodes",
    "keep_last_n_checkpoints",
    "keep_best_n",
    "keep_every_n_episodes",
)


class Resources(BaseModel):
    """What each trial takes of the cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: Number = Field(default=1.0, gt=0)
    gpu: Number = Field(default=0.0, ge=0)


class AshaOptions(BaseModel):
    """When ASHA stops trials."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grace_period: Integer | None = Field(default=None, ge=1)
    reduction_factor: Number = Field(default=3.0, gt=1)


class PbtOptions(BaseModel):
    """When population-based training clones, and how it perturbs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perturbation_interval: Integer | None = Field(default=None, ge=1)
    quantile_fraction: Number = Field(default=0.25, gt=0, le=0.5)
    resample_probability: Number = Field(default=0.25, ge=0, le=1)


def _mapping(value: Any) -> Any:
    return {} if value is None else value


class SweepConfig(BaseModel):
    """Everything that decides a sweep. Validated and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("sweep", min_length=1, max_length=80)
    training: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(default_factory=dict)
    seeds: list[Integer] = Field(default_factory=lambda: [0], min_length=1)
    search: Annotated[dict[str, Any], BeforeValidator(_mapping)] = Field(default_factory=dict)
    samples: Integer = Field(1, ge=1)
    metric: Literal["mean_reward", "mean_length"] = "mean_reward"
    goal: Literal["max", "min"] = "max"
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    asha: AshaOptions = AshaOptions()
    pbt: PbtOptions = PbtOptions()
    report_interval_timesteps: Integer = Field(10_000, ge=1)
    concurrency: Integer | None = Field(None, ge=1)
    resources: Resources = Resources()
    max_failures: Integer = Field(3, ge=-1)
    storage_path: str = Field(_FOLDER, min_length=1)

    @property
    def folder(self) -> str:
        """Where what this machine keeps of sweeps lies: the storage path, unless that is an address."""
        return _FOLDER if "://" in self.storage_path else self.storage_path

    @property
    def perturbation_interval(self) -> int:
        """Environment steps between two comparisons of a population."""
        return self.pbt.perturbation_interval or 2 * self.report_interval_timesteps

    @property
    def grace_period(self) -> int:
        """Environment steps that ASHA lets every trial train."""
        return self.asha.grace_period or self.report_interval_timesteps

    @property
    def trials(self) -> int:
        """How many trials there are."""
        grids = (len(distribution.values) for distribution in self.space.values() if distribution.kind == "grid")
        return self.samples * len(self.seeds) * math.prod(grids)

    @property
    def agent_id(self) -> str:
        """The agent whose runs the trials are, whichever algorithm each trains."""
        config = self.trial_config({})
        return f"{self.name}_agent" if config.agent_id is None and "algo" in self.search else config.agent

    @property
    def space(self) -> dict[str, Distribution]:
        """Where the values of each varied setting come from."""
        return {key: Distribution.parse(value) for key, value in self.search.items()}

    def trial_config(self, values: Mapping[str, Any], source: str = "the trial", **own: Any) -> TrainingConfig:
        """Return the configuration of a trial.

        Args:
            values: Its values of the varied settings, by their dotted names.
            source: What an error calls them.
            own: Further settings of this trial alone.

        Raises:
            ConfigError: They make no valid configuration.
        """
        given: dict[str, Any] = dict(own)
        for key, value in values.items():
            name, _, inner = key.partition(".")
            if inner:
                given[name] = {**given.get(name, {}), inner: value}
            else:
                given[name] = value
        return build_config([Layer(source, given), Layer("training", self.training)])


def build_sweep(values: Mapping[str, Any], source: str) -> SweepConfig:
    """Return the sweep that a file describes.

    Args:
        values: What the file holds.
        source: The file, as an error names it.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or impossible.
    """
    for key in values:
        if key not in SweepConfig.model_fields:
            hint = "It goes under 'training:'" if key in TrainingConfig.model_fields else ""
            hint = hint or nearest(str(key)[:80], list(SweepConfig.model_fields))
            raise ConfigError(str(key)[:80], "is not a key of a sweep", source, hint)
    try:
        sweep = SweepConfig.model_validate(values)
    except ValidationError as error:
        raise _config_error(error, values, source) from error
    _check(sweep, source)
    return sweep


def _config_error(error: ValidationError, values: Mapping[str, Any], source: str) -> ConfigError:
    detail = error.errors(include_url=False)[0]
    place = [str(part) for part in detail["loc"]]
    key = ".".join(place)[:80] or "sweep"
    if detail["type"] == "extra_forbidden":
        options = SweepConfig.model_fields[place[0]].annotation
        known = list(getattr(options, "model_fields", {}))
        return ConfigError(key, "is not a key of a sweep", source, nearest(place[-1], known))
    if detail["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
        problem = f"{str(detail['input'])[:80]!r} is not one of {', '.join(allowed)}"
        return ConfigError(key, problem, source, nearest(str(detail["input"]), allowed))
    message = detail["msg"].removeprefix("Value error, ")
    return ConfigError(key, f"{str(detail['input'])[:80]!r} is not valid: {message[0].lower()}{message[1:]}", source)


def _check(sweep: SweepConfig, source: str) -> None:
    """Raise for what no single field tells: names, the training, each end of the search space."""
    try:
        check_id(sweep.name, "name")
    except InvalidIdError as error:
        raise ConfigError("name", str(error).removeprefix("name "), source) from error
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError("seeds", f"{sweep.seeds} names a seed twice", source, "Name each once")
    for key, remedy in THE_SWEEPS_OWN.items():
        if key in sweep.training:
            raise ConfigError(f"training.{key}", "is no setting of a sweep", source, remedy[0].upper() + remedy[1:])
    sweep.trial_config({}, f"{source}, training", **sweep.training)
    for seed in sweep.seeds:
        sweep.trial_config({"seed": seed}, f"{source}, seeds")
    _check_search(sweep, source)


def _check_search(sweep: SweepConfig, source: str) -> None:
    allowed = [name for name in inheritable_fields() if name not in ("agent_id", *THE_SWEEPS_OWN)]
    for key, value in sweep.search.items():
        name, _, inner = key.partition(".")
        if name in THE_SWEEPS_OWN:
            raise ConfigError(f"search.{key}", "is not searched over", source, THE_SWEEPS_OWN[name].capitalize())
        if name in TrainingConfig.model_fields and name not in allowed:
            raise ConfigError(f"search.{key}", "is not searched over", source, "It is the same for all: 'training:'")
        if name not in allowed or (inner and name not in _MAPPINGS):
            known = [*allowed, *(f"{mapping}.name" for mapping in _MAPPINGS)]
            hint = _as_hyperparameter(key, sweep) or nearest(key[:80], known)
            hint = hint or "An argument of the algorithm is hyperparameters.<name>"
            raise ConfigError(f"search.{key}", "is not a setting", source, hint)
        try:
            distribution = Distribution.parse(value)
        except ValueError as error:
            raise ConfigError(f"search.{key}", str(error), source) from error
        for sample in distribution.samples:
            sweep.trial_config({key: sample}, f"{source}, search")
    _check_scheduler(sweep, source)


def _as_hyperparameter(key: str, sweep: SweepConfig) -> str:
    """Return how an argument of the algorithm's constructor is written; empty for what is none."""
    # Only here: it imports torch.
    from sb3_mlflow_ckpt.algorithms import algorithm_class, hyperparameter_names

    try:
        names = hyperparameter_names(algorithm_class(sweep.trial_config({}).algo))
    except ConfigError:
        return ""
    return f"Did you mean 'hyperparameters.{key}'?" if key in names else ""


def _check_scheduler(sweep: SweepConfig, source: str) -> None:
    target = sweep.trial_config({}).total_timesteps
    compared, key = {
        "fifo": (0, ""),
        "asha": (sweep.grace_period, "asha.grace_period"),
        "pbt": (sweep.perturbation_interval, "pbt.perturbation_interval"),
    }[sweep.scheduler]
    if compared > target:
        problem = f"{compared} is more than the {target} steps of a training, so that none is ever compared"
        raise ConfigError(key, problem, source, "Give fewer, or a smaller report_interval_timesteps")
    if sweep.scheduler == "pbt":
        _check_population(sweep, source)


def _check_population(sweep: SweepConfig, source: str) -> None:
    perturbed = {key: d for key, d in sweep.space.items() if d.kind != "grid"}
    if not perturbed:
        raise ConfigError(
            "search", "gives pbt nothing to perturb", source, "Add, say, learning_rate: {loguniform: ...}"
        )
    for key in perturbed:
        name, _, inner = key.partition(".")
        if key not in _PERTURBED_SETTINGS and (name != "hyperparameters" or not inner or inner in _PERTURBED_NEVER):
            hint = f"Set it under 'training:', or write {key}: {{grid: [...]}}"
            raise ConfigError(f"search.{key}", "cannot change within a training, as pbt would have it", source, hint)
    if sweep.trials < 2:
        raise ConfigError("samples", f"{sweep.samples} makes a population of one", source, "Give pbt at least 2")
    if sweep.concurrency is not None and sweep.concurrency < sweep.trials:
        # Tune counts those that wait: the others would begin when the first have ended.
        problem = f"{sweep.concurrency} would split the population of {sweep.trials}"
        raise ConfigError("concurrency", problem, source, "Leave it out; 'resources:' says how many train at once")
