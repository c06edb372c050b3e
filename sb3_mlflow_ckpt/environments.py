"""Owns the environments: ids -> vectorised environments, resolved lazily, and descriptions of their spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.algorithms import import_object
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.env_state import CheckpointableEnv
from sb3_mlflow_ckpt.env_state.worker import leave_signals_to_the_trainer
from sb3_mlflow_ckpt.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium
    from stable_baselines3.common.vec_env import VecEnv


def make_env(config: TrainingConfig, *, seed: int | None = None) -> VecEnv:
    """Return the vectorised environment that the configuration describes.

    Each environment is `gymnasium.make(env_id)` in a Monitor, then the wrappers, then a CheckpointableEnv; around all
    of them VecNormalize and VecFrameStack in RL Zoo's order.

    Args:
        config: The whole configuration.
        seed: What seeds them, where that is not `config.seed`.

    Raises:
        ConfigError: The environment, an argument of it or a wrapper does not exist.
    """
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

    wrappers = [_wrapper(item) for item in config.env_wrappers]
    if config.vec_env == "subproc":
        # A worker that fails says only that its pipe broke: let a bad id or argument fail here, with its reason.
        _make_single(config.env_id, dict(config.env_kwargs)).close()
    env: VecEnv = make_vec_env(
        partial(_make_single, config.env_id, dict(config.env_kwargs)),
        n_envs=config.n_envs,
        seed=config.seed if seed is None else seed,
        wrapper_class=partial(_wrap, wrappers),
        vec_env_cls=SubprocVecEnv if config.vec_env == "subproc" else DummyVecEnv,
    )
    if config.normalize is not False:
        options = dict(config.normalize) if isinstance(config.normalize, Mapping) else {}
        options.setdefault("gamma", config.hyperparameters.get("gamma", 0.99))
        try:
            env = VecNormalize(env, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError("normalize", f"VecNormalize refuses {options!r}: {error}") from error
    if config.frame_stack > 1:
        env = VecFrameStack(env, n_stack=config.frame_stack)
    return env


def make_checkpointable(
    env_id: str, env_kwargs: Mapping[str, Any], env_wrappers: Sequence[str | Mapping[str, Mapping[str, Any]]]
) -> gymnasium.Env[Any, Any]:
    """Return one environment as `make_env` makes it, without its Monitor.

    Raises:
        ConfigError: The environment, an argument of it or a wrapper does not exist.
    """
    return _wrap([_wrapper(item) for item in env_wrappers], _make_single(env_id, dict(env_kwargs)))


def close_env(env: VecEnv, *, in_a_step: bool) -> None:
    """Close environments, and end the processes that they were in.

    Args:
        env: What `make_env` returned.
        in_a_step: Whether a step may be under way, whose end is not waited for.
    """
    workers = list(getattr(env.unwrapped, "processes", ()))
    try:
        if not (in_a_step and getattr(env.unwrapped, "waiting", False)):
            env.close()
    finally:
        # They do not end on a signal.
        for worker in workers:
            if worker.is_alive():
                worker.kill()


def describe_space(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """Return a space as plain JSON: what two spaces must share for one's policy to fit the other."""
    from gymnasium import spaces

    kind = type(space).__name__
    if isinstance(space, spaces.Dict):
        return {"type": kind, "spaces": {key: describe_space(inner) for key, inner in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": kind, "spaces": [describe_space(inner) for inner in space.spaces]}
    description: dict[str, Any] = {"type": kind, "shape": list(space.shape or ()), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        description |= {"n": int(space.n), "start": int(space.start)}
    elif isinstance(space, spaces.MultiDiscrete):
        description["nvec"] = space.nvec.tolist()
    return description


def _make_single(env_id: str, env_kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make one environment, in the process that will step it."""
    import gymnasium

    leave_signals_to_the_trainer()
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        # ale_py registers its environments when it is imported.
        import_object("ale_py:AtariEnv", "env_id")
    try:
        return gymnasium.make(env_id, **env_kwargs)
    except gymnasium.error.Error as error:
        raise ConfigError("env_id", f"{env_id!r} cannot be made: {str(error).strip()}") from error
    except ImportError as error:
        raise ConfigError("env_id", f"{env_id!r} cannot be imported: {error}") from error
    except TypeError as error:
        raise ConfigError("env_kwargs", f"{env_id!r} refuses {dict(env_kwargs)!r}: {error}") from error


def _wrapper(item: str | Mapping[str, Mapping[str, Any]]) -> tuple[Any, dict[str, Any]]:
    name, arguments = (item, {}) if isinstance(item, str) else next(iter(item.items()), ("", {}))
    if ":" not in name:
        raise ConfigError("env_wrappers", f"{name!r} is not a wrapper", hint="Write it as module:Wrapper")
    return import_object(name, "env_wrappers"), dict(arguments)


def _wrap(wrappers: list[tuple[Any, dict[str, Any]]], env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    for wrapper, arguments in wrappers:
        env = wrapper(env, **arguments)
    return env if is_checkpointable(env) else CheckpointableEnv(env)


def is_checkpointable(env: gymnasium.Env[Any, Any]) -> bool:
    """Return whether a wrapper of an environment captures its state already."""
    return env.has_wrapper_attr("capture_env_state")
