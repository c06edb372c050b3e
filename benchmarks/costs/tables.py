"""Owns the tables: medians, in brackets the middle half of the values, and ratios of medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A row's figure -> its column, and what one unit of the column is.
FIGURES = {
    "stall": ("stall, ms", 1e-3),
    "lost": ("lost, ms", 1e-3),
    "background": ("durable after, ms", 1e-3),
    "bytes": ("written, MB", 1e6),
    "peak": ("memory, MB more", 1e6),
}


def costs_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for each policy."""
    tables = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        measured = {row["names"][1]: row for row in own if row["pairs"]}
        size = max((row["state"] for row in measured.values()), default=0)
        tables.append(f"### {policy}: a state of {size / 1e6:.1f} MB\n\n{_costs_table(own, measured)}")
    return "\n\n".join(tables)


def _costs_table(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if not row["pairs"]:
            lines.append([row["method"], f"skipped: {row['skipped']}", *[""] * len(FIGURES)])
            continue
        cells = [_cell(row, figure, measured.get("sb3")) for figure in FIGURES]
        lines.append([row["method"], *cells, _times(ratio(row, measured.get("copy"), "stall"))])
    return table(["method", *(title for title, _ in FIGURES.values()), "stall / memory copy"], lines)


def _cell(row: Mapping[str, Any], figure: str, sb3: Mapping[str, Any] | None) -> str:
    times = _times(ratio(row, sb3, figure))
    return spread(values(row, figure), FIGURES[figure][1]) + (f", {times}" if times else "")


def values(row: Mapping[str, Any], figure: str) -> list[float]:
    """Return the values of one figure."""
    return [pair[figure] for pair in row["pairs"]]


def middle(row: Mapping[str, Any], figure: str) -> float:
    """Return the median of one figure."""
    return statistics.median(values(row, figure))


def ratio(row: Mapping[str, Any], other: Mapping[str, Any] | None, figure: str) -> float | None:
    """Return a figure's median as a multiple of another row's; None where that has none above zero."""
    if other is None or not other["pairs"] or middle(other, figure) <= 0:
        return None
    return middle(row, figure) / middle(other, figure)


def throughput_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the ratios to a training without anything."""
    lines = [
        [
            row["saves"],
            str(row["every"]) if row["every"] else "only at the end",
            row["mlflow"],
            spread(row["ratios"], 1, 3),
            spread(row["end"], 1e-3),
        ]
        for row in rows
    ]
    return table(["saves", "every n episodes", "MLflow", "steps/s, ratio", "wait at the end, ms"], lines)


def start_up_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return times of processes and the differences within each pair."""
    lines = []
    for row in rows:
        more = [own - other for own, other in zip(row["own"], row["other"], strict=False)]
        differs = spread(more, 1e-3) if more else ""
        lines.append([row["what"], spread(row["own"], 1e-3), row["against"], differs])
    return table(["what", "ms", "compared with", "ms more"], lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all but the first column is set to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def spread(numbers: Sequence[float], unit: float, digits: int | None = None) -> str:
    """Return a median, and in brackets the quartiles."""
    scaled = sorted(number / unit for number in numbers)
    center = statistics.median(scaled)
    if len(scaled) < 2:
        return short(center, digits)
    low, _, high = statistics.quantiles(scaled, n=4, method="inclusive")
    return f"{short(center, digits)} ({short(low, digits)} to {short(high, digits)})"


def short(number: float, digits: int | None = None) -> str:
    """Return a number with two significant digits or more, and no more than two decimals."""
    if digits is None:
        size = math.floor(math.log10(abs(number))) if number else 0
        digits = min(2, max(0, 1 - size))
    return f"{number:.{digits}f}"


def _times(factor: float | None) -> str:
    return "" if factor is None else f"x {factor:.2g}" if factor < 10 else f"x {factor:.0f}"
