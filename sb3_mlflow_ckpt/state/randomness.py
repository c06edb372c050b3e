"""Owns the random states of this process and of a model's spaces, as plain values.

The state of an environment's own generators belongs to the environment (`env_state`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from gymnasium import spaces

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

State = dict[str, Any]


def capture(model: BaseAlgorithm) -> State:
    """Return the states of `random`, `numpy.random`, torch on every device in use, and the action space.

    Exploration of off-policy algorithms draws its first actions from the action space's own generator.
    """
    version, words, gauss = random.getstate()
    state: State = {
        "python": {"version": version, "words": np.fromiter(words, np.uint32, len(words)), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),
        "torch": th.get_rng_state().numpy(),  # A copy already.
        "action_space": [_generator_state(space) for space in _parts(model.action_space)],
    }
    if model.device.type == "cuda":
        state["cuda"] = [device.cpu().numpy() for device in th.cuda.get_rng_state_all()]
    if model.device.type == "mps":
        state["mps"] = th.mps.get_rng_state().cpu().numpy()
    return state


def restore(model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Put captured states back: the next number that anybody draws is the one that was next at the capture.

    Raises:
        ValueError: The state is not one that `capture` made, or is of other devices.
    """
    try:
        python = state["python"]
        random.setstate((int(python["version"]), tuple(int(word) for word in python["words"]), python["gauss"]))
        np.random.set_state(dict(state["numpy"]))
        th.set_rng_state(th.from_numpy(np.array(state["torch"], dtype=np.uint8)))
        parts = list(_parts(model.action_space))
        if len(parts) != len(state["action_space"]):
            raise ValueError("the action space has other parts")
        for space, generator in zip(parts, state["action_space"], strict=True):
            _set_generator_state(space, generator)
        if "cuda" in state:
            th.cuda.set_rng_state_all([th.from_numpy(np.array(device, dtype=np.uint8)) for device in state["cuda"]])
        if "mps" in state:
            th.mps.set_rng_state(th.from_numpy(np.array(state["mps"], dtype=np.uint8)))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, AssertionError) as error:
        raise ValueError(f"the random states do not fit this process: {error}") from error


def _parts(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """Yield a space and the spaces within it: each has a generator of its own."""
    yield space
    if isinstance(space, spaces.Dict):
        within = list(space.spaces.values())
    elif isinstance(space, spaces.Tuple):
        within = list(space.spaces)
    else:
        within = []
    for part in within:
        yield from _parts(part)


def _generator_state(space: spaces.Space[Any]) -> Any:
    # Made when it is first used. The property would make it, from the operating system's entropy.
    generator = space._np_random
    return generator.bit_generator.state if generator is not None else None


def _set_generator_state(space: spaces.Space[Any], state: Any) -> None:
    if state is None:
        # Typed as if it were always there.
        vars(space)["_np_random"] = None
    else:
        space.np_random.bit_generator.state = state
