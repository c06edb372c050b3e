"""Owns the frame of a chart: its area, grid, axis labels, and how a line and a mark become SVG. Pure.

Nothing here has a colour or an inline style: presentation attributes say what a drawing is without a style sheet, and
classes let one say the rest.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from markupsafe import Markup

from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.web.scales import Scale, domain, tick_labels, ticks

Point: TypeAlias = "tuple[float, float | None]"
"""Environment steps, and a reward or None for a gap."""
Place: TypeAlias = "tuple[float, float]"

_CHARACTER = 7.5
"""Width of an axis label's character: no font is at hand to ask."""
_TOP, _BOTTOM, _RIGHT = 26.0, 30.0, 18.0


@dataclass(frozen=True)
class Frame:
    """A chart's size, and the scales of its area.

    Attributes:
        width: Of the whole drawing.
        height: Of the whole drawing.
        x: From environment steps to the right.
        y: From rewards up.
    """

    width: int
    height: int
    x: Scale
    y: Scale

    def place(self, point: Place) -> Place:
        """Return where a point is drawn."""
        return self.x(point[0]), self.y(point[1])

    def grid(self) -> Markup:
        """Return grid lines with their labels, which a screen reader is spared: the description says more."""
        across = ticks(self.x.low, self.x.high, max(2, self.width // 110))
        up = ticks(self.y.low, self.y.high, max(2, self.height // 50))
        left, right, top, bottom = map(coordinate, (self.x.begin, self.x.end, self.y.end, self.y.begin))
        lines = [f"M{left},{coordinate(self.y(value))}H{right}" for value in up]
        lines += [f"M{coordinate(self.x(value))},{top}V{bottom}" for value in across]
        labels = [
            _label(self.x(value), self.y.begin + 18, "middle", text)
            for value, text in zip(across, tick_labels(across), strict=True)
        ]
        labels += [
            _label(self.x.begin - 8, self.y(value) + 4, "end", text)
            for value, text in zip(up, tick_labels(up), strict=True)
        ]
        labels.append(_label(4, 13, "start", "mean reward"))
        labels.append(_label(self.x.end, 13, "end", "environment steps \u2192"))
        return Markup(
            '<g aria-hidden="true"><path class="grid" d="{}" fill="none" stroke="currentColor" stroke-opacity=".15"/>'
            '<path class="axis" d="M{},{}H{}" fill="none" stroke="currentColor" stroke-opacity=".5"/>'
            '<g class="axis-labels" font-size="12" fill="currentColor">{}</g></g>'
        ).format("".join(lines), left, bottom, right, Markup("").join(labels))

    def line(self, points: Iterable[Point]) -> str:
        """Return the path of a line: a new part after each gap and where steps went back; a lone point is a dot."""
        return "".join(_part([self.place(point) for point in part]) for part in _parts(points))


def frame(points: Sequence[Place], width: int, height: int) -> Frame:
    """Return the frame that some points fit into."""
    low, high = domain((point[1] for point in points), margin=0.08)
    labels = tick_labels(ticks(low, high, max(2, height // 50)))
    left = min(16 + _CHARACTER * max(map(len, labels), default=0), width / 3)
    x = domain(_steps_of(points))
    return Frame(width, height, Scale(*x, left, width - _RIGHT), Scale(low, high, height - _BOTTOM, _TOP))


def _steps_of(points: Sequence[Place]) -> list[float]:
    """Return the environment steps of an axis: from 0 where that costs little room."""
    found = [point[0] for point in points]
    low, high = min(found), max(found)
    return [0.0, high or 1.0] if 0 <= low <= high / 2 or low == high >= 0 else [low, high]


def svg(name: str, description: str, classes: str, size: tuple[int, int], content: Iterable[Markup]) -> Markup:
    """Return a drawing that has a name and a description and may hold links."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="group" '
        'aria-label="{}"><desc>{}</desc>{}</svg>'
    ).format(classes, *size, *size, shown(name), shown(description), Markup("").join(content))


def legible(places: Sequence[float], distance: float) -> list[int]:
    """Return which of some places are drawn, the most important first, so that none is closer to another than that."""
    taken: list[float] = []
    chosen = []
    for index, place in enumerate(places):
        at = bisect.bisect(taken, place)
        if all(abs(place - other) >= distance for other in taken[max(0, at - 1) : at + 1]):
            taken.insert(at, place)
            chosen.append(index)
    return chosen


def coordinate(value: float) -> str:
    """Return a coordinate: a tenth of a pixel is enough."""
    return f"{value + 0.0:.1f}".removesuffix(".0")


def shown(text: str) -> str:
    """Return a text without the characters that no XML may hold."""
    return printable(text)


def _label(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(coordinate(x), coordinate(y), anchor, text)


def _parts(points: Iterable[Point]) -> Iterator[list[Place]]:
    part: list[Place] = []
    for step, reward in points:
        if part and (reward is None or step < part[-1][0]):
            yield part
            part = []
        if reward is not None:
            part.append((step, reward))
    if part:
        yield part


def _part(places: Sequence[Place]) -> str:
    rounded = [place for place, _ in itertools.groupby(f"{coordinate(x)},{coordinate(y)}" for x, y in places)]
    return "M" + ("L".join(rounded) if len(rounded) > 1 else f"{rounded[0]}h0")
