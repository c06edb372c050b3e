"""Owns what of a replay buffer is kept: its arrays by name, and which buffers are understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

Array = NDArray[Any]

_KINDS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer, HerReplayBuffer)
_NAMES = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "ep_start")


def uncaptured_reason(buffer: Any) -> str:
    """Return why a replay buffer is not kept, or nothing where it is."""
    if buffer is None:
        return "there is no replay buffer"
    if type(buffer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        return f"the replay buffer is a {type(buffer).__qualname__}; only {known} are kept"
    for name, column in columns(buffer).items():
        if not isinstance(column, np.ndarray) or not column.flags.c_contiguous or column.dtype.kind not in "biufcSU":
            return f"the replay buffer's {name} are not a plain array"
        if column.shape[:2] != (buffer.buffer_size, buffer.n_envs):
            return f"the replay buffer's {name} are not one for each row and environment"
    return ""


def columns(buffer: Any) -> dict[str, Array]:
    """Return the arrays of a buffer by name; those of dictionary observations with their key after a dot."""
    result: dict[str, Array] = {}
    for name in _NAMES:
        value = getattr(buffer, name, None)
        if isinstance(value, Mapping):
            result |= {f"{name}.{key}": array for key, array in value.items()}
        elif value is not None:
            result[name] = value
    return result


def keeps_infos(buffer: Any) -> bool:
    """Return whether a buffer keeps info dictionaries that its sampling looks at."""
    return bool(getattr(buffer, "copy_info_dict", False))


def row_bytes(buffer: Any) -> int:
    """Return the bytes of one row over all environments."""
    return sum(column[:1].nbytes for column in columns(buffer).values())
