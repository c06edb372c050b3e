"""Owns the running checksum of what an environment answers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import numpy as np

_OUTCOME = struct.Struct("<d??").pack


def add_observation(value: Any, crc: int) -> int:
    """Return the checksum with an observation, also of dictionaries and tuples, added to it."""
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return crc32(value.data if value.flags.c_contiguous else value.tobytes(), crc)
    if isinstance(value, np.generic):
        return crc32(value.tobytes(), crc)
    if isinstance(value, Mapping):
        for key, item in value.items():
            crc = add_observation(item, crc32(repr(key).encode(), crc))
        return crc
    if isinstance(value, (list, tuple)):
        for item in value:
            crc = add_observation(item, crc)
        return crc
    return crc32(repr(value).encode(), crc)


def add_step(observation: Any, reward: Any, terminated: Any, truncated: Any, crc: int) -> int:
    """Return the checksum with the answer to one action added to it."""
    if type(observation) is np.ndarray and observation.flags.c_contiguous and observation.dtype.kind != "O":
        crc = crc32(observation.data, crc)
    else:
        crc = add_observation(observation, crc)
    try:
        return crc32(_OUTCOME(reward, terminated, truncated), crc)
    except (struct.error, TypeError):
        return crc32(repr((reward, bool(terminated), bool(truncated))).encode(), crc)
