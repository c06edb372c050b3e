"""Owns how single values of a run look in a terminal. What a stranger may have written is shown, never obeyed. Pure."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from rich.markup import escape

from sb3_mlflow_ckpt.printable import printable

NOTHING = "-"
SHORTEST_ID = 8

_COLOURS = {
    "running": "green", "stalled": "yellow", "lost": "red", "completed": "cyan", "failed": "red",
    "interrupted": "yellow",
}  # fmt: skip
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-~=+*#"
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def text(value: Any) -> str:
    """Return any value as markup that shows it as it is."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(printable(str(value), keep="\n"))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, empty for what is none: a record that somebody edited is shown as far as it is understood."""
    return value if isinstance(value, Mapping) else {}


def status(run: Mapping[str, Any]) -> str:
    """Return a run's status, in its colour."""
    name = str(run.get("status"))
    colour = _COLOURS.get(name)
    return f"[{colour}]{text(name)}[/]" if colour else text(name)


def title(run: Mapping[str, Any]) -> str:
    """Return what a run is called, on one line: its name, else what it trains on what."""
    parts = [str(run[key]) for key in ("algo", "env_id") if run.get(key)]
    return escape(printable(str(run.get("name") or " ".join(parts) or NOTHING)))


def short_ids(run_ids: Iterable[str]) -> dict[str, str]:
    """Return each id, UUIDs cut to as many digits as tell them apart."""
    ids = [str(run_id) for run_id in run_ids]
    cut = [run_id for run_id in ids if is_uuid(run_id)]
    length = SHORTEST_ID
    while length < 32 and len({run_id[:length] for run_id in cut}) < len(set(cut)):
        length += 1
    return {run_id: run_id[:length] if run_id in set(cut) else run_id for run_id in ids}


def is_uuid(text: str) -> bool:
    """Tell whether an id is a whole UUID."""
    try:
        return bool(uuid.UUID(text))
    except ValueError:
        return False


def span(seconds: float) -> str:
    """Return a time span in its greatest unit: `4 s`, `12 min`, `3 h`, `2 d`."""
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "0 s"


def age(timestamp: Any, now: datetime | None = None) -> str:
    """Return how long ago a time of a record was; what is no time is shown as it is."""
    moment = moment_of(timestamp)
    if moment is None:
        return text(timestamp)
    return span(max(0.0, ((now or datetime.now(timezone.utc)) - moment).total_seconds()))


def moment_of(timestamp: Any) -> datetime | None:
    """Return a time of a record, or None for what is no time."""
    try:
        moment = datetime.fromisoformat(str(timestamp).replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def when(timestamp: Any) -> str:
    """Return a time of a record and how long ago it was."""
    return f"{text(timestamp)} ({age(timestamp)} ago)" if moment_of(timestamp) else text(timestamp)


def size(count: Any) -> str:
    """Return a number of bytes as a person reads it."""
    number = _number(count)
    if number is None:
        return text(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def reward(value: Any) -> str:
    """Return a reward in at most some eight characters."""
    number = _number(value)
    if number is None:
        return text(value)
    return f"{number:,.1f}" if abs(number) < 100_000 else f"{number:.2e}"


def percent(progress: Mapping[str, Any]) -> str:
    """Return how much of its target a run has done."""
    done, target = _number(progress.get("num_timesteps")), _number(progress.get("total_timesteps"))
    return f"{min(100, int(100 * done / target))}%" if done is not None and target else NOTHING


def steps(progress: Mapping[str, Any]) -> str:
    """Return how much of its target a run has done, in environment steps."""
    return f"{text(progress.get('num_timesteps'))} / {text(progress.get('total_timesteps'))}"


def sparkline(
    points: Sequence[tuple[int, float]],
    width: int,
    *,
    bounds: tuple[float, float] | None = None,
    reach: tuple[int, int] | None = None,
    ascii_only: bool = False,
) -> str:
    """Return a curve as one line of blocks.

    Args:
        points: `(num_timesteps, reward)`, in the order in which they were made.
        width: How many characters.
        bounds: The rewards of the lowest and the highest block; the curve's own where it is None.
        reach: The environment steps at both ends; the curve's own first and last where it is None.
        ascii_only: Whether the terminal shows ASCII alone.
    """
    shown = [(step, value) for step, value in points if math.isfinite(value)]
    if not shown:
        return ""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    low, high = bounds or (min(value for _, value in shown), max(value for _, value in shown))
    first, last = reach or (min(step for step, _ in shown), max(step for step, _ in shown))
    cells: list[str] = [" "] * width
    for step, value in shown:
        share = (value - low) / (high - low) if high > low else 0.5
        # A later point of the same cell stands for it.
        place = (step - first) * width // max(1, last - first)
        cells[min(width - 1, max(0, place))] = blocks[min(7, max(0, int(share * 8)))]
    for index in range(1, max(index for index, cell in enumerate(cells) if cell != " ")):
        if cells[index] == " ":
            cells[index] = cells[index - 1]
    return "".join(cells)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
