from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from sb3_mlflow_ckpt.runs.lineage import Segment
from sb3_mlflow_ckpt.web.charts import Series, comparison_chart, reward_chart, sparkline
from sb3_mlflow_ckpt.web.plot import legible
from sb3_mlflow_ckpt.web.scales import Scale, domain, number, reading, short, spread, steps, ticks

SVG = "{http://www.w3.org/2000/svg}"
LARGEST_CHART = 40_000

any_float = st.floats(width=64) | st.sampled_from([1e308, -1e308, 5e-324, 1e300, -1e300, math.inf, math.nan, 0.0, -0.0])
any_number = any_float | st.integers() | st.sampled_from([10**400, -(10**400)])
any_value = any_number | st.none() | st.booleans() | st.text(max_size=3)
points = st.fixed_dictionaries({}, optional={"num_timesteps": any_value, "ep_rew_mean": any_value})
orderly_points = st.fixed_dictionaries({"num_timesteps": st.integers(0, 10**7), "ep_rew_mean": any_float})
any_points = st.lists(points | orderly_points, max_size=40)
any_text = st.text(st.characters(exclude_categories=()), max_size=20)
checkpoints = st.fixed_dictionaries(
    {}, optional={"episode": any_value, "num_timesteps": any_value, "mean_reward": any_value, "state": any_value}
)


def check(drawn: Markup) -> ElementTree.Element:
    """Return what was drawn, parsed, after a look at what every chart must keep to."""
    drawn.encode()
    assert len(drawn) < LARGEST_CHART
    root = ElementTree.fromstring(f"<div>{drawn}</div>")
    for element in root.iter():
        assert element.tag != f"{SVG}style" and "style" not in element.attrib
        for name, value in element.attrib.items():
            if name not in ("aria-label", "href"):
                assert not re.search(r"\b(nan|inf|none,|e[+-]?\d)", value, re.IGNORECASE), (name, value)
                for digits in re.findall(r"-?\d+\.\d+", value):
                    assert len(digits.partition(".")[2]) <= 2
    return root


def curve(*rewards: float | None, begin: int = 0) -> list[dict[str, Any]]:
    return [{"num_timesteps": begin + 100 * index, "ep_rew_mean": reward} for index, reward in enumerate(rewards)]


def saved(episode: int, step: int, reward: float | None = None, state: str = "local") -> dict[str, Any]:
    return {"episode": episode, "num_timesteps": step, "mean_reward": reward, "state": state}


def wide(root: ElementTree.Element) -> ElementTree.Element:
    (found,) = (svg for svg in root.iter(f"{SVG}svg") if "chart-wide" in svg.attrib["class"])
    return found


def of_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def places(path: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """Return the parts of a line with the places of each."""
    parts = [part for part in path.attrib["d"].split("M") if part]
    return [[tuple(map(float, place.split(","))) for place in part.removesuffix("h0").split("L")] for part in parts]


# Whatever a record holds, there is a drawing of bounded size that is XML.


@given(st.lists(st.tuples(any_number, any_number), max_size=60))
def test_a_sparkline_is_xml_whatever_the_rewards(rewards: list[tuple[Any, Any]]) -> None:
    check(sparkline(rewards))


@given(st.lists(st.tuples(any_points, any_value), max_size=4), st.lists(checkpoints, max_size=30))
def test_a_reward_chart_is_xml_whatever_the_curves(parts: list[Any], saved: list[dict[str, Any]]) -> None:
    check(reward_chart([Segment("run", curve, until) for curve, until in parts], saved))


@given(st.lists(st.tuples(any_text, any_text, any_points), max_size=9))
def test_a_comparison_is_xml_whatever_the_curves_and_names(series: list[tuple[str, str, Any]]) -> None:
    check(comparison_chart([Series(*one) for one in series]))


@given(st.lists(any_float.filter(lambda value: abs(value) <= 1e300), min_size=1), st.integers(2, 12))
@example([2.2222222227777784e16], 2)
def test_ticks_are_few_round_and_inside(values: list[float], most: int) -> None:
    low, high = domain(values)
    scale = Scale(low, high, 0, 100)
    assert low < high
    assert all(0 <= scale(value) <= 100 for value in values)
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most + 1
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in found)
    labels = [short(value, 10) for value in found]
    assert len(set(labels)) == len(labels)


@given(st.lists(st.floats(0, 1000)), st.floats(1, 50))
def test_what_is_drawn_is_apart(marks: list[float], distance: float) -> None:
    chosen = sorted(marks[index] for index in legible(marks, distance))
    assert all(after - before >= distance for before, after in itertools.pairwise(chosen))
    # Nothing is left out that had room, and the most important is there.
    assert all(any(abs(mark - other) < distance for other in chosen) for mark in marks if mark not in chosen)
    assert not marks or marks[0] in chosen


@given(st.lists(st.integers(), max_size=50), st.integers(2, 20))
def test_a_thinned_curve_keeps_its_ends(items: list[int], most: int) -> None:
    kept = spread(items, most)
    assert len(kept) == min(len(items), most)
    assert list(kept[:1]) == items[:1] and list(kept[-1:]) == items[-1:]


@pytest.mark.parametrize("size", [500, 100_000])
def test_a_chart_of_many_points_and_checkpoints_is_small_and_legible(size: int) -> None:
    noisy = [{"num_timesteps": 997 * i, "ep_rew_mean": 1e4 * math.sin(i) + i} for i in range(size)]
    many = [saved(episode, 997 * size * episode // 5000, float(episode)) for episode in range(5000)]
    ancestors = [Segment(f"{i:032x}", noisy[i * size // 300 : (i + 1) * size // 300], i) for i in range(300)]
    root = check(reward_chart([*ancestors, own(*noisy)], many))
    assert 40 < len(of_class(wide(root), "checkpoint")) < 70
    check(comparison_chart([Series(f"{i:032x}", "a run", noisy) for i in range(8)]))


# What is drawn is what was recorded.


def own(*curve: dict[str, Any]) -> Segment:
    """Return the part of the run itself."""
    return Segment("a", curve, None)


def test_a_sparkline_says_and_marks_what_matters() -> None:
    root = check(sparkline([(100, 20.0), (200, 493.25), (300, 1234.5)]))
    (title,) = root.iter(f"{SVG}title")
    assert title.text == "Mean reward: first 20, last 1,234.5, best 1,234.5"
    (path,) = root.iter(f"{SVG}path")
    ((*_, end),) = places(path)
    (mark,) = root.iter(f"{SVG}circle")
    assert (float(mark.attrib["cx"]), float(mark.attrib["cy"])) == end
    xs, ys = zip(*places(path)[0], strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)


def test_one_reward_is_a_dot_and_none_is_nothing() -> None:
    ((dot,),) = places(check(sparkline([(100, 5.0)])).find(f".//{SVG}path"))
    assert dot == (47.5, 12)
    assert sparkline([]) == "" and sparkline([(1, math.nan)]) == ""


def test_a_chart_has_a_name_and_says_how_the_curve_goes() -> None:
    root = wide(check(reward_chart([own(*curve(1.0, 9.5, 4.0))], [saved(50, 100)])))
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("group", "Mean reward by environment steps")
    expected = "from 1 at 0 steps to 4 at 200 steps, best 9.5 at 100 steps; 1 checkpoints"
    assert root.find(f"{SVG}desc").text == expected


def test_the_line_has_a_gap_where_no_reward_is_known_and_where_steps_went_back() -> None:
    whole = curve(1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0) + curve(1.0, 2.0)
    (line,) = of_class(wide(check(reward_chart([own(*whole)], []))), "curve")
    assert [len(part) for part in places(line)] == [2, 1, 2, 2]


def test_checkpoints_are_links_on_the_curve_in_its_order() -> None:
    items = [saved(200, 200, 3.5), saved(50, 50, 7.0), saved(100, 100, 9.0, "pruned")]
    root = wide(check(reward_chart([own(*curve(1.0, 9.0, 3.0))], items)))
    links = list(root.iter(f"{SVG}a"))
    assert [link.attrib["href"] for link in links] == ["#ep-50", "#ep-100", "#ep-200"]
    assert [link.find(f"{SVG}title").text for link in links] == [
        "Checkpoint of episode 50, 50 steps, mean reward 7",
        "Checkpoint of episode 100, 100 steps, mean reward 9, pruned",
        "Checkpoint of episode 200, 200 steps, mean reward 3.5",
    ]
    assert ["checkpoint-pruned" in link.attrib["class"] for link in links] == [False, True, False]
    ((begin, middle, end),) = places(of_class(root, "curve")[0])
    at = [(float(link[-1].attrib["cx"]), float(link[-1].attrib["cy"])) for link in links]
    assert at[1:] == [middle, end]
    assert at[0] == pytest.approx(((begin[0] + middle[0]) / 2, (begin[1] + middle[1]) / 2), abs=0.1)


def test_a_checkpoint_beside_the_curve_s_ends_is_drawn_at_its_own_reward() -> None:
    items = [saved(50, 50, 1.0), saved(100, 200, 5.0), saved(150, 500, 1.0)]
    root = wide(check(reward_chart([own(*curve(5.0, 5.0, begin=200))], items)))
    heights = [float(link[-1].attrib["cy"]) for link in root.iter(f"{SVG}a")]
    assert heights[0] == heights[2] > heights[1]


def test_of_checkpoints_that_crowd_the_newest_and_the_best_are_drawn() -> None:
    items = [saved(episode, 1000 + episode, 100.0 if episode == 37 else 1.0) for episode in range(1, 2001)]
    root = wide(check(reward_chart([own(*curve(*range(50)))], items)))
    drawn = {link.attrib["href"] for link in root.iter(f"{SVG}a")}
    assert {"#ep-37", "#ep-2000"} <= drawn


def test_ancestors_are_muted_and_where_the_run_was_resumed_is_marked() -> None:
    parts = [Segment("a", curve(1.0, 2.0), 100), Segment("b", curve(3.0, 2.0, begin=100), 200), own(*curve(4.0, 5.0, begin=200))]
    root = wide(check(reward_chart(parts, [])))
    (muted,) = of_class(root, "curve-ancestor")
    assert [len(part) for part in places(muted)] == [2, 2]
    titles = [element[0].text for element in of_class(root, "resume")]
    assert sorted(titles) == ["Resumed at 100 steps", "Resumed at 200 steps"]
    assert root.find(f"{SVG}desc").text.endswith("; resumed at 100 steps; resumed at 200 steps")


def test_the_best_point_is_marked() -> None:
    root = wide(check(reward_chart([own(*curve(1.0, 493.2, 400.0))], [])))
    (best,) = of_class(root, "best")
    assert best.find(f"{SVG}text").text == "best 493.2"
    (_, peak, _) = places(of_class(root, "curve")[0])[0]
    circle = best.find(f"{SVG}circle")
    assert (float(circle.attrib["cx"]), float(circle.attrib["cy"])) == peak


def test_checkpoints_without_a_curve_are_drawn_at_their_rewards() -> None:
    root = wide(check(reward_chart([own()], [saved(50, 1000, 1.0), saved(100, 2000, 2.0), saved(150, 3000)])))
    heights = [float(link[-1].attrib["cy"]) for link in root.iter(f"{SVG}a")]
    assert heights[2] > heights[0] > heights[1]


def test_a_run_without_rewards_says_so() -> None:
    for chart in (reward_chart([own()], [saved(50, 100)]), reward_chart([], [])):
        assert "No episode has ended yet" in chart and "<svg" not in chart


def test_runs_are_told_apart_without_their_colours() -> None:
    root = check(comparison_chart([Series(f"run{i}", f"run {i}", curve(1.0, 2.0 + i)) for i in range(8)]))
    lines = of_class(wide(root), "series")
    assert [line.attrib["class"] for line in lines] == [f"series series-{i}" for i in range(8)]
    assert len({line.attrib["stroke-dasharray"] for line in lines}) == 8
    assert [end.find(f"{SVG}text").text for end in of_class(wide(root), "series-end")] == list("87654321")
    links = list(root.iter("a"))
    assert [(link.attrib["href"], link.text) for link in links] == [(f"run{i}", f"run {i}") for i in range(8)]


def test_the_numbers_of_lines_that_end_together_do_not_cover_each_other() -> None:
    root = wide(check(comparison_chart([Series(f"run{i}", "a run", curve(1.0, 500.0)) for i in range(8)])))
    heights = sorted(float(end.find(f"{SVG}circle").attrib["cy"]) for end in of_class(root, "series-end"))
    assert all(below - above >= 16 for above, below in itertools.pairwise(heights))


def test_a_name_is_text_and_an_id_stays_below_the_page() -> None:
    root = check(comparison_chart([Series("javascript:alert(1)", '</text><script>"&\x00', curve(1.0))]))
    (link,) = root.iter("a")
    assert link.attrib["href"] == "javascript%3Aalert%281%29"
    assert link.text == '</text><script>"&\\x00'


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (1000, "1k"), (50_000, "50k"), (1_234_567, "1.23M"), (999_999, "1M"), (2e9, "2B"),
     (1e15, "1e15"), (-1500, "-1.5k"), (0.00001, "1e-5"), (0.05, "0.05"), (-1e300, "-1e300")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_sentences_say_numbers_in_full() -> None:
    assert [reading(value) for value in (493.2, 500.0, -12345.67, 0.0123, 0.0, 1e20)] == [
        "493.2", "500", "-12,345.7", "0.0123", "0", "1e20",
    ]  # fmt: skip
    assert [steps(value) for value in (12_000, 1e13)] == ["12,000", "1e13"]


@pytest.mark.parametrize("value", [None, True, "1", math.nan, math.inf, 1e301, 10**400, [], {}])
def test_what_is_no_number_is_not_drawn(value: Any) -> None:
    assert number(value) is None
