"""Owns the sampling of the learning curve: at most one point a second, with what SB3's logger last said."""

from __future__ import annotations

import time
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.utils import safe_mean

from sb3_mlflow_ckpt.metadata import timestamp_now
from sb3_mlflow_ckpt.runs.document import finite

# The curve's own columns say these: `ep_rew_mean`, `num_timesteps`, `steps_per_second`.
_REDUNDANT = frozenset({"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/total_timesteps", "time/time_elapsed"})


class CurveSampler(KVWriter):
    """An output of SB3's logger beside the user's own ones, read out once a second.

    Args:
        seconds_between_points: The shortest time between two points.

    Attributes:
        last_step: The environment step of the last point; None before the first one.
    """

    def __init__(self, seconds_between_points: float = 1.0) -> None:
        self.last_step: int | None = None
        self._pause = seconds_between_points
        self._scalars: dict[str, float | None] = {}
        self._last: tuple[float, int] = (time.monotonic(), 0)

    def start(self, num_timesteps: int) -> None:
        """Begin at a number of environment steps."""
        self._last, self.last_step = (time.monotonic(), num_timesteps), None

    def due(self) -> bool:
        """Return whether it is time for a point."""
        return time.monotonic() - self._last[0] >= self._pause

    def point(self, model: BaseAlgorithm, episode: int) -> dict[str, Any]:
        """Return a point of the curve; every value is finite or None.

        Returns:
            `num_timesteps`, `episode`, `time`, `ep_rew_mean` and `ep_len_mean` over the last episodes,
            `steps_per_second` since the last point, and SB3's own scalars (`train/loss`, ...) where it logged some.
        """
        now = time.monotonic()
        then, steps = self._last
        self._last, self.last_step = (now, model.num_timesteps), model.num_timesteps
        infos = [info for info in (model.ep_info_buffer or ()) if "r" in info]
        point = {
            **self._scalars,  # First: a user's own scalar may be called as one of the columns is.
            "num_timesteps": int(model.num_timesteps),
            "episode": episode,
            "time": timestamp_now(),
            "ep_rew_mean": finite(safe_mean([info["r"] for info in infos])) if infos else None,
            "ep_len_mean": finite(safe_mean([info["l"] for info in infos])) if infos else None,
            "steps_per_second": finite((model.num_timesteps - steps) / (now - then)) if now > then else None,
        }
        self._scalars = {}
        return point

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Take what SB3's logger dumps; images, figures and texts are left to its other outputs."""
        for key, value in key_values.items():
            if key in _REDUNDANT or isinstance(value, (str, bool)):
                continue
            try:
                self._scalars[key] = finite(float(value))
            except (TypeError, ValueError):
                continue

    def close(self) -> None:
        """Release nothing: the journal owns the file."""
