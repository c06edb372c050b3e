"""Owns the limits of the mode `smoke`."""

from __future__ import annotations

import time

from stable_baselines3.common.callbacks import BaseCallback


class TimeLimit(BaseCallback):
    """Ends `learn` after some environment steps or seconds, as its normal end.

    The target, and so every schedule, stays what it is. It ends with the step after the limit: an on-policy
    rollout that fills up on the limit is learned from.

    Args:
        timesteps: Counted from the start of this `learn`.
        seconds: Likewise.
    """

    def __init__(self, timesteps: int, seconds: float) -> None:
        super().__init__()
        self._timesteps, self._seconds = timesteps, seconds
        self._last_step, self._deadline = 0, 0.0

    def _on_training_start(self) -> None:
        self._last_step = self.num_timesteps + self._timesteps
        self._deadline = time.monotonic() + self._seconds

    def _on_step(self) -> bool:
        return self.num_timesteps <= self._last_step and time.monotonic() < self._deadline
