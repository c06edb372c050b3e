"""Owns the member `data` of a checkpoint's zip, SB3's own JSON of everything that is no tensor.

The training thread copies values; they become text, pickles and all, in the thread that writes.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch as th
from stable_baselines3.common.save_util import data_to_json

Data: TypeAlias = Callable[[], str]
"""Returns the member's content: to be called once, by the thread that writes."""

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum, np.generic, np.dtype, th.dtype, th.device),
    *(FunctionType, BuiltinFunctionType),
    # Its own random state aside, which a loaded model does not go on with.
    gymnasium.Space,
)
# What stands for the same text as long as it is the same object. A function may refer to what changes.
_CONSTANT = (type, gymnasium.Space)
_PLAIN = frozenset({type(None), bool, int, float, str})
# How a class says that its objects are more than their attributes.
_OWN_WAYS = frozenset(
    f"__{name}__"
    for name in ("deepcopy", "reduce", "reduce_ex", "getstate", "setstate", "slots", "getnewargs", "getnewargs_ex")
)
_SB3 = ("stable_baselines3", "sb3_contrib")


class DataRecorder:
    """Captures a model's attributes again and again; what cannot change between is turned into text once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, str]] = {}

    def capture(self, attributes: Mapping[str, Any], copied: Mapping[str, Any] | None = None) -> Data:
        """Return what will render attributes as they are now.

        Args:
            attributes: The values by name.
            copied: Those that are copies already.
        """
        copies, rendered = dict(copied or {}), dict[str, str]()
        for name, value in attributes.items():
            if name in copies:
                continue
            try:
                copies[name] = value if type(value) in _PLAIN else _copied(value)
            except Exception:
                # What cannot be copied may change while it is pickled, so that cannot wait.
                rendered[name] = _entry(name, value)
        return lambda: self._render(attributes.keys(), copies, rendered)

    def _render(self, names: Iterable[str], copies: Mapping[str, Any], rendered: Mapping[str, str]) -> str:
        entries = [rendered[name] if name in rendered else self._entry(name, copies[name]) for name in names]
        return "{\n" + ",\n".join(entries) + "\n}"

    def _entry(self, name: str, value: Any) -> str:
        if not isinstance(value, _CONSTANT):
            return _entry(name, value)
        known = self._known.get(name)
        if known is None or known[0] is not value:
            known = self._known[name] = value, _entry(name, value)
        return known[1]


def _copied_object(value: Any) -> Any:
    kind = type(value)
    if any(not _OWN_WAYS.isdisjoint(vars(base)) for base in kind.__mro__[:-1]):
        return copy.deepcopy(value)
    # What deepcopy does for an object that has nothing but attributes, in a fifth of the time.
    copied: Any = object.__new__(kind)
    vars(copied).update({name: _copied(item) for name, item in vars(value).items()})
    return copied


def _entry(name: str, value: Any) -> str:
    """Return the lines that SB3's JSON has for an attribute."""
    if type(value) in _PLAIN:
        return f"    {json.dumps(name)}: {json.dumps(value)}"
    return data_to_json({name: value})[2:-2]


def _copied(value: Any) -> Any:
    """Return a copy that shares nothing which changes; copy.Error where only a pickle of it is one."""
    if isinstance(value, _IMMUTABLE):
        return value
    kind = type(value)
    if kind is np.ndarray and not value.dtype.hasobject:
        return value.copy()
    if kind is th.Tensor:
        return value.detach().clone()
    if kind is dict:
        return {key: item if type(item) in _PLAIN else _copied(item) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return kind(map(_copied, value))
    if kind is deque:
        return deque(map(_copied, value), value.maxlen)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*map(_copied, value))
    if kind.__module__.partition(".")[0] in _SB3 and not isinstance(value, th.nn.Module):
        # Schedules and noise, small ones.
        return _copied_object(value)
    raise copy.Error(f"{kind} is not copied")
