"""Owns the moments of one `learn` at which checkpoints are taken, and what is captured then beyond the weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sb3_mlflow_ckpt.resumption import ResumeState
from sb3_mlflow_ckpt.state.callbacks import CallbackStates
from sb3_mlflow_ckpt.state.exact import ExactCapture, capture_exact
from sb3_mlflow_ckpt.state.safe_point import SafePoint, SafePointWatch

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)

# Whoever sends a signal kills some seconds later: Kubernetes after 30 s.
_PATIENCE_SECONDS = 5.0
_MID_STEP = "it was saved in the middle of a step"


class Snapshots:
    """Has checkpoints taken when everything can be captured, and captures it.

    Args:
        model: The algorithm that is learning.
        watched: Its callbacks.
        mode: `weights` captures nothing beyond them.
        take: Takes a checkpoint. It is given the moment; None where no safe one was near.
    """

    def __init__(
        self,
        model: BaseAlgorithm,
        watched: CallbackStates,
        mode: ResumeState,
        take: Callable[[SafePoint | None], None],
    ) -> None:
        self._model = model
        self._watched = watched
        self._mode = mode
        self._take = take
        self._watch = SafePointWatch(model, take)
        self._mid_step = False
        self._urgent_since: float | None = None

    def step(self) -> None:
        """Tell that a step was made, which SB3 has not stored yet."""
        self._mid_step = True

    def rollout_start(self, *, wanted: bool) -> None:
        """Tell that a rollout begins.

        Args:
            wanted: Whether a checkpoint is to be taken at this moment.
        """
        self._mid_step = False
        if wanted:
            self._watch.arm()
        self._watch.rollout_start()

    def rollout_end(self) -> None:
        """Tell that a rollout ends."""
        self._mid_step = False
        self._watch.rollout_end()

    def take_soon(self, *, urgent: bool) -> None:
        """Have a checkpoint taken at the next safe point; at once where the algorithm has none.

        Args:
            urgent: Whether to wait for it some seconds only.
        """
        if urgent and self._urgent_since is None:
            self._urgent_since = time.monotonic()
        overdue = self._urgent_since is not None and time.monotonic() - self._urgent_since > _PATIENCE_SECONDS
        if overdue or not self._watch.arm():
            self._watch.disarm()
            self._take(None)

    def training_end(self) -> SafePoint | None:
        """Return what kind of moment the end of training is: a callback ends it in the middle of a step."""
        self._watch.disarm()
        return None if self._mid_step else "training_end"

    def capture(self, point: SafePoint | None) -> tuple[ExactCapture | None, str | None]:
        """Return what makes a resume exact; or None, and why it is None where that is not by choice."""
        if self._mode == "weights":
            return None, None
        if point is None:
            return None, _MID_STEP
        try:
            return capture_exact(self._model, self._watched, point, self._watch.drawn_before), None
        except Exception as error:
            # An environment's own code runs here: weights and counters must be saved all the same.
            logger.exception("The exact state could not be captured: the checkpoint holds parameters and counters")
            return None, f"its state could not be captured: {type(error).__name__}: {error}"

    def close(self) -> None:
        """Stop waiting for a safe point."""
        self._watch.disarm()
