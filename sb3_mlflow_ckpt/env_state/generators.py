"""Owns the states of random number generators: found in what an object holds, read as plain values, put back checked.

numpy and Python check little of a state that they are given, and a wrong position reads beyond the generator's memory,
so everything that comes from a file is compared with the generator that it is meant for first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np

# The places in a state that count positions in the generator's memory, and the greatest that each may hold.
_POSITIONS = {"pos": 624, "buffer_pos": 4}
_KNOWN = frozenset({"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"})


class StateRefusedError(ValueError):
    """A state does not fit the environment that it is put into; the message is one sentence."""


def is_generator(value: Any) -> bool:
    """Return whether a value is a random number generator of numpy or Python."""
    return isinstance(value, (np.random.Generator, np.random.RandomState, random.Random))


def generators_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the generators of a value, itself or those of a space and the spaces within, by their names."""
    if is_generator(value):
        yield name, value
    elif isinstance(value, gymnasium.Space):
        if value._np_random is not None:
            yield name, value._np_random
        inner = getattr(value, "spaces", None)
        if inner is not None:
            for key, space in inner.items() if isinstance(inner, Mapping) else enumerate(inner):
                yield from generators_in(f"{name}.{key}", space)


def get_generator_state(generator: Any) -> Any:
    """Return a generator's state as plain values."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator.getstate()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put a generator into a state that `get_generator_state` returned, of the same kind of generator.

    Raises:
        StateRefusedError: It is no such state.
    """
    _check(get_generator_state(generator), state)
    try:
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        else:
            generator.setstate(state)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise StateRefusedError(f"the state of a random number generator is refused: {error}") from error


def get_global_state() -> dict[str, Any]:
    """Return the states of the process's own generators."""
    return {"random": random.getstate(), "numpy": np.random.get_state(legacy=False)}


def set_global_state(state: Any) -> None:
    """Put the process's own generators into a state that `get_global_state` returned."""
    if not isinstance(state, Mapping) or set(state) != {"random", "numpy"}:
        raise StateRefusedError("the states of the process's random number generators are missing")
    for now, then in zip(get_global_state().values(), (state["random"], state["numpy"]), strict=True):
        _check(now, then)
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])


def _check(own: Any, state: Any, name: str = "") -> None:
    if isinstance(own, Mapping):
        fits = isinstance(state, Mapping) and set(own) == set(state)
        for key, value in own.items() if fits else ():
            _check(value, state[key], str(key))
    elif isinstance(own, tuple):
        fits = isinstance(state, tuple) and len(own) == len(state)
        for one, other in zip(own, state, strict=True) if fits else ():
            _check(one, other)
    elif isinstance(own, np.ndarray):
        fits = isinstance(state, np.ndarray) and (own.dtype, own.shape) == (state.dtype, state.shape)
    elif isinstance(own, str):
        fits = own == state and (name != "bit_generator" or own in _KNOWN)
    elif isinstance(own, (int, np.integer)):
        most = _POSITIONS.get(name, 2**128 - 1)
        fits = isinstance(state, (int, np.integer)) and 0 <= int(state) <= most
    else:  # A float (a normal number that was drawn ahead), or None in its place.
        fits = state is None or isinstance(state, (float, np.floating))
    if not fits:
        raise StateRefusedError("the state of a random number generator is not one of this kind of generator")
