"""Owns the reading of JSON that a stranger may have written: bounded in depth and numbers, no key twice. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

DEPTH = 64
LONGEST_INTEGER = 300
"""Digits: the states of random number generators are integers of hundreds of bits."""


def loads(content: bytes | str, *, finite: bool = True) -> Any:
    """Return the value in a JSON text.

    Args:
        content: The text.
        finite: Whether NaN and infinities are refused; our own state may hold them, our metadata never does.

    Raises:
        ValueError: It is not JSON, is nested too deeply, says a key twice, or holds a number out of all bounds.
    """
    try:
        value = json.loads(
            content,
            parse_constant=_refuse if finite else float,
            parse_float=_finite if finite else float,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"it holds the number {text[:20]}")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        # Readers differ in which of the two they take.
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds the key {next(n for n in names if names.count(n) > 1)[:40]!r} twice")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [item for part in level if isinstance(part, (dict, list)) for item in _items(part)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _items(part: dict[str, Any] | list[Any]) -> Any:
    return part.values() if isinstance(part, dict) else part
