"""Owns how values look on a page: numbers, sizes, spans of time, and texts that strangers may have written. Pure.

A record may have been edited: whatever is of the wrong kind is shown as `NOTHING`, never an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.runs.comparison import MISSING
from sb3_mlflow_ckpt.web import scales

NOTHING = "\N{EN DASH}"
_LONGEST_TEXT = 4000
_SIZES = ("kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Moment:
    """An instant, in UTC.

    Attributes:
        iso: As RFC 3339, for programs; a page's script shows its age.
        text: For people.
    """

    iso: str
    text: str


def text(value: Any) -> str:
    """Return a value as one line of text; `NOTHING` where there is none."""
    return NOTHING if value is None or value == "" else printable(str(value))[:_LONGEST_TEXT]


def lines(value: Any) -> str:
    """Return a text of many lines, such as a traceback."""
    return printable(value, keep="\n\t") if isinstance(value, str) else ""


def count(value: Any) -> str:
    """Return a whole number with thousands apart."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18 else NOTHING


def reward(value: Any) -> str:
    """Return a reward."""
    found = scales.number(value)
    return NOTHING if found is None else scales.reading(found).replace("-", "\N{MINUS SIGN}")


def size(value: Any) -> str:
    """Return a number of bytes."""
    found = scales.number(value)
    if found is None or found < 0:
        return NOTHING
    if found < 1000:
        return f"{found:.0f} B"
    power = min(len(_SIZES), int(math.log10(found) // 3))
    return f"{found / 1000**power:.3g} {_SIZES[power - 1]}"


def moment(value: Any) -> Moment | None:
    """Return an instant that a record holds, or None where it is none."""
    try:
        found = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        if found.tzinfo is None:
            found = found.replace(tzinfo=timezone.utc)
        found = found.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    iso = found.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Moment(iso, f"{found:%Y-%m-%d %H:%M:%S} UTC")


def span(begin: Any, end: Any) -> str:
    """Return the time between two instants: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    first, last = moment(begin), moment(end)
    if first is None or last is None:
        return NOTHING
    seconds = (datetime.fromisoformat(last.iso[:-1]) - datetime.fromisoformat(first.iso[:-1])).total_seconds()
    return NOTHING if seconds < 0 else duration(seconds)


def duration(seconds: float) -> str:
    """Return a span of time."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def setting(value: Any) -> str:
    """Return a setting's value as YAML would take it: `null`, `true`, `0.0003`, `[64, 64]`."""
    if value is MISSING:
        return "not set"
    if isinstance(value, str):
        return text(value) if value else '""'
    try:
        return printable(json.dumps(value, ensure_ascii=False))[:_LONGEST_TEXT]
    except (ValueError, TypeError):
        return text(value)


def short_id(run_id: Any) -> str:
    """Return the beginning of an id, by which people know a run; a name that somebody gave stays whole."""
    shown = text(run_id)
    return shown[:8] if len(shown.replace("-", "")) == 32 else shown
