"""Owns the moments of one `learn` at which checkpoints are taken, and what is captured then beyond the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sb3_mlflow_ckpt.resumption import ResumeState
from sb3_mlflow_ckpt.state.callbacks import CallbackStates
from sb3_mlflow_ckpt.state.exact import ExactCapture, capture_exact
from sb3_mlflow_ckpt.state.model import ModelRecorder
from sb3_mlflow_ckpt.state.replay.buffer import ReplayCapture, ReplayRecorder
from sb3_mlflow_ckpt.state.replay.columns import columns
from sb3_mlflow_ckpt.state.safe_point import SafePoint, SafePointWatch

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)

_MID_STEP = "it was saved in the middle of a step"
_MID_UPDATE = "it was saved in the middle of an update"
_AFFORDABLE_BUFFER = 2 * 2**30

SaveReplayBuffer = Literal["auto", "always", "never"]


class Snapshot(NamedTuple):
    """What a checkpoint holds beyond weights and counters.

    Attributes:
        exact: What makes a resume exact, as far as it was captured.
        not_exact: Why it was not captured, where that was not by choice.
        replay: The replay buffer.
    """

    exact: ExactCapture | None
    not_exact: str | None
    replay: ReplayCapture | None


class Snapshots:
    """Has checkpoints taken when everything can be captured, and captures it.

    Args:
        model: The algorithm that is learning.
        watched: Its callbacks.
        mode: `weights` captures nothing beyond them, `exact` the replay buffer whatever its size.
        save_replay_buffer: Whether the replay buffer is captured; `auto` up to a full capacity of 2 GiB.
        take: Takes a checkpoint. It is given the moment; None where no safe one was near.

    Attributes:
        recorder: Captures the model's weights and counters.
    """

    def __init__(
        self,
        model: BaseAlgorithm,
        watched: CallbackStates,
        mode: ResumeState,
        save_replay_buffer: SaveReplayBuffer,
        take: Callable[[SafePoint | None], None],
    ) -> None:
        self.recorder = ModelRecorder(model)
        self._model = model
        self._watched = watched
        self._mode = mode
        self._take = take
        self._watch = SafePointWatch(model, take)
        self._mid_step = self._updating = False
        self._replay = ReplayRecorder(model)
        self._replay_left_out = self._why_left_out(save_replay_buffer)

    def continue_from(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from a replay buffer that was restored from the chunks of a run folder."""
        self._replay.continue_from(state, folder)

    def step(self) -> None:
        """Tell that a step was made, which SB3 has not stored yet."""
        self._mid_step = True
        # SB3 stores the step next.
        self._replay.protect()

    def rollout_start(self, *, wanted: bool) -> None:
        """Tell that a rollout begins.

        Args:
            wanted: Whether a checkpoint is to be taken at this moment.
        """
        self._mid_step = self._updating = False
        if wanted:
            self._watch.arm()
        self._watch.rollout_start()

    def rollout_end(self) -> None:
        """Tell that a rollout ends."""
        self._mid_step, self._updating = False, True
        self._watch.rollout_end()

    def take_soon(self, *, overdue: bool) -> None:
        """Have a checkpoint taken at the next safe point; at once where the algorithm has none.

        Args:
            overdue: Whether there is no time to wait for it.
        """
        if overdue or not self._watch.arm():
            self.take_here()

    def take_here(self) -> None:
        """Have a checkpoint taken from where training stands."""
        self._watch.disarm()
        self._take(None)

    def training_end(self) -> SafePoint | None:
        """Return what kind of moment the end of training is: a callback ends it in the middle of a step."""
        self._watch.disarm()
        return None if self._mid_step else "training_end"

    def capture(self, point: SafePoint | None) -> Snapshot:
        """Return what a checkpoint that is taken now holds beyond weights and counters."""
        if self._mode == "weights":
            return Snapshot(None, None, None)
        middle = _MID_UPDATE if self._updating else _MID_STEP
        exact, not_exact = (None, middle) if point is None else self._capture_exact(point)
        replay = None if self._replay_left_out else self._replay.capture()
        if exact is not None and exact.reason is None and self._replay_left_out:
            exact = replace(exact, reason=self._replay_left_out)
        return Snapshot(exact, not_exact, replay)

    def _capture_exact(self, point: SafePoint) -> tuple[ExactCapture | None, str | None]:
        try:
            return capture_exact(self._model, self._watched, point, self._watch.drawn_before), None
        except Exception as error:
            # An environment's own code runs here: weights and counters must be saved all the same.
            logger.exception("The exact state could not be captured: the checkpoint holds parameters and counters")
            return None, f"its state could not be captured: {type(error).__name__}: {error}"

    def _why_left_out(self, wanted: SaveReplayBuffer) -> str | None:
        buffer = getattr(self._model, "replay_buffer", None)
        if buffer is None:
            return None
        if wanted == "never":
            return "the replay buffer is left out (save_replay_buffer: never)"
        capacity = sum(column.nbytes for column in columns(buffer).values())
        if capacity > _AFFORDABLE_BUFFER and wanted != "always" and self._mode != "exact":
            return (
                f"the replay buffer is left out: it can grow to {capacity / 2**30:.1f} GiB "
                "(save_replay_buffer: always keeps it)"
            )
        return self._replay.reason or None

    def close(self) -> None:
        """Stop waiting for a safe point."""
        self._watch.disarm()
