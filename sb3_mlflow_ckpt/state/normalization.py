"""Owns the statistics of VecNormalize as plain arrays. `VecNormalize.save` pickles, and drops `returns`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.vec_env import VecNormalize

Arrays = dict[str, NDArray[Any]]

NOT_APPLIED = "The checkpoint holds statistics of VecNormalize, the environment has no VecNormalize: they are not used"

_SETTINGS = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma", "epsilon", "training")


def capture(env: VecNormalize) -> tuple[dict[str, Any], Arrays]:
    """Return the settings (JSON) and the running statistics (arrays) of a VecNormalize.

    Returns:
        The settings, and arrays `obs_rms/mean`, `obs_rms/var`, `obs_rms/count` in the observation's shape
        (`obs_rms/<key>/...` for dictionary observations), `ret_rms/...` of shape (), `returns` of shape (n_envs,).
    """
    arrays: Arrays = {"returns": np.array(env.returns)}
    for name, statistics in _statistics(env).items():
        for part in ("mean", "var", "count"):
            arrays[f"{name}/{part}"] = np.array(getattr(statistics, part), dtype=np.float64)
    return {key: getattr(env, key) for key in _SETTINGS}, arrays


def restore(env: VecNormalize, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Put captured statistics into a VecNormalize; its settings stay as they are.

    Raises:
        ValueError: The statistics are of another observation.
    """
    for name, statistics in _statistics(env).items():
        mean, var = arrays.get(f"{name}/mean"), arrays.get(f"{name}/var")
        if mean is None or var is None:
            raise ValueError(f"the checkpoint's VecNormalize has no statistics {name!r}")
        if mean.shape != np.shape(statistics.mean):
            raise ValueError(
                f"the checkpoint's VecNormalize statistics {name!r} have shape {mean.shape}, "
                f"the environment's have {np.shape(statistics.mean)}"
            )
        statistics.mean, statistics.var = mean.copy(), var.copy()
        statistics.count = float(arrays[f"{name}/count"])
    returns = arrays.get("returns")
    if returns is not None and returns.shape == env.returns.shape:
        env.returns = returns.copy()


def _statistics(env: VecNormalize) -> dict[str, RunningMeanStd]:
    found: dict[str, RunningMeanStd] = {"ret_rms": env.ret_rms}
    # An environment with norm_obs=False has none.
    observations = getattr(env, "obs_rms", None)
    if isinstance(observations, dict):
        found |= {f"obs_rms/{key}": value for key, value in observations.items()}
    elif observations is not None:
        found["obs_rms"] = observations
    return found
