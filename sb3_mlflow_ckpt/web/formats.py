"""Owns how single values are written on pages: texts of strangers, numbers, sizes, times. Pure; takes any value.

No age is ever written here: a page that says "4 s ago" is another one every second. Times are absolute, and a script
turns them into ages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.runs.comparison import MISSING
from sb3_mlflow_ckpt.web.scales import number, reading, steps

_SHORT_ID = 8
_LONGEST_VALUE = 2000
_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Moment:
    """A time as a page holds it.

    Attributes:
        iso: For machines: RFC 3339 in UTC.
        shown: For people who have no script running.
    """

    iso: str
    shown: str


def text(value: Any) -> str:
    """Return a value as one visible line: nothing in it can steer what is shown around it. None is empty."""
    return "" if value is None else printable(value if isinstance(value, str) else setting(value))


def block(value: Any) -> str:
    """Return a text of several lines, such as a traceback."""
    return printable(value, keep="\n\t") if isinstance(value, str) else text(value)


def setting(value: Any) -> str:
    """Return a configuration's value as a configuration file writes it."""
    if value is MISSING:
        return "not set"
    if isinstance(value, str):
        found = printable(value)
    else:
        try:
            found = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):
            found = str(type(value).__name__)
        found = printable(found)
    return found if len(found) <= _LONGEST_VALUE else f"{found[:_LONGEST_VALUE]}…"


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def string(value: Any) -> str | None:
    """Return a text that is not empty, or None."""
    return value if isinstance(value, str) and value else None


def whole(value: Any) -> int | None:
    """Return a number that counts something, or None."""
    found = number(value)
    return int(found) if found is not None and abs(found) < 1e15 else None


def count(value: Any) -> str:
    """Return a whole number with its thousands apart; empty for what is none."""
    found = whole(value)
    return "" if found is None else steps(found)


def reward(value: Any) -> str:
    """Return a reward; empty for what is none."""
    found = number(value)
    return "" if found is None else reading(found).replace("-", "\N{MINUS SIGN}")


def size(value: Any) -> str:
    """Return a number of bytes: 812 B, 1.4 MB; empty for what is none."""
    found = number(value)
    if found is None or found < 0:
        return ""
    index = 0
    while found >= 999.5 and index < len(_PREFIXES) - 1:
        found, index = found / 1000, index + 1
    return f"{found:.0f} {_PREFIXES[index]}" if index == 0 or found >= 100 else f"{found:.1f} {_PREFIXES[index]}"


def short_id(run_id: str) -> str:
    """Return the beginning of an id: enough to tell runs apart by eye."""
    return printable(run_id[:_SHORT_ID])


def parsed(value: Any) -> datetime | None:
    """Return a record's time, or None for what is no time with a zone."""
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return found.astimezone(timezone.utc) if found.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def moment(value: Any) -> Moment | None:
    """Return a record's time, or None for what is none."""
    found = value if isinstance(value, datetime) else parsed(value)
    if found is None:
        return None
    iso = found.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Moment(iso, found.strftime("%Y-%m-%d %H:%M UTC"))


def duration(seconds: float) -> str:
    """Return a length of time in its two greatest units: 3 d 4 h, 12 min 5 s, 0 s."""
    rest = max(0, int(seconds))
    for index, (unit, worth) in enumerate(_UNITS):
        if rest >= worth or unit == "s":
            parts = [f"{rest // worth} {unit}"]
            if index + 1 < len(_UNITS):
                smaller, less = _UNITS[index + 1]
                part = rest % worth // less
                parts += [f"{part} {smaller}"] if part else []
            return " ".join(parts)
    raise AssertionError("unreachable")


def between(begin: Any, end: Any) -> str:
    """Return how long it is from one of a record's times to a later one; empty where one is none."""
    first, last = parsed(begin), parsed(end)
    return "" if first is None or last is None or last < first else duration((last - first).total_seconds())
