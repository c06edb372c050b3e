"""Owns the clock of the mode `smoke`."""

from __future__ import annotations

import time

from stable_baselines3.common.callbacks import BaseCallback


class TimeLimit(BaseCallback):
    """Ends `learn` after some seconds, as its normal end.

    Args:
        seconds: Counted from the start of the training.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._deadline = 0.0

    def _on_training_start(self) -> None:
        self._deadline = time.monotonic() + self._seconds

    def _on_step(self) -> bool:
        return time.monotonic() < self._deadline
