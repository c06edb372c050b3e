"""Owns the state of vectorised environments: their layers here, each environment in the process that steps it.

Statistics of VecNormalize are kept with the weights as well (`normalization`): a policy is nothing without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from sb3_mlflow_ckpt.env_state import CheckpointableEnv
from sb3_mlflow_ckpt.state import normalization

State = dict[str, Any]


def capture(env: VecEnv) -> tuple[State, str | None]:
    """Return the state of every layer and environment, and why that is not all of it (None if it is)."""
    layers, reason = [], None
    for layer in _layers(env):
        taken = _capture_layer(layer)
        if taken is None:
            reason = reason or f"the state of {type(layer).__name__} is not known"
        layers.append({"class": type(layer).__name__, "state": taken})
    environments: list[State] | None = None
    problem = _not_outermost(env)
    if problem is not None:
        reason = reason or problem
    else:
        # In this process, environments may hand out what they go on using.
        environments = copy.deepcopy(env.env_method("capture_env_state"))
        missed = [f"environment {index}: {state['reason']}" for index, state in enumerate(environments)
                  if state.get("reason")]  # fmt: skip
        reason = reason or (missed[0] if missed else None)
    return {"layers": layers, "environments": environments}, reason


def restore(env: VecEnv, state: Mapping[str, Any]) -> str | None:
    """Bring layers and environments to where they were; return why that failed, or None.

    After a failure the caller resets them all: some may have been restored.
    """
    layers, environments = list(_layers(env)), state.get("environments")
    saved = state.get("layers")
    names = [type(layer).__name__ for layer in layers]
    if not isinstance(saved, list) or [layer.get("class") for layer in saved] != names:
        return f"the environments' layers were others than {', '.join(names) or 'none'}"
    if not isinstance(environments, list) or len(environments) != env.num_envs:
        count = len(environments) if isinstance(environments, list) else 0
        return f"the checkpoint holds {count} environments, this run has {env.num_envs}"
    problem = _not_outermost(env)
    if problem is not None:
        return problem
    for index, environment in enumerate(environments):
        (reason,) = env.env_method("restore_env_state", environment, indices=index)
        if reason is not None:
            return f"environment {index}: {reason}"
    for layer, taken in zip(layers, saved, strict=True):
        if taken["state"] is None:
            return f"the state of {type(layer).__name__} is not known"
        try:
            _restore_layer(layer, taken["state"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return f"the state of {type(layer).__name__} does not fit: {error}"
    return None


def _not_outermost(env: VecEnv) -> str | None:
    """Return why the environments cannot be asked for all of their state, or None."""
    base = env.unwrapped
    if type(base) not in (DummyVecEnv, SubprocVecEnv):
        return f"the state of {type(base).__name__} is not known"
    if not all(env.env_is_wrapped(CheckpointableEnv)):
        return "its environments are not wrapped in CheckpointableEnv"
    # Every other question passes through the wrappers; the answer to this one can be sent between processes.
    if set(env.get_attr("__module__")) != {CheckpointableEnv.__module__}:
        return "its environments have wrappers outside of CheckpointableEnv, which must be the outermost one"
    return None


def _layers(env: VecEnv) -> Iterator[VecEnvWrapper]:
    while isinstance(env, VecEnvWrapper):
        yield env
        env = env.venv


def _own(layer: VecEnvWrapper, name: str) -> Callable[..., Any] | None:
    # Asked of the class: a VecEnvWrapper answers for the layers beneath it.
    return getattr(layer, name) if hasattr(type(layer), name) else None


def _capture_layer(layer: VecEnvWrapper) -> State | None:
    own = _own(layer, "get_checkpoint_state")
    if own is not None:
        return {"own": copy.deepcopy(own())}
    if type(layer) is VecNormalize:
        return {
            # Again, though they are kept with the weights: `learn` resets the environments, which adds to them.
            "statistics": normalization.capture(layer)[1],
            "old_obs": _copy(getattr(layer, "old_obs", None)),
            "old_reward": np.array(layer.old_reward),
        }
    if type(layer) is VecFrameStack:
        return {"stacked": [part.stacked_obs.copy() for part in _stacks(layer.stacked_obs)]}
    if type(layer) is VecMonitor:
        if layer.results_writer is not None:
            layer.results_writer.file_handler.flush()
        return {
            "episode_returns": layer.episode_returns.copy(),
            "episode_lengths": layer.episode_lengths.copy(),
            "episode_count": layer.episode_count,
        }
    if type(layer) in (VecTransposeImage, VecExtractDictObs, VecCheckNan, VecVideoRecorder):
        return {}
    return None


def _restore_layer(layer: VecEnvWrapper, state: Mapping[str, Any]) -> None:
    own = _own(layer, "set_checkpoint_state")
    if own is not None:
        own(state["own"])
    elif isinstance(layer, VecNormalize):
        normalization.restore(layer, state["statistics"])
        layer.old_reward = np.array(state["old_reward"])
        if state["old_obs"] is not None:
            layer.old_obs = state["old_obs"]
    elif isinstance(layer, VecFrameStack):
        for part, stacked in zip(_stacks(layer.stacked_obs), state["stacked"], strict=True):
            part.stacked_obs = _like(part.stacked_obs, stacked)
    elif isinstance(layer, VecMonitor):
        layer.episode_returns = _like(layer.episode_returns, state["episode_returns"])
        layer.episode_lengths = _like(layer.episode_lengths, state["episode_lengths"])
        layer.episode_count = int(state["episode_count"])


def _stacks(stacked: StackedObservations[Any]) -> list[StackedObservations[Any]]:
    within = getattr(stacked, "sub_stacked_observations", None)
    return list(within.values()) if within else [stacked]


def _like(present: Any, saved: Any) -> Any:
    if not isinstance(saved, np.ndarray) or saved.shape != np.shape(present) or saved.dtype != present.dtype:
        raise ValueError(f"an array of shape {np.shape(present)} was expected, it is {np.shape(saved)}")
    return saved.copy()


def _copy(observations: Any) -> Any:
    if isinstance(observations, dict):
        return {key: np.array(value) for key, value in observations.items()}
    return None if observations is None else np.array(observations)
