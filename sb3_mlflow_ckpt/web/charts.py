"""Owns the charts of the pages: sparklines, the reward curve of a chain of runs, and curves over each other. Pure.

They are SVG that the server draws, so that a page shows them without a script. What does not shrink with a drawing is
its text: a chart is drawn twice, and the style sheet shows the one that fits.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from sb3_mlflow_ckpt.runs.lineage import Segment
from sb3_mlflow_ckpt.web.plot import Frame, Place, Point, coordinate, frame, legible, shown, svg
from sb3_mlflow_ckpt.web.scales import Scale, domain, number, reading, spread, steps

_NARROW = (360, 250)
_SPARKLINE = (96, 24)
_SPARKLINE_POINTS = 60
_BETWEEN_CHECKPOINTS = 14.0
_BETWEEN_RESUMES = 6.0
_DASHES = ("", "7 3", "2 3", "10 3 2 3", "5 5", "12 4", "1 4", "8 3 2 3 2 3")


@dataclass(frozen=True)
class Series:
    """One run in a comparison.

    Attributes:
        run_id: The run; its page is linked.
        label: What the run is called.
        points: Its curve, as a reader gives it.
    """

    run_id: str
    label: str
    points: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Mark:
    """A checkpoint in the chart: where it is and, where its reward is known, how high."""

    episode: int
    step: float
    reward: float | None
    title: str
    classes: str


def sparkline(rewards: Sequence[tuple[int, float]]) -> Markup:
    """Return a run's rewards as a line in a table's cell, its last point marked; nothing for a run without rewards.

    Args:
        rewards: `(num_timesteps, ep_rew_mean)`.
    """
    points = _drawable((number(step) or 0.0, number(reward)) for step, reward in rewards)
    if not points:
        return Markup("")
    width, height = _SPARKLINE
    x, y = domain(point[0] for point in points), domain(point[1] for point in points)
    area = Frame(width, height, Scale(*x, 3, width - 4), Scale(*y, height - 4, 4))
    told = points[0][1], points[-1][1], max(point[1] for point in points)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="sparkline" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
        'role="img"><title>Mean reward: first {2}, last {3}, best {4}</title>'
        '<path d="{5}" fill="none" stroke="currentColor" stroke-linecap="round" stroke-linejoin="round"/>'
        '<circle cx="{6}" cy="{7}" r="2.5" fill="currentColor"/></svg>'
    ).format(
        *(width, height),
        *map(reading, told),
        area.line(spread(points, _SPARKLINE_POINTS)),
        *map(coordinate, area.place(points[-1])),
    )


def reward_chart(
    segments: Sequence[Segment], checkpoints: Sequence[Mapping[str, Any]], *, width: int = 960, height: int = 320
) -> Markup:
    """Return the reward over environment steps of a run and, muted, of the runs that it came from.

    Args:
        segments: The parts of the curve, the run's own last.
        checkpoints: The run's own, as items of `checkpoint_paths`: each is a link to `#ep-<episode>`.
        width: Of the drawing for a wide page.
        height: Of the drawing for a wide page.
    """
    ancestors: list[Point] = []
    for segment in segments[:-1]:
        ancestors += [*_points(segment.points), (0.0, None)]
    own = _points(segments[-1].points) if segments else []
    resumed = [step for step in (number(segment.until_timestep) for segment in segments[:-1]) if step is not None]
    marks = _marks(checkpoints, _drawable(own))
    extent = _drawable([*ancestors, *own, *((mark.step, mark.reward) for mark in marks)])
    if not extent:
        return Markup('<p class="chart-empty">No episode has ended yet: there is no reward to draw.</p>')
    # What has no height widens the chart alone.
    extent += [(step, extent[0][1]) for step in (*resumed, *(mark.step for mark in marks))]

    def content(area: Frame) -> Iterable[Markup]:
        yield area.grid()
        yield from _resume_points(area, resumed)
        yield _curve("curve curve-ancestor", area.line(spread(ancestors, area.width * 3 // 5)))
        yield _curve("curve", area.line(spread(own, area.width * 3 // 5)))
        yield from _best_point(area, _drawable(own))
        yield _checkpoint_links(area, marks)

    described = _course(_drawable(own)) + "".join(f"; resumed at {steps(step)} steps" for step in resumed[-3:])
    described += f"; {len(marks)} checkpoints" if marks else ""
    return _box(_twice("Mean reward by environment steps", described, (width, height), extent, content))


def comparison_chart(series: Sequence[Series], *, width: int = 960, height: int = 360) -> Markup:
    """Return the rewards of several runs over each other, and a legend that links to their pages.

    Colours are the style sheet's, by the classes `series-0` to `series-7`; dashes and numbers tell lines apart without
    them.
    """
    lines = [_points(one.points) for one in series]
    legend = Markup("").join(_legend_entry(index, one) for index, one in enumerate(series))
    legend = Markup('<ol class="chart-legend">{}</ol>').format(legend)
    extent = [place for line in lines for place in _drawable(line)]
    if not extent:
        return _box(Markup('<p class="chart-empty">None of these runs has a reward yet.</p>'), legend)

    def content(area: Frame) -> Iterable[Markup]:
        yield area.grid()
        for index, line in enumerate(lines):
            yield _series_line(index, area.line(spread(line, max(2, area.width * 3 // 5 // len(lines)))))
        yield from _series_ends(area, [_drawable(line) for line in lines])

    courses = (f"{index + 1}, {one.label}: {_course(_drawable(lines[index]))}" for index, one in enumerate(series))
    name = "Mean reward by environment steps of several runs"
    return _box(_twice(name, "; ".join(courses), (width, height), extent, content), legend)


def _twice(
    name: str,
    description: str,
    size: tuple[int, int],
    extent: Sequence[Place],
    content: Callable[[Frame], Iterable[Markup]],
) -> Markup:
    variants = (("chart chart-wide", size), ("chart chart-narrow", _NARROW))
    drawn = (svg(name, description, classes, room, content(frame(extent, *room))) for classes, room in variants)
    return Markup("").join(drawn)


def _box(*parts: Markup) -> Markup:
    return Markup('<div class="chart-box">{}</div>').format(Markup("").join(parts))


def _points(curve: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return a curve's points that have a place on the axis of steps."""
    pairs = ((number(point.get("num_timesteps")), number(point.get("ep_rew_mean"))) for point in curve)
    return [(step, reward) for step, reward in pairs if step is not None]


def _drawable(points: Iterable[Point]) -> list[Place]:
    return [(step, reward) for step, reward in points if reward is not None]


def _course(points: Sequence[Place]) -> str:
    """Return in words how a curve goes."""
    if not points:
        return "no reward yet"
    (begin, first), (end, last), best = points[0], points[-1], max(points, key=lambda point: point[1])
    return (
        f"from {reading(first)} at {steps(begin)} steps to {reading(last)} at {steps(end)} steps, "
        f"best {reading(best[1])} at {steps(best[0])} steps"
    )


def _curve(classes: str, path: str) -> Markup:
    if not path:
        return Markup("")
    return Markup(
        '<path class="{}" d="{}" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" '
        'stroke-linejoin="round"/>'
    ).format(classes, path)


def _resume_points(area: Frame, resumed: Sequence[float]) -> Iterable[Markup]:
    newest_first = resumed[::-1]
    for index in legible([area.x(step) for step in newest_first], _BETWEEN_RESUMES):
        step = newest_first[index]
        yield Markup(
            '<path class="resume" d="M{},{}V{}" fill="none" stroke="currentColor" stroke-dasharray="4 4">'
            "<title>Resumed at {} steps</title></path>"
        ).format(*map(coordinate, (area.x(step), area.y.end, area.y.begin)), steps(step))


def _best_point(area: Frame, points: Sequence[Place]) -> Iterable[Markup]:
    if not points:
        return
    best = max(points, key=lambda point: point[1])
    x, y = area.place(best)
    # Beside the curve's last point there is no room to the right.
    anchor = "end" if x > area.width * 0.75 else "start" if x < area.width * 0.25 else "middle"
    yield Markup(
        '<g class="best" aria-hidden="true"><circle cx="{0}" cy="{1}" r="5" fill="none" stroke="currentColor" '
        'stroke-width="1.5"/><text x="{0}" y="{2}" text-anchor="{3}" font-size="12" '
        'fill="currentColor">best {4}</text></g>'
    ).format(coordinate(x), coordinate(y), coordinate(y - 9), anchor, reading(best[1]))


def _marks(checkpoints: Iterable[Mapping[str, Any]], curve: Sequence[Place]) -> list[_Mark]:
    """Return the checkpoints that have a place, the newest first, behind it the best, then the others by age."""
    rising = sorted(curve)
    known = []
    for item in checkpoints:
        episode, step = item.get("episode"), number(item.get("num_timesteps"))
        if isinstance(episode, int) and not isinstance(episode, bool) and step is not None:
            known.append((episode, step, number(item.get("mean_reward")), str(item.get("state"))))
    known.sort(reverse=True)
    rewards = [reward for _, _, reward, _ in known if reward is not None]
    best = next((index for index, mark in enumerate(known) if rewards and mark[2] == max(rewards)), 0)
    marks = []
    for episode, step, reward, state in known:
        title = f"Checkpoint of episode {episode}, {steps(step)} steps"
        title += f", mean reward {reading(reward)}" if reward is not None else ""
        title += ", pruned" if state == "pruned" else ""
        classes = "checkpoint checkpoint-pruned" if state == "pruned" else "checkpoint"
        marks.append(_Mark(episode, step, _height(rising, step, reward), title, classes))
    if best:
        marks.insert(1, marks.pop(best))
    return marks


def _height(curve: Sequence[Place], step: float, reward: float | None) -> float | None:
    """Return how high a curve, sorted by steps, is at a step: beside its ends, the reward that is known there."""
    if not curve or not curve[0][0] <= step <= curve[-1][0]:
        return reward
    at = bisect.bisect(curve, (step,))
    before, behind = curve[max(0, at - 1)], curve[min(at, len(curve) - 1)]
    if behind[0] <= before[0]:
        return behind[1]
    part = (step - before[0]) / (behind[0] - before[0])
    return before[1] * (1 - part) + behind[1] * part


def _checkpoint_links(area: Frame, marks: Sequence[_Mark]) -> Markup:
    drawn = [marks[index] for index in legible([area.x(mark.step) for mark in marks], _BETWEEN_CHECKPOINTS)]
    links = []
    # The order of the keyboard is that of the curve.
    for mark in sorted(drawn, key=lambda mark: (mark.step, mark.episode)):
        x, y = area.x(mark.step), area.y.begin if mark.reward is None else area.y(mark.reward)
        links.append(
            Markup('<a href="#ep-{}" class="{}"><title>{}</title><circle cx="{}" cy="{}" r="3.5"/></a>').format(
                mark.episode, mark.classes, mark.title, coordinate(x), coordinate(y)
            )
        )
    # The transparent rim is there for the pointer.
    return Markup('<g fill="currentColor" stroke="transparent" stroke-width="12" pointer-events="all">{}</g>').format(
        Markup("").join(links)
    )


def _series_line(index: int, path: str) -> Markup:
    if not path:
        return Markup("")
    dashes = _DASHES[index % len(_DASHES)]
    return Markup(
        '<path class="series series-{}" d="{}" fill="none" stroke="currentColor" stroke-width="2" '
        'stroke-linejoin="round" stroke-dasharray="{}"/>'
    ).format(index % len(_DASHES), path, dashes or "none")


def _series_ends(area: Frame, lines: Sequence[Sequence[Place]]) -> Iterable[Markup]:
    """Return the numbers at the lines' ends, each below the one that it would cover."""
    ends = {index: area.place(line[-1]) for index, line in enumerate(lines) if line}
    taken: list[Place] = []
    for index, (x, y) in sorted(ends.items(), key=lambda end: (end[1][1], end[0])):
        while any(abs(x - other[0]) < 16 and abs(y - other[1]) < 16 for other in taken):
            y += 4
        taken.append((x, y))
        yield Markup(
            '<g class="series-end series-{}" aria-hidden="true"><circle cx="{}" cy="{}" r="8" fill="currentColor"/>'
            '<text x="{}" y="{}" text-anchor="middle" font-size="11">{}</text></g>'
        ).format(index % len(_DASHES), *map(coordinate, (x, y, x, y + 4)), index + 1)


def _legend_entry(index: int, series: Series) -> Markup:
    return Markup(
        '<li class="series-{}"><svg class="swatch" width="28" height="10" aria-hidden="true"><path d="M1,5h26" '
        'fill="none" stroke="currentColor" stroke-width="2.5" stroke-dasharray="{}"/></svg>'
        '<span class="series-number">{}</span> <a href="{}">{}</a></li>'
    ).format(
        *(index % len(_DASHES), _DASHES[index % len(_DASHES)] or "none", index + 1),
        quote(series.run_id, safe="", errors="replace"),
        shown(series.label),
    )
