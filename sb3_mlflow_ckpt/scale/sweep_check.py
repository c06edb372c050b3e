"""Owns what is looked at before a sweep starts: that every trial's environment and model can be made."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sb3_mlflow_ckpt.algorithms import algorithm_class, build_model, check_hyperparameters, hyperparameter_names
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.environments import close_env, make_env
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

logger = logging.getLogger(__name__)

# What `make_env` makes other environments by.
_OF_THE_ENVIRONMENT = ("env_id", "env_kwargs", "env_wrappers", "n_envs", "vec_env", "normalize", "frame_stack")


def check_trials(sweep: SweepConfig, *, elsewhere: bool = False) -> None:
    """Make each environment and model that a trial may begin with, as a training does, and let it go again.

    Args:
        sweep: The sweep.
        elsewhere: Whether trials run at other machines: what cannot be made here, they may have.

    Raises:
        ConfigError: A trial would end with it at once.
    """
    _check_arguments(sweep)
    try:
        _make_all(sweep)
    except ConfigError as error:
        if not elsewhere or error.key not in _OF_THE_ENVIRONMENT:
            raise
        logger.warning("%s. The trials are started all the same: where they run, it may be there", error)


def _make_all(sweep: SweepConfig) -> None:
    env: VecEnv | None = None
    made = None
    with warnings.catch_warnings():
        # The trials give them themselves.
        warnings.simplefilter("ignore")
        try:
            for config in _settings(sweep):
                wanted = [getattr(config, name) for name in _OF_THE_ENVIRONMENT]
                if env is None or wanted != made:
                    if env is not None:
                        close_env(env, in_a_step=False)
                    env, made = None, wanted
                    env = make_env(config, seed=0)
                build_model(_light(config), env, seed=0)
        finally:
            if env is not None:
                close_env(env, in_a_step=False)


def _check_arguments(sweep: SweepConfig) -> None:
    """Raise a ConfigError for arguments that an algorithm does not take, or takes as whole numbers only."""
    searched = {key.partition(".")[2]: d for key, d in sweep.space.items() if key.startswith("hyperparameters.")}
    algos = sweep.space["algo"].values if "algo" in sweep.space else [sweep.trial_config({}).algo]
    for algo in algos:
        model_class = algorithm_class(algo)
        check_hyperparameters(model_class, {**sweep.trial_config({"algo": algo}).hyperparameters, **searched})
        types = {name: p.annotation for name, p in inspect.signature(model_class).parameters.items()}
        for name, distribution in searched.items():
            if distribution.is_continuous and types.get(name) in (int, "int"):
                problem = f"{distribution.kind} draws fractions, and {algo} takes whole numbers"
                raise ConfigError(f"search.hyperparameters.{name}", problem, hint="Write randint: [low, high]")


def _settings(sweep: SweepConfig) -> Iterator[TrainingConfig]:
    """Yield settings that trials may begin with: each value of the search space once, beside the others' first."""
    first = {key: distribution.samples[0] for key, distribution in sweep.space.items()}
    yield sweep.trial_config(first)
    for key, distribution in sweep.space.items():
        for value in distribution.samples[1:]:
            yield sweep.trial_config({**first, key: value})


def _light(config: TrainingConfig) -> TrainingConfig:
    """Return a configuration whose model takes no GPU and little memory: both are the trials'."""
    hyperparameters = dict(config.hyperparameters)
    takes_buffer = "buffer_size" in hyperparameter_names(algorithm_class(config.algo))
    if takes_buffer and isinstance(hyperparameters.get("buffer_size", 1), int):
        hyperparameters["buffer_size"] = 1
    return config.model_copy(update={"device": "cpu", "hyperparameters": hyperparameters})
