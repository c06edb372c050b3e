"""Owns learning curves: their points in `metrics.jsonl`, and which few of them stand for all.

A curve of days has a million points, a chart shows some hundred. Each point has a *level*: the greatest k for which
its line holds a byte whose offset in the file is a multiple of 2**k. The points of a level or more lie evenly in the
file, a later point changes nothing in those before it, a file finds them without reading the others, and a database
finds them by an index: every store picks the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sb3_mlflow_ckpt import atomic, json_lines
from sb3_mlflow_ckpt.json_lines import PlacedLine
from sb3_mlflow_ckpt.layout import RunFolder

HIGHEST_LEVEL = 62
"""That of a file's first line."""


class PlacedPoint(NamedTuple):
    """A point of a learning curve, its level, and the offset behind its line."""

    point: dict[str, Any]
    level: int
    end: int


def level_of(start: int, end: int) -> int:
    """Return the level of the line from the byte `start` to before the byte `end`."""
    return HIGHEST_LEVEL if start == 0 else ((start - 1) ^ (end - 1)).bit_length() - 1


def lowest_level(size: int, points: int) -> int:
    """Return the level from which on a file holds at most twice as many points as are wanted.

    Args:
        size: The file's, in bytes up to the end of its last point.
        points: How many are wanted.
    """
    return max(0, (size // (2 * points)).bit_length())


def placed_points(lines: Iterable[PlacedLine]) -> list[PlacedPoint]:
    """Return the points in lines, each once: `time` and `num_timesteps` identify it in a run.

    Rows that lack either are no points and are left out.
    """
    points = {}
    for row, start, end in lines:
        if is_point(row):
            points[row["time"], row["num_timesteps"]] = PlacedPoint(row, level_of(start, end), end)
    return [*points.values()]


def is_point(row: Mapping[str, Any]) -> bool:
    """Return whether a row tells its place in a curve."""
    return isinstance(row.get("time"), (str, int, float)) and isinstance(row.get("num_timesteps"), int)


def read_points(path: Path, offset: int = 0, at_most: int = -1) -> tuple[list[PlacedPoint], int]:
    """Read points from a byte offset on, as `json_lines.read_lines` reads lines."""
    lines, offset = json_lines.read_placed_lines(path, offset, at_most)
    return placed_points(lines), offset


def read_curve(folder: RunFolder, points: int | None = None) -> list[dict[str, Any]]:
    """Return the points of a run's learning curve, by time.

    Args:
        folder: The run's.
        points: At most so many, evenly spread, the first and the last among them; all where it is None.
    """
    if points is None:
        return [placed.point for placed in in_order(read_points(folder.metrics)[0])]
    return thinned(_sample(folder.metrics, points), points)


def in_order(points: Iterable[PlacedPoint]) -> list[PlacedPoint]:
    """Return points by time; a database sorts numbers before strings, and the order is the same here."""
    return sorted(points, key=lambda placed: _place(placed.point))


def _place(point: dict[str, Any]) -> tuple[bool, Any, int]:
    return isinstance(point["time"], str), point["time"], point["num_timesteps"]


def thinned(points: Iterable[PlacedPoint], at_most: int) -> list[dict[str, Any]]:
    """Return at most so many points by time: those of the higher levels, and always the last."""
    ordered = in_order(points)
    others, last = ordered[:-1], ordered[-1:]
    level = 0
    while others and len(others) >= at_most:
        level += 1
        others = [placed for placed in others if placed.level >= level]
    return [placed.point for placed in (*others, *last)]


def _sample(path: Path, points: int) -> list[PlacedPoint]:
    """Read the points of the levels that are wanted, and the last."""
    try:
        with atomic.opened(path) as file:
            last = _last_line(file)
            if last is None:
                return []
            lines = []
            stride, offset = 1 << lowest_level(last.end, points), 0
            while offset < last.start:
                row, start, end = json_lines.read_line_at(file, offset)
                if row is not None:
                    lines.append(PlacedLine(row, start, end))
                offset = -(-end // stride) * stride
    except FileNotFoundError:
        return []
    return placed_points([*lines, last])


def _last_line(file: BinaryIO) -> PlacedLine | None:
    """Return the last line that is whole and JSON: a torn one may lie behind it."""
    start = file.seek(0, os.SEEK_END)
    while start > 0:
        row, start, end = json_lines.read_line_at(file, start - 1)
        if row is not None:
            return PlacedLine(row, start, end)
    return None
