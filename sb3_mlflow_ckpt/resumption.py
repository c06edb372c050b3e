"""Owns how a `learn` goes on from a checkpoint: what is restored beyond weights, and whether that is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointLoadError, IncompatibleCheckpointError
from sb3_mlflow_ckpt.layout import chunk_path
from sb3_mlflow_ckpt.origins import Origin
from sb3_mlflow_ckpt.provenance import version_differences
from sb3_mlflow_ckpt.state.archive import read_exact
from sb3_mlflow_ckpt.state.callbacks import CallbackStates
from sb3_mlflow_ckpt.state.embedded import read_part
from sb3_mlflow_ckpt.state.exact import ExactRestore
from sb3_mlflow_ckpt.state.replay.buffer import restore_replay
from sb3_mlflow_ckpt.state.replay.refill import ReplayRefill
from sb3_mlflow_ckpt.state.safe_point import kind_of

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)

ResumeState = Literal["auto", "exact", "weights"]

# Settings of which a changed one makes other environments; where they are stepped is no matter.
_ENVIRONMENT = ("env_id", "env_kwargs", "env_wrappers", "n_envs", "normalize", "frame_stack")


class Resumption:
    """Brings a model that came from a checkpoint to where the training stood.

    Args:
        model: The model, with the checkpoint's parameters and counters.
        origin: The checkpoint.
        mode: `weights` restores nothing further; `exact` refuses to go on where `auto` says what is missing.
        overridden: Settings that this run changes, as dotted keys.

    Raises:
        IncompatibleCheckpointError: The mode is `exact` and the checkpoint is not.
    """

    def __init__(
        self, model: BaseAlgorithm, origin: Origin, mode: ResumeState, overridden: Collection[str] = ()
    ) -> None:
        self._model = model
        self._origin = origin
        self._mode = mode
        self._exact: ExactRestore | None = None
        self._refill: ReplayRefill | None = None
        self._reason: str | None = None
        self._complete = False
        if mode == "weights":
            self._miss("resume_state is weights: only parameters and counters are restored")
        else:
            self._prepare(overridden)

    @property
    def report(self) -> dict[str, Any]:
        """What the run's record says: `exact`, and the `reason` why not."""
        reason = self._reason or (self._exact.reason if self._exact is not None else None)
        return {"exact": reason is None, "reason": reason}

    @property
    def complete(self) -> bool:
        """Whether everything is restored: not before the first rollout."""
        return self._complete

    @property
    def held_attributes(self) -> dict[str, Any]:
        """Values of the model's attributes that are changed for a while."""
        return self._refill.attributes if self._refill is not None else {}

    def training_start(
        self, watched: CallbackStates, restored: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], Path] | None:
        """Restore what the first rollout begins with: call when `learn` has set itself up.

        Args:
            watched: The callbacks of this `learn`.
            restored: Is called with the report when everything is restored.

        Returns:
            What was restored of the replay buffer and the folder that holds it, for the recorder to go on from.
        """
        self._watched, self._restored = watched, restored
        if self._exact is not None:
            self._exact.training_start()
        replay = self._restore_replay()
        self._refill = ReplayRefill(self._model)
        if kind_of(self._model) == "population":
            # A population is drawn before its evaluation is announced as a rollout.
            self.rollout_start()
        return replay

    def rollout_start(self) -> None:
        """Restore the rest when the first rollout has begun: what `learn` drew on its way there must not count."""
        if self._complete:
            return
        self._complete = True
        if self._exact is not None:
            self._exact.first_point(self._watched)
        self._refuse()
        if self._mode != "weights" and not self.report["exact"]:
            logger.warning("The resumed training is no exact continuation: %s", self.report["reason"])
        self._restored(self.report)

    def rollout_end(self) -> None:
        """Let the updates go on once a new replay buffer has been filled."""
        if self._refill is not None:
            self._refill.release_when_full()

    def close(self) -> None:
        """Give the model back as it is configured."""
        if self._exact is not None:
            self._exact.close()
        if self._refill is not None:
            self._refill.release()

    def _prepare(self, overridden: Collection[str]) -> None:
        metadata = self._origin.metadata
        saved = metadata.resume_state
        if not saved.get("exact"):
            self._miss(f"the checkpoint is not exact: {saved.get('reason') or 'it does not say why'}")
        if self._origin.lacking:
            self._miss(f"the checkpoint does not say what {', '.join(self._origin.lacking)} was")
        versions = version_differences(metadata.versions)
        if versions:
            self._miss(versions[0].lower() + versions[1:])
        if "seed" in overridden:
            self._miss("this run has another seed")
        self._refuse()
        if self._origin.path is None:
            return
        try:
            state = read_exact(self._origin.path)
        except CheckpointLoadError as error:
            self._miss(error.cause)
            return
        if state is None:
            self._miss("the checkpoint holds parameters and counters only")
        else:
            changed = {key.partition(".")[0] for key in overridden} & set(_ENVIRONMENT)
            self._exact = ExactRestore(
                self._model, state, environments=not changed, randomness="seed" not in overridden
            )

    def _restore_replay(self) -> tuple[dict[str, Any], Path] | None:
        path = self._origin.path
        if path is None or self._mode == "weights" or getattr(self._model, "replay_buffer", None) is None:
            return None
        try:
            state = read_part(path, "replay")
            if state is None:
                self._miss("the checkpoint holds no replay buffer")
                return None
            lost = restore_replay(self._model, state, lambda name: chunk_path(path.parent, name).open("rb"))
        except (ValueError, KeyError, TypeError, OSError, CheckpointError) as error:
            self._miss(f"the replay buffer begins anew: {error}")
            return None
        if lost:
            self._miss(f"the replay buffer is not whole: {lost[0]}")
        return state, path.parent

    def _miss(self, reason: str) -> None:
        self._reason = self._reason or reason

    def _refuse(self) -> None:
        reason = self.report["reason"]
        if self._mode == "exact" and reason is not None:
            raise IncompatibleCheckpointError(
                self._origin.source, f"it cannot be resumed exactly: {reason}", "Use --resume-state auto"
            )
