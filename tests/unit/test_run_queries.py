"""What pages of runs, chains of resumes and comparisons are made of."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.errors import InvalidQueryError, RunNotFoundError
from sb3_mlflow_ckpt.runs.comparison import MISSING, Difference, changes_from_parent, config_differences
from sb3_mlflow_ckpt.runs.lineage import lineage, stitched_curve
from sb3_mlflow_ckpt.runs.summaries import SORTS, RunQuery, select, summarize


def run(run_id: str, **fields: Any) -> dict[str, Any]:
    return summarize({"run_id": run_id, "status": "completed", "agent_id": "a", "algo": "PPO", **fields})


def pages(runs: list[dict[str, Any]], query: RunQuery, limit: int) -> list[list[str]]:
    found, cursor = [], None
    while True:
        page = select(runs, query, limit, cursor)
        found.append([item["run_id"] for item in page.items])
        cursor = page.next_cursor
        if cursor is None:
            return found


_VALUES = st.none() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.booleans()


@given(
    values=st.lists(_VALUES, max_size=12),
    sort=st.sampled_from([*SORTS, *(f"-{key}" for key in SORTS)]),
    limit=st.integers(1, 5),
)
def test_pages_hold_every_run_once_in_one_order(values: list[Any], sort: str, limit: int) -> None:
    key = sort.removeprefix("-")
    fields = [
        {"progress": {key: value}} if key in ("num_timesteps", "mean_reward") else {key: value} for value in values
    ]
    runs = [run(f"r{number:02d}", **{"status": "completed", **field}) for number, field in enumerate(fields)]
    whole = [item["run_id"] for item in select(runs, RunQuery(sort=sort)).items]
    assert [run_id for page in pages(runs, RunQuery(sort=sort), limit) for run_id in page] == whole
    assert sorted(whole) == [item["run_id"] for item in runs]


def test_a_page_knows_the_one_before_it() -> None:
    runs = [run(f"r{number}", started_at=f"2026-01-0{number}") for number in range(1, 8)]
    first = select(runs, RunQuery(), 3)
    second = select(runs, RunQuery(), 3, first.next_cursor)
    third = select(runs, RunQuery(), 3, second.next_cursor)
    assert [(page.first, len(page.items), page.total) for page in (first, second, third)] == [
        (1, 3, 7),
        (4, 3, 7),
        (7, 1, 7),
    ]
    assert (first.previous_cursor, second.previous_cursor, third.next_cursor) == (None, "", None)
    assert select(runs, RunQuery(), 3, third.previous_cursor).items == second.items


def test_a_run_that_comes_meanwhile_shifts_nothing() -> None:
    runs = [run(f"r{number}", started_at=f"2026-01-0{number}") for number in range(1, 6)]
    first = select(runs, RunQuery(), 2)
    runs = [run("new", started_at="2026-02-01"), *runs[:3], runs[4]]
    assert [item["run_id"] for item in select(runs, RunQuery(), 2, first.next_cursor).items] == ["r3", "r2"]


def test_runs_without_a_value_come_last_either_way() -> None:
    runs = [run("none"), run("low", progress={"mean_reward": -1.0}), run("high", progress={"mean_reward": 2})]
    for sort, expected in (("mean_reward", ["low", "high", "none"]), ("-mean_reward", ["high", "low", "none"])):
        assert [item["run_id"] for item in select(runs, RunQuery(sort=sort)).items] == expected


def test_filters_admit_what_they_say() -> None:
    runs = [
        run("0123456789abcdef0123456789abcdef", name="Big lander", env_id="LunarLander-v3", status="lost"),
        run("b", algo="DQN", agent_id="other", env_id="CartPole-v1", host="node-7"),
        run("c", root_run_id="b", status="running"),
    ]

    def found(**fields: Any) -> list[str]:
        return [item["run_id"][:1] for item in select(runs, RunQuery(sort="status", **fields)).items]

    assert found(algo="dqn") == ["b"]
    assert found(agent_id="other") == ["b"]
    assert found(env_id="LunarLander-v3") == ["0"]
    assert found(root_run_id="b") == ["c"]
    assert found(status=("lost", "running")) == ["0", "c"]
    assert found(text="LANDER big") == ["0"]
    assert found(text="01234567-89ab-cdef-0123") == ["0"]
    assert found(text="node-7") == ["b"]
    assert found(text="nowhere") == []


def test_a_page_counts_the_statuses_that_the_rest_of_the_query_admits() -> None:
    runs = [run("a", status="lost"), run("b"), run("c"), run("d", algo="DQN")]
    page = select(runs, RunQuery(status=("lost",), algo="PPO"))
    assert (page.total, page.statuses["lost"], page.statuses["completed"], page.statuses["running"]) == (1, 1, 2, 0)
    assert page.choices["algo"] == ["DQN", "PPO"]


_OTHER_ORDER = base64.urlsafe_b64encode(json.dumps(["name", "x", "y"]).encode()).decode()
_NO_ID = base64.urlsafe_b64encode(json.dumps(["-started_at", "x", 5]).encode()).decode()


@pytest.mark.parametrize("cursor", ["x", "%%%", "e30", _OTHER_ORDER, _NO_ID, "\u00e9", "W1tbW1tb" * 500])
def test_a_cursor_that_was_not_given_out_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidQueryError, match="cursor: it is not one that this list gave out"):
        select([run("a")], RunQuery(), cursor=cursor)


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [({"sort": "colour"}, "sort"), ({"sort": "--name"}, "sort"), ({"status": ("odd",)}, "status")],
)
def test_a_query_that_cannot_be_answered_is_refused(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidQueryError) as caught:
        RunQuery(**fields)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("limit", [0, -1, 501])
def test_a_page_has_bounds(limit: int) -> None:
    with pytest.raises(InvalidQueryError, match="limit: a page holds 1 to 500 runs"):
        select([], RunQuery(), limit)


def chain() -> list[dict[str, Any]]:
    def resumed(run_id: str, parent: str, episode: int, day: int, root: str = "a") -> dict[str, Any]:
        started = f"2026-01-{day:02d}"
        return run(run_id, parent={"run_id": parent, "episode": episode}, root_run_id=root, started_at=started)

    return [
        *(run("a", root_run_id="a", started_at="2026-01-01"), resumed("b", "a", 10, 2), resumed("c", "b", 20, 3)),
        *(resumed("d", "b", 15, 4), run("alone", root_run_id="alone"), resumed("orphan", "gone", 5, 5, "gone")),
    ]


def test_a_lineage_tells_ancestors_children_and_family() -> None:
    found = lineage(chain(), "b")
    assert [item["run_id"] for item in found.ancestors] == ["a"]
    assert [item["run_id"] for item in found.children] == ["c", "d"]
    assert [item["run_id"] for item in found.family] == ["a", "b", "c", "d"]
    assert [item["run_id"] for item in lineage(chain(), "c").ancestors] == ["a", "b"]
    assert lineage(chain(), "alone").family == (chain()[4],)
    assert lineage(chain(), "orphan").ancestors == ({"run_id": "gone", "missing": True, "episode": 5},)
    with pytest.raises(RunNotFoundError):
        lineage(chain(), "unknown")


def test_parents_that_go_in_a_circle_end() -> None:
    runs = [run("a", parent={"run_id": "b", "episode": 1}), run("b", parent={"run_id": "a", "episode": 1})]
    assert [item["run_id"] for item in lineage(runs, "a").ancestors] == ["b"]


class Curves:
    """A store of curves alone."""

    def __init__(self, curves: dict[str, list[int]], checkpoints: dict[str, dict[int, int]]) -> None:
        self._curves, self._checkpoints = curves, checkpoints

    def curve(self, run_id: str, points: int | None = None) -> list[dict[str, Any]]:
        return [{"num_timesteps": step} for step in self._curves[run_id]]

    def checkpoints(self, run_id: str, *, before: int, limit: int) -> list[dict[str, Any]]:
        there = [(e, s) for e, s in sorted(self._checkpoints.get(run_id, {}).items()) if e < before]
        return [{"episode": episode, "num_timesteps": steps} for episode, steps in there[-limit:]]


def test_the_curve_of_a_chain_goes_to_where_each_was_resumed() -> None:
    curves = {"a": [100, 200, 300], "b": [220, 400, 500], "c": [450, 600]}
    store = Curves(curves, {"a": {10: 210}, "b": {15: 300, 20: 440}})
    parts = stitched_curve(store, lineage(chain(), "c"), 500)  # type: ignore[arg-type]
    assert [(part.run_id, [p["num_timesteps"] for p in part.points], part.until_timestep) for part in parts] == [
        ("a", [100, 200], 210),
        ("b", [220, 400], 440),
        ("c", [450, 600], None),
    ]


def test_a_parent_that_has_forgotten_its_checkpoint_is_cut_where_the_child_begins() -> None:
    store = Curves({"a": [100, 200, 300], "b": [220, 400]}, {})
    parts = stitched_curve(store, lineage(chain(), "b"), 500)  # type: ignore[arg-type]
    assert [(part.run_id, len(part.points), part.until_timestep) for part in parts] == [("a", 2, 220), ("b", 2, None)]


def test_configurations_are_compared_setting_by_setting() -> None:
    configs = {
        "a": {"seed": 1, "hyperparameters": {"n_steps": 8, "gamma": 0.9}, "learning_rate": 3e-4},
        "b": {"seed": 1, "hyperparameters": {"n_steps": 16}, "learning_rate": 0.0003},
        "c": "edited by somebody",
    }
    assert config_differences({key: configs[key] for key in "ab"}) == [
        Difference("hyperparameters.gamma", (0.9, MISSING)),
        Difference("hyperparameters.n_steps", (8, 16)),
    ]
    assert Difference("seed", (1, 1, MISSING)) in config_differences(configs)
    assert config_differences({"a": {"x": True}, "b": {"x": 1}}) == [Difference("x", (True, 1))]


def test_what_a_resume_changed_is_told_from_its_record() -> None:
    record = {"overrides": {"learning_rate": {"from": None, "to": 1e-4}, "edited": "x"}}
    assert changes_from_parent(record) == [Difference("learning_rate", (None, 1e-4))]
    assert changes_from_parent({"overrides": [1]}) == changes_from_parent({}) == []


def test_a_sweep_is_asked_for_as_one_group() -> None:
    runs = [run("a", sweep={"id": "one"}), run("b", sweep={"id": "two"}), run("c", sweep={"id": "one"}), run("d")]
    assert {item["run_id"] for item in select(runs, RunQuery(sweep_id="one")).items} == {"a", "c"}
    assert {item["sweep_id"] for item in runs} == {"one", "two", None}
