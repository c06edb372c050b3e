"""Owns what of an Atari emulator outlives a reset: its random number generators, its RAM and its frame counter.

The emulator can serialise its whole state, but its reader trusts lengths in those bytes: a crafted state writes beyond
its buffers. So bytes from a file never reach it. A game is replayed from its last reset instead, and only plain
numbers, each of them checked, are set before: they are put into the bytes of a state that this process took itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_mlflow_ckpt.env_state.generators import StateRefusedError

_HEADER = 24
_FRAME_NUMBER = slice(8, 12)
_WORDS = 624


def is_emulator(env: Any) -> bool:
    """Return whether an environment is one of ale_py's."""
    return any(kind.__module__ == "ale_py.env" for kind in type(env).__mro__)


def emulator_state(env: Any) -> dict[str, Any]:
    """Return what outlives a reset, as arrays."""
    parts = _Parts(env.ale)
    return {
        "system": _numbers(parts.system),
        "sticky": _numbers(parts.sticky),
        "ram": np.array(env.ale.getRAM(), dtype=np.uint8),
        "frame_number": parts.frame_number,
    }


def set_emulator_state(env: Any, state: Any) -> None:
    """Put back what `emulator_state` returned.

    Raises:
        StateRefusedError: It is no such state.
    """
    import ale_py

    ram = np.array(env.ale.getRAM(), dtype=np.uint8)
    if not isinstance(state, Mapping) or set(state) != {"system", "sticky", "ram", "frame_number"}:
        raise StateRefusedError("the state of the emulator is missing")
    then, frame = state["ram"], state["frame_number"]
    if not isinstance(then, np.ndarray) or (then.dtype, then.shape) != (ram.dtype, ram.shape):
        raise StateRefusedError("the emulator's memory has another size")
    if not isinstance(frame, int) or not 0 <= frame < 2**31:
        raise StateRefusedError("the emulator's frame counter is out of range")
    spliced = _Parts(env.ale).with_numbers(_text(state["system"]), _text(state["sticky"]), frame)
    env.ale.restoreState(ale_py.ALEState(spliced))
    for index, value in enumerate(then.tolist()):
        env.ale.setRAM(index, value)


class _Parts:
    """The bytes of a state that was taken from a running emulator, cut at its two generators."""

    def __init__(self, ale: Any) -> None:
        whole: bytes = ale.cloneState(include_rng=True).serialize()
        (length,) = struct.unpack_from("=i", whole, _HEADER)
        begin = _HEADER + 4
        self._head, inner, self._tail = whole[:_HEADER], whole[begin : begin + length], whole[begin + length :]
        (self.frame_number,) = struct.unpack("=i", self._head[_FRAME_NUMBER])
        at = 0
        for _ in ("cartridge", "System"):
            at += 4 + struct.unpack_from("=i", inner, at)[0]
        at += 4  # Cycles.
        self.system, after = _string(inner, at)
        last = _last_string(inner)
        self._before, self._between = inner[:at], inner[after : last - 4]
        self.sticky = inner[last:]

    def with_numbers(self, system: bytes, sticky: bytes, frame_number: int) -> bytes:
        inner = b"".join([self._before, _sized(system), self._between, _sized(sticky)])
        head = self._head[: _FRAME_NUMBER.start] + struct.pack("=i", frame_number) + self._head[_FRAME_NUMBER.stop :]
        return head + _sized(inner) + self._tail


def _string(content: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("=i", content, at)
    return content[at + 4 : at + 4 + length], at + 4 + length


def _last_string(content: bytes) -> int:
    found = re.search(rb"[0-9 ]+\Z", content)
    # The length in front may happen to look like digits.
    for at in range(found.start(), found.start() + 5) if found else ():
        if struct.unpack_from("=i", content, at - 4)[0] == len(content) - at:
            return at
    raise ValueError("the emulator's state has an unknown form")


def _sized(content: bytes) -> bytes:
    return struct.pack("=i", len(content)) + content


def _numbers(text: bytes) -> Any:
    numbers = np.array([int(number) for number in text.split()], dtype=np.uint32)
    if numbers.shape != (_WORDS + 1,):
        raise ValueError("the emulator's random number generator has an unknown form")
    return numbers


def _text(numbers: Any) -> bytes:
    if not isinstance(numbers, np.ndarray) or numbers.dtype != np.uint32 or numbers.shape != (_WORDS + 1,):
        raise StateRefusedError("the emulator's random number generator has another form")
    if numbers[-1] > _WORDS:
        # The emulator would read beyond the generator's memory.
        raise StateRefusedError("the emulator's random number generator is at an impossible position")
    return b" ".join(str(number).encode() for number in numbers.tolist())
