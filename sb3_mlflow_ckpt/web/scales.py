"""Owns the numbers of a chart: what can be drawn, where, at which ticks, and how they are written. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")

# Beyond it, differences overflow.
_GREATEST = 1e300
# Values that differ by less than this part of themselves are one value: no axis can tell them apart.
_FLAT = 1e-9
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_LARGEST_IN_WORDS = 1e12


def number(value: Any) -> float | None:
    """Return a value that can be drawn as a float; None for NaN, infinities and all that is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # An integer may be too large for a float, but is compared with one exactly.
    return float(value) if -_GREATEST <= value <= _GREATEST else None


@dataclass(frozen=True)
class Scale:
    """A straight line from values to a chart's coordinates.

    Attributes:
        low: The least value.
        high: The greatest, which is greater.
        begin: Where `low` is drawn.
        end: Where `high` is drawn.
    """

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def domain(values: Iterable[float], *, margin: float = 0.0) -> tuple[float, float]:
    """Return the least and the greatest of some values, apart from one another even where they are all one.

    Args:
        values: Numbers that can be drawn.
        margin: Which part of their distance is added on both sides.
    """
    every = list(values) or [0.0]
    low, high = min(every), max(every)
    size = max(abs(low), abs(high))
    flat = high - low <= max(_FLAT * size, 1e-100)
    room = max(size * 0.1, 0.5) if flat else (high - low) * margin
    return low - room, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round values between two: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * unit for factor in (1, 2, 5) if factor * unit >= raw * (1 - 1e-9)), 10 * unit)
    # Of two ticks at most, a step of 5 may be longer than all that is between.
    return _multiples(low, high, step) or _multiples(low, high, 2 * unit)


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float, digits: int = 3) -> str:
    """Return a number in few characters: 950, 1.2k, 50k, 1.2M, 1e15."""
    rounded = float(f"{value:.{digits}g}")
    unit, suffix = next((pair for pair in _UNITS if abs(rounded) >= pair[0]), (1.0, ""))
    if abs(rounded) >= _LARGEST_IN_WORDS:
        unit, suffix = 1.0, ""
    text = f"{rounded / unit:.{digits}g}"
    mantissa, power, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if power else text + suffix


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return how the ticks of one axis are written: with as many digits as tell them apart."""
    return [short(value + 0.0, 10) for value in values]


def reading(value: float) -> str:
    """Return a reward as a sentence says it: 493.2, 12,345.6, 0.0123."""
    if value and not 0.1 <= abs(value) < _LARGEST_IN_WORDS:
        return short(value)
    return f"{value:,.1f}".removesuffix(".0")


def steps(value: float) -> str:
    """Return a number of environment steps as a sentence says it: 12,000."""
    return f"{value:,.0f}" if abs(value) < _LARGEST_IN_WORDS else short(value)


def spread(items: Sequence[Item], most: int) -> Sequence[Item]:
    """Return at most `most` (two or more) of some items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
