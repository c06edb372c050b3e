"""Owns the moments at which a training can be captured whole, and how to be called at the next one.

In `on_step` SB3 has stepped the environment and not stored the transition yet: what is captured there lags one step
behind, and the step would be lost. The moments after it:

| algorithm | moment |
|---|---|
| on-policy | when the policy is asked for the next action, in mid-rollout; before the noise is drawn anew, where gSDE does that within a rollout; after the update, where the step was the rollout's last or the target is reached |
| off-policy | when the next steps begin to be collected, after the updates: at most `train_freq` later |
| ARS | when the next population begins to be evaluated, with the random states of before it was drawn |
"""  # noqa: E501 # a table

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_mlflow_ckpt.state import randomness

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

SafePoint = Literal["mid_rollout", "rollout_start", "population", "training_end"]

_WRITING_MODULES = ("torch.optim", "stable_baselines3.common.running_mean_std")
_WRITING_FUNCTIONS = frozenset({"polyak_update", "_store_transition"})
_KNOWN_PACKAGES = ("stable_baselines3", "sb3_contrib")


class SafePointWatch:
    """Calls a listener once, at the next safe point after a step.

    Args:
        model: The algorithm that is learning.
        reached: The listener. What it raises leaves `learn`.

    Attributes:
        drawn_before: The random states from which ARS drew the present population; None for other algorithms.
    """

    def __init__(self, model: BaseAlgorithm, reached: Callable[[SafePoint], None]) -> None:
        self._model = cast("Any", model)
        self._reached = reached
        self._disarm: Callable[[], None] | None = None
        self._next_row = 0
        self.drawn_before: randomness.State | None = None

    @property
    def armed(self) -> bool:
        """Whether the listener is still to be called."""
        return self._disarm is not None

    def arm(self) -> bool:
        """Wait for the next safe point, from within `on_step`; return whether this algorithm has any."""
        if self.armed:
            return True
        kind = kind_of(self._model)
        if kind == "on-policy":
            # The row that the present step will have filled.
            self._next_row = self._model.rollout_buffer.pos + 1
            self._disarm = self._watch_policy()
        elif kind is not None:
            self._disarm = lambda: None
        return self.armed

    def rollout_start(self) -> None:
        """Tell that a rollout begins."""
        if not self.armed:
            return
        if kind_of(self._model) != "population":
            self._fire("rollout_start")
        elif self.drawn_before is not None:
            self._fire("population")

    def rollout_end(self) -> None:
        """Tell that a rollout ends: between here and the next population, ARS draws nothing else."""
        if kind_of(self._model) == "population":
            self.drawn_before = randomness.capture(self._model)

    def disarm(self) -> None:
        """Stop waiting."""
        disarm, self._disarm = self._disarm, None
        if disarm is not None:
            disarm()

    def _watch_policy(self) -> Callable[[], None]:
        policy, model = self._model.policy, self._model
        if model.use_sde and model.sde_sample_freq > 0:
            # Noise is drawn before the policy is asked, and the resumed rollout counts its steps from 0: only a
            # step at which noise is drawn is one at which both runs draw it.
            return _before_call(policy, "reset_noise", self._stored)
        handle = policy.register_forward_pre_hook(lambda *_: self._stored())
        return cast("Callable[[], None]", handle.remove)

    def _stored(self) -> None:
        # Somebody else may ask the policy before SB3 has stored the step; and an update draws noise, too.
        buffer = self._model.rollout_buffer
        if not self.armed or not self._next_row <= buffer.pos < buffer.buffer_size:
            return
        # Beyond the target SB3 finishes the rollout and updates; a `learn` that is resumed there would do neither.
        if self._model.num_timesteps < self._model._total_timesteps:
            self._fire("mid_rollout")

    def _fire(self, point: SafePoint) -> None:
        self.disarm()
        self._reached(point)


def kind_of(model: BaseAlgorithm) -> Literal["on-policy", "off-policy", "population"] | None:
    """Return how an algorithm collects its experience, or None for a training loop that is not known here."""
    if type(model).learn.__module__.partition(".")[0] not in _KNOWN_PACKAGES:
        return None
    if hasattr(type(model), "_do_one_update"):
        return "population"
    if not isinstance(model, (OnPolicyAlgorithm, OffPolicyAlgorithm)):
        return None
    if type(model).collect_rollouts.__module__.partition(".")[0] not in _KNOWN_PACKAGES:
        return None
    return "on-policy" if isinstance(model, OnPolicyAlgorithm) else "off-policy"


def is_writing(frame: FrameType | None) -> bool:
    """Return whether a thread that stands at a frame has changed a part of what belongs together.

    So a model that is captured in the middle of an update is captured between two steps of its optimizers, and no
    transition, no target network and no running mean is captured half-written.
    """
    while frame is not None:
        module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module.startswith(_WRITING_MODULES) or function in _WRITING_FUNCTIONS:
            return True
        # Buffers of anybody's own, too.
        if function == "add" and isinstance(frame.f_locals.get("self"), BaseBuffer):
            return True
        frame = frame.f_back
    return False


def _before_call(target: Any, name: str, action: Callable[[], None]) -> Callable[[], None]:
    """Call `action` before each call of a method of one object, until the function returned is called."""
    method = getattr(target, name)

    def remove() -> None:
        vars(target).pop(name, None)

    def watched(*args: Any, **kwargs: Any) -> Any:
        action()
        return method(*args, **kwargs)

    # On the object: the method is looked up there each time, and the class stays as it is.
    vars(target)[name] = watched
    return remove
