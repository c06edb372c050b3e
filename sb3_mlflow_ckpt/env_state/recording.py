"""Owns the recording of an episode, and its replay: what was before the reset, the actions since, and a checksum.

A replay goes through the whole chain of wrappers, and is right only if every observation, reward and end that the
environment answers is, byte for byte, what it answered then.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np

from sb3_mlflow_ckpt.env_state import ale, digest, world
from sb3_mlflow_ckpt.env_state.generators import StateRefusedError, get_global_state, set_global_state
from sb3_mlflow_ckpt.env_state.layers import Layer
from sb3_mlflow_ckpt.tree import NotPlainError, encode


class Recording:
    """The episode under way.

    Args:
        before: What was before the reset.
        arguments: The reset's own arguments.
        most: How many steps it may hold.
    """

    def __init__(self, before: Mapping[str, Any], arguments: Mapping[str, Any], most: int) -> None:
        self.before, self.arguments = before, arguments
        self.actions: list[Any] = []
        # Resets that a wrapper answers without a reset of the environment (EpisodicLifeEnv), by number of actions.
        self.inner_resets: list[tuple[int, dict[str, Any]]] = []
        self.crc = 0
        self.broken: str | None = None
        self._most = most

    def add(self, action: Any, answer: tuple[Any, Any, Any, Any, Any]) -> None:
        """Record one step; it is called once a step, so it does no more than it must."""
        actions = self.actions
        if len(actions) >= self._most:
            self.broken = f"the episode is longer than max_recorded_steps ({self._most})"
            actions.clear()
            self._most = 0
        elif not self.broken:
            # A scalar cannot change; an array is the caller's.
            actions.append(action.copy() if type(action) is np.ndarray else _copied(action))
            self.crc = digest.add_step(answer[0], answer[1], answer[2], answer[3], self.crc)

    def add_reset(self, observation: Any, arguments: dict[str, Any] | None = None) -> None:
        """Record the answer to a reset: that of the episode, or one in between with its arguments."""
        if arguments is not None:
            self.inner_resets.append((len(self.actions), arguments))
        self.crc = digest.add_observation(observation, self.crc)

    def get_state(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "before": self.before,
            "arguments": dict(self.arguments),
            "actions": _packed(self.actions),
            "inner_resets": list(self.inner_resets),
            "crc": self.crc,
        }


def before_reset(layers: list[Layer]) -> dict[str, Any]:
    """Return what an episode depends on beside its actions."""
    base = layers[-1].env
    # What would be seeded from the clock at its first use is seeded now, so that it can be written down.
    _ = base.np_random, base.action_space.np_random
    return {
        "attributes": [layer.changed() for layer in layers],
        "generators": [layer.generator_states() for layer in layers],
        "process": process_state(),
        "emulator": ale.emulator_state(base) if ale.is_emulator(base) else None,
    }


def process_state() -> dict[str, Any] | None:
    """Return the process's own generators where an environment has the process to itself, else None.

    In the trainer's process they are the trainer's, which draws from them between any two steps.
    """
    return get_global_state() if multiprocessing.parent_process() is not None else None


def replay(
    env: gymnasium.Env[Any, Any], layers: list[Layer], state: Any, most: int, *, with_attributes: bool
) -> Recording:
    """Return the recording of an episode that was just played again.

    Args:
        env: The chain of wrappers.
        layers: Its layers.
        state: What `Recording.get_state` returned.
        most: How many steps it may hold.
        with_attributes: Whether the environment's own attributes, too, become what they were before the reset.

    Raises:
        StateRefusedError: It is no such state, or the environment does not answer as it did.
    """
    before, arguments, actions, inner_resets = _checked(env, layers, state, most)
    for layer, attributes in zip(layers, before["attributes"], strict=True):
        if with_attributes or layer.is_wrapper:
            layer.apply(layer.fitting(attributes))
    if before.get("emulator") is not None and ale.is_emulator(layers[-1].env):
        ale.set_emulator_state(layers[-1].env, before["emulator"])
    for layer, generators in zip(layers, before["generators"], strict=True):
        layer.set_generator_states(generators)
    if before.get("process") is not None and multiprocessing.parent_process() is not None:
        set_global_state(before["process"])
    recording = Recording(before, arguments, most)
    with _unwatched(layers):
        world.renew(layers[-1].env)
        observation, _ = env.reset(**arguments)
        recording.add_reset(observation)
        waiting = list(inner_resets)
        for index in range(len(actions) + 1):
            while waiting and waiting[0][0] == index:
                again = dict(waiting.pop(0)[1])
                observation, _ = env.reset(**again)
                recording.add_reset(observation, again)
            if index < len(actions):
                recording.add(actions[index], env.step(actions[index]))
    if recording.crc != state["crc"]:
        steps = "its reset" if not actions else f"{len(actions)} steps"
        raise StateRefusedError(f"the replay of {steps} answers something else: the environment has a state of its own")
    return recording


def _checked(env: Any, layers: list[Layer], state: Any, most: int) -> tuple[Any, Any, Any, Any]:
    try:
        before, arguments, resets = state["before"], state["arguments"], state["inner_resets"]
        if not isinstance(state["crc"], int) or {len(before["attributes"]), len(before["generators"])} != {len(layers)}:
            raise StateRefusedError("the recording is of another chain of wrappers")
        actions = _unpacked(state["actions"])
        for at, again in resets:
            if not isinstance(at, int) or not 0 <= at <= len(actions):
                raise StateRefusedError("the recording has a reset out of order")
            _check_arguments(again)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StateRefusedError):
            raise
        raise StateRefusedError(f"the recording is damaged ({type(error).__name__}: {error})") from error
    _check_arguments(arguments)
    if len(actions) > most:
        raise StateRefusedError(f"the recording is longer than max_recorded_steps ({most})")
    shape = env.action_space.shape
    # Native simulators are not made for actions of another shape.
    if shape is not None and any(np.shape(action) != shape for action in actions):
        raise StateRefusedError("the recording has actions of another shape")
    return before, arguments, actions, resets


def _check_arguments(arguments: Any) -> None:
    if not isinstance(arguments, Mapping) or not set(arguments) <= {"seed", "options"}:
        raise StateRefusedError("the recording has a reset with unknown arguments")
    seed, options = arguments.get("seed"), arguments.get("options")
    if not (seed is None or (isinstance(seed, int) and seed >= 0)) or not (
        options is None or isinstance(options, Mapping)
    ):
        raise StateRefusedError("the recording has a reset with arguments of another type")
    if _holds_text(options):
        # A text may name a file or a command.
        raise StateRefusedError("the recording has a reset with a text among its options")


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(item) for item in value.values())
    return any(map(_holds_text, value)) if isinstance(value, (list, tuple)) else isinstance(value, (str, bytes))


@contextmanager
def _unwatched(layers: list[Layer]) -> Iterator[None]:
    """Let Monitors write no rows: those of a replayed episode have been written."""
    kept = []
    for layer in layers:
        if layer.is_monitor:
            held: Any = layer.env
            lists = {
                name: list(getattr(held, name)) for name in ("episode_returns", "episode_lengths", "episode_times")
            }
            kept.append((held, held.results_writer, lists))
            held.results_writer = None
    try:
        yield
    finally:
        for held, writer, lists in kept:
            held.results_writer = writer
            for name, values in lists.items():
                setattr(held, name, values)


def check_plain(value: Any) -> str | None:
    """Return what of a value has no plain form, or None."""
    try:
        encode(value)
    except NotPlainError as error:
        return str(error)
    return None


def _copied(action: Any) -> Any:
    return action if isinstance(action, (int, float, np.generic)) else copy.deepcopy(action)


def _packed(actions: list[Any]) -> dict[str, Any]:
    """Return actions as one array where they are alike; an encoded list of small arrays is many times as long."""
    kinds = {(type(action), getattr(action, "dtype", None), getattr(action, "shape", None)) for action in actions}
    if len(kinds) == 1:
        ((kind, _, _),) = kinds
        if kind in (int, np.ndarray) or issubclass(kind, np.generic):
            name = "int" if kind is int else "array" if kind is np.ndarray else "scalar"
            packed = np.array(actions)
            if packed.dtype.kind in "biuf":
                return {"kind": name, "values": packed}
    return {"kind": "list", "values": list(actions)}


def _unpacked(packed: Any) -> list[Any]:
    kind, values = packed["kind"], packed["values"]
    if kind == "list" and isinstance(values, list):
        return list(values)
    if not isinstance(values, np.ndarray) or values.ndim < 1 or kind not in ("int", "array", "scalar"):
        raise ValueError("actions have another form")
    if kind == "int":
        return [int(value) for value in values]
    return [value.copy() for value in values] if kind == "array" else list(values)
