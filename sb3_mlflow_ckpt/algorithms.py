"""Owns the algorithms: names -> classes, resolved lazily, and models built from a configuration."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt.config import TrainingConfig, nearest, schedule_start
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.short_names import SHORT_NAMES

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

ALGORITHMS: Mapping[str, str] = {
    "a2c": "stable_baselines3:A2C",
    "ddpg": "stable_baselines3:DDPG",
    "dqn": "stable_baselines3:DQN",
    "ppo": "stable_baselines3:PPO",
    "sac": "stable_baselines3:SAC",
    "td3": "stable_baselines3:TD3",
    "ars": "sb3_contrib:ARS",
    "crossq": "sb3_contrib:CrossQ",
    "maskable_ppo": "sb3_contrib:MaskablePPO",
    "qrdqn": "sb3_contrib:QRDQN",
    "recurrent_ppo": "sb3_contrib:RecurrentPPO",
    "tqc": "sb3_contrib:TQC",
    "trpo": "sb3_contrib:TRPO",
}
"""Every algorithm of SB3 and sb3-contrib. HER is `hyperparameters: {replay_buffer_class: HerReplayBuffer}`."""

_NOT_DESCRIBED = frozenset({"policy", "env", "device", "verbose", "tensorboard_log", "_init_setup_model"})
_NORMALIZE = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon")
_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf", "delta_std")


def import_object(reference: str, key: str) -> Any:
    """Return what `module:Name` names.

    Raises:
        ConfigError: The module cannot be imported or lacks the name; `key` is the setting that is blamed.
    """
    module_name, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(key, f"{reference!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise ConfigError(key, f"{module_name!r} has no {name!r}") from error


def algorithm_class(algo: str) -> type[BaseAlgorithm]:
    """Return the class of an algorithm's name (`ppo`, `recurrent_ppo`, ...) or `module:Class`.

    Raises:
        ConfigError: No such algorithm; the nearest name is in the message.
    """
    from stable_baselines3.common.base_class import BaseAlgorithm

    if ":" in algo:
        found = import_object(algo, "algo")
    elif algo.lower() in ALGORITHMS:
        found = import_object(ALGORITHMS[algo.lower()], "algo")
    else:
        hint = nearest(algo, list(ALGORITHMS)) + " A class of your own is written module:Class"
        raise ConfigError("algo", f"{algo!r} is not an algorithm", hint=hint)
    if not (inspect.isclass(found) and issubclass(found, BaseAlgorithm)):
        raise ConfigError("algo", f"{algo!r} is not a subclass of stable_baselines3's BaseAlgorithm")
    return found


def algorithm_name(model_class: type) -> str:
    """Return the name that `algorithm_class` turns back into this class."""
    for name, reference in ALGORITHMS.items():
        module, _, class_name = reference.partition(":")
        if model_class.__name__ == class_name and model_class.__module__.split(".")[0] == module:
            return name
    return f"{model_class.__module__}:{model_class.__qualname__}"


def default_learning_rate(model_class: type[BaseAlgorithm]) -> float | None:
    """Return the learning rate that an algorithm's constructor takes by default, if that is a number."""
    parameter = inspect.signature(model_class).parameters.get("learning_rate")
    return float(parameter.default) if parameter and isinstance(parameter.default, (int, float)) else None


def describe_model(model: BaseAlgorithm, *, total_timesteps: int | None = None) -> dict[str, Any]:
    """Return the training configuration that can be read off a model that somebody else built.

    SB3 keeps its constructor's arguments as attributes of the same names. What is no plain value, class or linear
    schedule to 0 is named under `undescribed`: a resume cannot know it.
    """
    built = describe_constructor(model)
    hyperparameters, undescribed = built["hyperparameters"], built["undescribed"]
    env = model.get_env()
    normalized = model.get_vec_normalize_env()
    # Not asked of environments in other processes: what cannot be pickled there breaks their pipe.
    spec = getattr(getattr(env.unwrapped, "envs", [None])[0], "spec", None) if env is not None else None
    described = {
        "algo": algorithm_name(type(model)),
        "total_timesteps": total_timesteps,
        "learning_rate": built["learning_rate"],
        "policy": built["policy"],
        "env_id": spec.id if spec is not None else None,
        "n_envs": model.n_envs,
        "normalize": {name: getattr(normalized, name) for name in _NORMALIZE} if normalized is not None else False,
        "seed": built["seed"],
        "hyperparameters": hyperparameters,
    }
    return {**described, "undescribed": undescribed} if undescribed else described


def describe_constructor(model: BaseAlgorithm, attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a model's constructor would be told to build it again.

    Args:
        model: Any SB3 algorithm.
        attributes: Values in place of the model's own, for attributes that are changed for a while.

    Returns:
        `policy`, `learning_rate`, `seed`, `hyperparameters`, and `undescribed`: the arguments without a plain form.
    """
    hyperparameters, undescribed = {}, []
    for name in _parameters(type(model)):
        if name in _NOT_DESCRIBED or not hasattr(model, name):
            continue
        value = (attributes or {}).get(name, getattr(model, name))
        try:
            hyperparameters[name] = _describe(value)
        except ValueError:
            undescribed.append(name)
    if str(hyperparameters.get("replay_buffer_class")).endswith(":NStepReplayBuffer"):
        # SB3 chooses it where n_steps asks for it, and tells it what it needs.
        for name in ("replay_buffer_class", "replay_buffer_kwargs"):
            hyperparameters.pop(name, None)
    return {
        "policy": f"{type(model.policy).__module__}:{type(model.policy).__qualname__}",
        "learning_rate": hyperparameters.pop("learning_rate", None),
        "seed": hyperparameters.pop("seed", None),
        "hyperparameters": {name: value for name, value in hyperparameters.items() if value is not None},
        "undescribed": undescribed,
    }


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind).parameters)


def _describe(value: Any) -> Any:
    """Return a constructor's argument as a configuration writes it; ValueError where it cannot."""
    from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

    if isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        return value.val
    if isinstance(value, LinearSchedule) and value.end == 0 and value.end_fraction == 1:
        return f"lin_{value.start}"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # TrainFreq
        return [getattr(item, "value", item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # SAC's target_entropy
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{value!r} has no plain form")


def default_policy(model_class: type[BaseAlgorithm], env: VecEnv | Spaces) -> str:
    """Return the policy alias that fits the observations: dictionary, image, or vector."""
    from gymnasium import spaces
    from stable_baselines3.common.preprocessing import is_image_space

    space = env.observation_space
    if isinstance(space, spaces.Dict):
        kind = "MultiInput"
    elif is_image_space(space):
        kind = "Cnn"
    else:
        kind = "Mlp"
    aliases = list(model_class.policy_aliases)
    fitting = [alias for alias in aliases if alias.startswith(kind)]
    if not fitting:
        raise ConfigError(
            "policy", f"{model_class.__name__} has no {kind}Policy for these observations", hint=f"It has {aliases}"
        )
    return fitting[0]


def hyperparameter_names(model_class: type[BaseAlgorithm]) -> list[str]:
    """Return the arguments that an algorithm's constructor names, and that may be given to it."""
    return [name for name in _parameters(model_class) if name not in ("env", "policy", "_init_setup_model")]


def check_hyperparameters(model_class: type[BaseAlgorithm], hyperparameters: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a name that the algorithm's constructor does not take."""
    parameters = inspect.signature(model_class).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    known = hyperparameter_names(model_class)
    for name in hyperparameters:
        if name not in known:
            raise ConfigError(
                f"hyperparameters.{name}",
                f"{model_class.__name__} takes no such argument",
                hint=nearest(name, known) or f"It takes {', '.join(known)}",
            )


class Spaces(NamedTuple):
    """What a model is built from where there is no environment: it can predict, and be given one later."""

    observation_space: Any
    action_space: Any
    num_envs: int = 1


def build_model(config: TrainingConfig, env: VecEnv | Spaces, *, seed: int | None = None) -> BaseAlgorithm:
    """Return a fresh model as the configuration describes it.

    Args:
        config: The whole configuration.
        env: The environments that it trains in, or only their spaces.
        seed: What seeds it, where that is not `config.seed` (a resumed run must not replay old randomness).

    Raises:
        ConfigError: A hyperparameter is unknown or the constructor refuses its value.
    """
    model_class = algorithm_class(config.algo)
    check_hyperparameters(model_class, config.hyperparameters)
    arguments = {key: _value(key, value, env) for key, value in copy.deepcopy(config.hyperparameters).items()}
    if config.learning_rate is not None:
        arguments["learning_rate"] = _value("learning_rate", config.learning_rate, env)
    policy: Any = config.policy or default_policy(model_class, env)
    if ":" in policy:
        policy = import_object(policy, "policy")
    elif policy not in model_class.policy_aliases:
        raise ConfigError(
            "policy",
            f"{policy!r} is no policy of {model_class.__name__}",
            hint=nearest(policy, list(model_class.policy_aliases)),
        )
    arguments |= {"policy": policy, "seed": config.seed if seed is None else seed, "device": config.device}
    try:
        if isinstance(env, Spaces):
            return _build_without_env(model_class, env, arguments)
        return model_class(env=env, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, MemoryError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError("hyperparameters", f"{model_class.__name__} refuses the configuration: {reason}") from error


def _build_without_env(model_class: type[BaseAlgorithm], given: Spaces, arguments: Mapping[str, Any]) -> BaseAlgorithm:
    model: Any = model_class(env=None, _init_setup_model=False, **arguments)  # type: ignore[call-arg]
    model.observation_space, model.action_space, model.n_envs = given
    hindsight = getattr(getattr(model, "replay_buffer_class", None), "__name__", "") == "HerReplayBuffer"
    if hindsight:
        # It asks its environment for rewards; a model that only predicts needs no rewards.
        described, model.replay_buffer_class = (model.replay_buffer_class, model.replay_buffer_kwargs), None
        model.replay_buffer_kwargs = {}
    model._setup_model()
    if hindsight:
        model.replay_buffer_class, model.replay_buffer_kwargs = described
        model.replay_buffer = None
    return model  # type: ignore[no-any-return]


def _value(key: str, value: Any, env: VecEnv | Spaces) -> Any:
    """Turn a plain value of the configuration into the object that a constructor takes."""
    if isinstance(value, str):
        if _OBJECT.fullmatch(value):
            return import_object(value, f"hyperparameters.{key}")
        if key in SHORT_NAMES:
            return _short_name(key, value)
        if key in _SCHEDULED:
            return _linear_schedule(key, value)
        return value
    if key == "action_noise" and isinstance(value, Mapping):
        return _action_noise(value, env)
    if key == "train_freq" and isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping):
        return {inner: _value(inner, item, env) for inner, item in value.items()}
    return value


def _short_name(key: str, value: str) -> Any:
    for module_name in SHORT_NAMES[key]:
        found = getattr(importlib.import_module(module_name), value.removeprefix("nn."), None)
        if found is not None:
            return found
    raise ConfigError(f"hyperparameters.{key}", f"{value!r} is not known", hint="Write it as module:Class")


def _linear_schedule(key: str, value: str) -> Any:
    from stable_baselines3.common.utils import LinearSchedule

    try:
        # SB3's own class: a checkpoint with it loads where this package is not installed, and beyond the
        # target (on-policy algorithms overshoot it) it stays at its end value.
        return LinearSchedule(start=schedule_start(value), end=0.0, end_fraction=1.0)
    except ValueError as error:
        raise ConfigError(f"hyperparameters.{key}", str(error)) from error


def _action_noise(value: Mapping[str, Any], env: VecEnv | Spaces) -> Any:
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

    kinds = {"normal": NormalActionNoise, "ornstein-uhlenbeck": OrnsteinUhlenbeckActionNoise}
    kind, sigma = value.get("type", "normal"), value.get("sigma", 0.1)
    if kind not in kinds or set(value) - {"type", "sigma"} or not isinstance(sigma, (int, float)):
        raise ConfigError(
            "hyperparameters.action_noise", f"{dict(value)!r} is not valid", hint="Write {type: normal, sigma: 0.1}"
        )
    shape = env.action_space.shape
    noise = kinds[kind](mean=np.zeros(shape), sigma=np.full(shape, float(sigma)))
    return noise if env.num_envs == 1 else VectorizedActionNoise(noise, env.num_envs)
