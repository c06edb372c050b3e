"""Owns everything beyond weights and counters that decides how a training goes on: captured and put back.

What is captured here makes a resumed run equal to one that was never interrupted. The recipe, with what each part is
needed for, is in docs/exact-resume.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.state import callbacks, randomness, rollout, vec_env
from sb3_mlflow_ckpt.state.callbacks import CallbackStates
from sb3_mlflow_ckpt.state.safe_point import SafePoint, kind_of

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

State = dict[str, Any]

_OBSERVED = ("_last_obs", "_last_original_obs", "_last_episode_starts")
_NOISE_MATRICES = ("exploration_mat", "exploration_matrices")


@dataclass(frozen=True)
class ExactCapture:
    """What a resume needs to be exact, sharing no memory with the model.

    Attributes:
        state: Nested plain values and arrays.
        reason: Why a resume from it is not exact all the same; None if it is.
    """

    state: State
    reason: str | None


def capture_exact(
    model: BaseAlgorithm,
    watched: CallbackStates,
    point: SafePoint,
    drawn_before: randomness.State | None = None,
) -> ExactCapture:
    """Capture a training at a safe point (see `safe_point`).

    Args:
        model: The algorithm that is learning.
        watched: Its callbacks.
        point: Which moment it is.
        drawn_before: The random states to record, where that is not the present ones.
    """
    env = model.get_env()
    assert env is not None
    environments, reason = vec_env.capture(env)
    noise, noise_reason = _capture_noise(getattr(model, "action_noise", None))
    own, own_reason = _capture_own(model)
    state: State = {
        "point": point,
        "device": model.device.type,
        "threads": th.get_num_threads(),
        "environments": environments,
        "observed": {name: _snapshot(getattr(model, name, None)) for name in _OBSERVED},
        "lstm": _snapshot(getattr(model, "_last_lstm_states", None)),
        "gsde": {name: _snapshot(value) for name, value in _noise_matrices(model).items()},
        "rollout": rollout.capture(model) if point == "mid_rollout" else None,
        "action_noise": noise,
        "algorithm": own,
        "callbacks": watched.capture(),
        "logger": callbacks.capture_logger(model.logger),
        # Last: nothing above may draw a number.
        "randomness": drawn_before if point == "population" else randomness.capture(model),
    }
    return ExactCapture(state, reason or noise_reason or own_reason or rollout.unknown(model) or watched.unknown())


class ExactRestore:
    """Puts a captured state into a model while `learn` starts, at the moments at which each part can be.

    Args:
        model: A model with the checkpoint's parameters and counters.
        state: What `capture_exact` returned.
        environments: Whether the environments are those of the checkpoint, as far as the configuration says.
        randomness: Whether random states are restored; not where this run was given a seed of its own.

    Attributes:
        reason: Why the resumed training is not an exact continuation; None if it is, as far as is known yet.
    """

    def __init__(
        self, model: BaseAlgorithm, state: Mapping[str, Any], *, environments: bool = True, randomness: bool = True
    ) -> None:
        self._model = cast("Any", model)
        self._state = state
        self._with_environments = environments
        self._with_randomness = randomness
        self._rollout: Mapping[str, Any] | None = None
        self.reason: str | None = None
        device, threads = state.get("device"), state.get("threads")
        if device != model.device.type:
            self._miss(f"it was trained on {device}, this run is on {model.device.type}")
        elif threads != th.get_num_threads():
            self._miss(f"torch had {threads} threads, it has {th.get_num_threads()} here")

    def training_start(self) -> None:
        """Restore what the first rollout begins with: call when `learn` has set itself up."""
        model, state = self._model, self._state
        restored = self._restore_environments()
        unfinished = state.get("rollout")
        if unfinished is None:
            return
        problem = rollout.problem(model, unfinished) if restored else "the environments begin anew"
        if problem is not None:
            self._miss(f"the unfinished rollout is dropped: {problem}")
            return
        self._rollout = unfinished
        rollout.announce(model, unfinished)

    def first_point(self, watched: CallbackStates) -> None:
        """Restore the rest: call at the first rollout's start, for ARS before it draws its first population.

        What `learn` draws on its way there must not count.
        """
        model, state = self._model, self._state
        try:
            if self._rollout is not None:
                rollout.restore(model, self._rollout)
                self._rollout = None
            _restore_noise(getattr(model, "action_noise", None), state.get("action_noise"))
            _restore_own(model, state.get("algorithm"))
            missed = watched.restore(state.get("callbacks") or {})
            if missed is not None:
                self._miss(missed)
            callbacks.restore_logger(model.logger, state.get("logger") or {})
            if self._with_randomness:
                randomness.restore(model, state["randomness"])
            if state.get("point") == "training_end":
                self._draw_noise()
            else:
                self._restore_noise_matrices(state.get("gsde") or {})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._miss(f"a part of the state could not be restored: {error}")

    def close(self) -> None:
        """Give the model back as it is configured, where `learn` ended before its first rollout."""
        if self._rollout is not None:
            rollout.withdraw(self._model, self._rollout)
            self._rollout = None

    def _restore_environments(self) -> bool:
        model, state = self._model, self._state
        if not self._with_environments:
            problem: str | None = "this run changes their settings"
        else:
            try:
                problem = vec_env.restore(model.env, state["environments"])
                if problem is None:
                    problem = self._restore_observed(state.get("observed") or {})
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                # The file may be a stranger's, and made up.
                problem = f"their state is not described ({type(error).__name__}: {error})"
        if problem is None:
            return True
        self._miss(f"the environments are reset: {problem}")
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones((model.env.num_envs,), dtype=bool)
        if model.get_vec_normalize_env() is not None:
            model._last_original_obs = model.get_vec_normalize_env().get_original_obs()
        return False

    def _restore_observed(self, observed: Mapping[str, Any]) -> str | None:
        model = self._model
        last = observed.get("_last_obs")
        present = model._last_obs
        if not _alike(present, last):
            return "the last observation is not one of theirs"
        for name in _OBSERVED:
            if observed.get(name) is not None:
                setattr(model, name, observed[name])
        lstm = self._state.get("lstm")
        if lstm is not None:
            model._last_lstm_states = _filled(model._last_lstm_states, lstm, model.device)
        return None

    def _restore_noise_matrices(self, saved: Mapping[str, Any]) -> None:
        distribution = _noise_distribution(self._model)
        if distribution is None:
            return
        for name in _NOISE_MATRICES:
            if saved.get(name) is not None:
                setattr(distribution, name, saved[name].to(self._model.device))

    def _draw_noise(self) -> None:
        # At a training's end the noise of the next rollout was not drawn yet; `learn` has drawn it from elsewhere.
        if self._model.use_sde:
            (getattr(self._model, "actor", None) or self._model.policy).reset_noise(self._model.n_envs)

    def _miss(self, reason: str) -> None:
        self.reason = self.reason or reason


def _noise_distribution(model: Any) -> Any:
    if not model.use_sde:
        return None
    return (getattr(model, "actor", None) or model.policy).action_dist


def _noise_matrices(model: BaseAlgorithm) -> dict[str, Any]:
    distribution = _noise_distribution(model)
    return {} if distribution is None else {name: getattr(distribution, name, None) for name in _NOISE_MATRICES}


def _capture_noise(noise: ActionNoise | None) -> tuple[Any, str | None]:
    if noise is None or type(noise) is NormalActionNoise:
        return None, None
    if type(noise) is OrnsteinUhlenbeckActionNoise:
        return np.array(noise.noise_prev), None
    if type(noise) is VectorizedActionNoise:
        parts = [_capture_noise(part) for part in noise.noises]
        return [part for part, _ in parts], next((reason for _, reason in parts if reason), None)
    own = getattr(noise, "get_checkpoint_state", None)
    if own is not None:
        return {"own": copy.deepcopy(own())}, None
    return None, f"the state of the action noise {type(noise).__name__} is not known"


def _restore_noise(noise: ActionNoise | None, state: Any) -> None:
    if noise is None or state is None:
        return
    if isinstance(noise, OrnsteinUhlenbeckActionNoise):
        noise.noise_prev = np.array(state)
    elif isinstance(noise, VectorizedActionNoise):
        for part, taken in zip(noise.noises, state, strict=True):
            _restore_noise(part, taken)
    elif hasattr(noise, "set_checkpoint_state"):
        noise.set_checkpoint_state(state["own"])


def _capture_own(model: BaseAlgorithm) -> tuple[Any, str | None]:
    """Return what an algorithm of the user's own says of itself."""
    own = getattr(model, "get_checkpoint_state", None)
    if own is not None:
        state = copy.deepcopy(own())
        try:
            tree.encode(state)
        except tree.NotPlainError as error:
            return None, f"get_checkpoint_state of {type(model).__name__} returns what is not plain: {error}"
        return state, None
    if kind_of(model) is None or type(model).__module__.partition(".")[0] not in ("stable_baselines3", "sb3_contrib"):
        return None, f"what state {type(model).__name__} adds to its parameters is not known"
    return None, None


def _restore_own(model: BaseAlgorithm, state: Any) -> None:
    if state is not None and hasattr(model, "set_checkpoint_state"):
        model.set_checkpoint_state(state)


def _snapshot(value: Any) -> Any:
    """Return a copy of arrays and tensors, nested or not."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, th.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_snapshot(item) for item in value)
    return value


def _filled(present: Any, saved: Any, device: th.device) -> Any:
    """Return a structure of tensors like `present` (named tuples stay what they are) with saved values."""
    if isinstance(present, th.Tensor):
        if not isinstance(saved, th.Tensor) or saved.shape != present.shape:
            raise ValueError("the recurrent state is of another shape")
        return saved.to(device)
    items = [_filled(part, value, device) for part, value in zip(present, saved, strict=True)]
    return type(present)(*items) if hasattr(present, "_fields") else type(present)(items)


def _alike(present: Any, saved: Any) -> bool:
    if isinstance(present, Mapping):
        return isinstance(saved, Mapping) and present.keys() == saved.keys() and all(
            _alike(value, saved[key]) for key, value in present.items()
        )  # fmt: skip
    return isinstance(saved, np.ndarray) and saved.shape == np.shape(present) and saved.dtype == present.dtype
