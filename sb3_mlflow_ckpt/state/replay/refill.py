"""Owns what an off-policy run that resumes without its replay buffer needs: a pause of the updates to refill it.

SB3 would sample at once, because `num_timesteps` is beyond `learning_starts`: a buffer of a few transitions
overfits them, and HER's cannot be sampled before an episode has ended.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)


class ReplayRefill:
    """Holds the gradient updates of a resumed off-policy model until its buffer has `learning_starts` transitions.

    Args:
        model: Any algorithm; an on-policy one is left alone.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model = cast("Any", model)
        self._gradient_steps: int | None = None
        off_policy = getattr(model, "replay_buffer", None) is not None and hasattr(self._model, "gradient_steps")
        if off_policy and self._lost() and self._lacking():
            self._gradient_steps = self._model.gradient_steps
            self._model.gradient_steps = 0
            logger.warning(
                "The replay buffer is not part of the checkpoint: no updates until a new one holds %d transitions",
                self._model.learning_starts,
            )

    @property
    def attributes(self) -> dict[str, Any]:
        """What a checkpoint must record in place of the model's own attributes while updates are held."""
        return {} if self._gradient_steps is None else {"gradient_steps": self._gradient_steps}

    def release_when_full(self) -> None:
        """Let the updates go on if the buffer has enough; call it at the end of a rollout."""
        if self._gradient_steps is not None and not self._lacking():
            self.release()

    def release(self) -> None:
        """Let the updates go on."""
        if self._gradient_steps is not None:
            self._model.gradient_steps = self._gradient_steps
            self._gradient_steps = None

    def _lost(self) -> bool:
        buffer, n_envs = self._model.replay_buffer, self._model.n_envs
        return bool(buffer.size() * n_envs < min(self._model.num_timesteps, buffer.buffer_size * n_envs))

    def _lacking(self) -> bool:
        buffer = self._model.replay_buffer
        wanted = min(self._model.learning_starts, buffer.buffer_size * self._model.n_envs)
        if buffer.size() * self._model.n_envs < wanted:
            return True
        # HER learns from finished episodes only.
        lengths = getattr(buffer, "ep_length", None)
        return lengths is not None and not lengths.any()
