"""Owns the layers of an environment, its wrappers and itself: which attributes are state, read and put back as values.

Only what changed since the environment was made is state. What its constructor was given stays as it is, so that a
resume with other arguments gets what it asks for.
"""

from __future__ import annotations

import enum
import functools
import logging
import pathlib
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from sb3_mlflow_ckpt.env_state.generators import (
    StateRefusedError,
    generators_in,
    get_generator_state,
    is_generator,
    set_generator_state,
)

_NOT_STATE = frozenset(
    {"env", "spec", "metadata", "_metadata", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"}
    # Clocks of one process mean nothing in another.
    | {"t_start", "episode_start_time"}
)
# They grow with the training and nothing that trains reads them: each checkpoint would be longer than the one before.
_MONITOR_HISTORY = frozenset({"episode_returns", "episode_lengths", "episode_times", "results_writer"})
_SCALARS = (bool, int, float, str, bytes, type(None))
_HARMLESS = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial,
    gymnasium.Env, gymnasium.Space, EnvSpec, logging.Logger, pathlib.PurePath, enum.Enum, frozenset, range, np.dtype,
    np.ufunc,
)  # fmt: skip
_PLAIN_KINDS = frozenset("biufcSU")
_DEPTH = 32
_CHECKS = ("checked_reset", "checked_step", "checked_data_reuse")
_MISSING = object()


class Layer:
    """One wrapper, or the environment itself.

    Args:
        env: The wrapper or environment.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self.env = env
        self.name = type(env).__name__
        self.is_wrapper = isinstance(env, gymnasium.Wrapper)
        self.is_monitor = any(kind.__module__ == "stable_baselines3.common.monitor" for kind in type(env).__mro__)
        # It looks at the first calls only, and keeps what they returned.
        self._is_checker = type(env) is gymnasium.wrappers.PassiveEnvChecker
        self._baseline = {name: _copy(value) for name, value in self._values()}

    def changed(self) -> dict[str, Any]:
        """Return copies of the plain attributes that are not what they were when the environment was made."""
        baseline = self._baseline
        return {name: _copy(value) for name, value in self._values() if not _same(value, baseline.get(name, _MISSING))}

    def opaque(self) -> list[str]:
        """Return the names of attributes that could be state and have no plain form."""
        found = []
        for name, value in self._held():
            harmless = isinstance(value, _HARMLESS) or is_generator(value) or (callable(value) and not _fields(value))
            if not harmless and not _is_plain(value):
                found.append(f"{self.name}.{name} ({type(value).__module__}.{type(value).__qualname__})")
        return found

    def fitting(self, stored: Any) -> dict[str, Any]:
        """Return those of some attributes that `check` lets through."""
        fitting = {}
        for name, value in stored.items() if isinstance(stored, Mapping) else ():
            try:
                self.check({name: value})
            except StateRefusedError:
                continue
            fitting[name] = value
        return fitting

    def check(self, stored: Any) -> None:
        """Raise a StateRefusedError unless these attributes can be put back here."""
        if not isinstance(stored, Mapping):
            raise StateRefusedError(f"the attributes of {self.name} are missing")
        held = dict(self._held())
        for name, value in stored.items():
            if not isinstance(name, str) or name in _NOT_STATE or (name not in held and not self._could_begin(name)):
                raise StateRefusedError(f"{self.name} has no attribute {name!r} that could be put back")
            if not _fits(held.get(name), value):
                raise StateRefusedError(f"{self.name}.{name} is a {type(held.get(name)).__name__} of another form here")

    def apply(self, stored: Mapping[str, Any]) -> None:
        """Put attributes back that `check` found right; the others become what they were at first."""
        for name in _CHECKS if self._is_checker else ():
            # It compares the first steps with the reset before them, which a restored environment never had.
            if name in vars(self.env):
                setattr(self.env, name, True)
        for name, value in [*self._values()]:
            then = stored[name] if name in stored else self._baseline.get(name, _MISSING)
            if then is not _MISSING and not _same(value, then):
                self._set(name, value, then)
        held = dict(self._held())
        for name in stored:
            if name not in held:
                setattr(self.env, name, _copy(stored[name]))

    def generators(self) -> Iterator[tuple[str, Any]]:
        """Yield the random number generators that it holds, by the names of their attributes."""
        for name, value in vars(self.env).items():
            if isinstance(value, gymnasium.Space) or is_generator(value):
                yield from generators_in(name, value)

    def generator_states(self) -> dict[str, Any]:
        """Return the states of its generators."""
        return {name: get_generator_state(generator) for name, generator in self.generators()}

    def set_generator_states(self, stored: Any) -> None:
        """Put its generators into states of before; one that is not there yet is left to be made."""
        if not isinstance(stored, Mapping):
            raise StateRefusedError(f"the random number generators of {self.name} are missing")
        if "_np_random" in stored and not self.is_wrapper:
            _ = self.env.np_random
        for name in ("action_space", "_action_space"):
            space = vars(self.env).get(name)
            if name in stored and isinstance(space, gymnasium.Space):
                _ = space.np_random
        for name, generator in self.generators():
            if name in stored:
                set_generator_state(generator, stored[name])

    def _could_begin(self, name: str) -> bool:
        # An attribute that is set later; until then there is none, or a plain default of the class.
        default = getattr(type(self.env), name, None)
        return name.isidentifier() and not name.startswith("__") and isinstance(default, (bool, int, float, type(None)))

    def _held(self) -> Iterator[tuple[str, Any]]:
        if self._is_checker:
            return
        for name, value in vars(self.env).items():
            if name not in _NOT_STATE and not (self.is_monitor and name in _MONITOR_HISTORY):
                yield name, value

    def _values(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in self._held() if _is_plain(value))

    def _set(self, name: str, now: Any, then: Any) -> None:
        if _is_statistics(now):
            vars(now).update(_copy(then))
        elif isinstance(now, deque):
            setattr(self.env, name, deque(_copy(then), now.maxlen))
        else:
            setattr(self.env, name, _copy(then))


def layers_of(env: gymnasium.Env[Any, Any]) -> list[Layer]:
    """Return the layers of an environment, the outermost first."""
    found = [Layer(env)]
    while isinstance(env, gymnasium.Wrapper):
        env = env.env
        found.append(Layer(env))
    return found


def _is_statistics(value: Any) -> bool:
    # The running mean of gymnasium's and SB3's normalising wrappers: a handful of numbers in an object.
    return type(value).__name__ == "RunningMeanStd" and type(value).__module__.startswith(
        ("gymnasium.", "stable_baselines3.")
    )


def _fields(value: Any) -> bool:
    return bool(getattr(value, "__dict__", None))


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is np.ndarray or isinstance(value, np.generic):
        return value.dtype.kind in _PLAIN_KINDS
    if depth > _DEPTH:
        return False
    if kind in (list, tuple, deque):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(key, depth + 1) and _is_plain(item, depth + 1) for key, item in value.items())
    return _is_statistics(value) and _is_plain(vars(value), depth + 1)


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is np.ndarray:
        return value.copy()
    if kind in (list, deque):
        return [_copy(item) for item in value]
    if kind is tuple:
        return tuple(_copy(item) for item in value)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return _copy(vars(value)) if _is_statistics(value) else value


def _same(one: Any, other: Any) -> bool:
    """Return whether a value is what its copy says; bytes count, so that -0.0 is not 0.0."""
    kind = type(one)
    if kind is deque or _is_statistics(one):
        return _same(_copy(one), other)
    if kind is not type(other):
        return False
    if kind is np.ndarray or isinstance(one, np.generic):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if kind is dict:
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if kind is float:
        return bool(one.hex() == other.hex())
    return bool(one == other)


def _fits(now: Any, then: Any) -> bool:
    """Return whether a value from a file may take an attribute's place: numbers for numbers, never a new text."""
    if isinstance(then, (str, bytes)):
        # A text may name a file or a command.
        return bool(now == then)
    if isinstance(now, np.ndarray) and isinstance(then, np.ndarray):
        return bool(now.dtype.kind == then.dtype.kind and now.shape == then.shape)
    if isinstance(then, Mapping):
        now = vars(now) if _is_statistics(now) else now
        known = now if isinstance(now, Mapping) else {}
        return (now is None or isinstance(now, Mapping)) and all(_fits(known.get(k), v) for k, v in then.items())
    if isinstance(then, (list, tuple)):
        expected: Any = (list, deque) if isinstance(then, list) else tuple
        same_length = isinstance(now, (list, tuple, deque)) and len(now) == len(then)
        known_items = list(now) if same_length else [None] * len(then)
        return (now is None or isinstance(now, expected)) and all(map(_fits, known_items, then))
    is_number = isinstance(then, (bool, int, float, np.generic)) or then is None
    plain_now = now is None or isinstance(now, (bool, int, float, np.generic))
    # An array without dimensions becomes a number as soon as it is calculated with.
    plain_now = plain_now or (isinstance(now, np.ndarray) and now.shape == ())
    # Where nothing was yet, an array may come.
    return (is_number and (plain_now or then is None)) or (isinstance(then, np.ndarray) and plain_now)
