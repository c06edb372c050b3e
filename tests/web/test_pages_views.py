"""What pages say of runs and checkpoints, before any template."""

from __future__ import annotations

from typing import Any

from sb3_mlflow_ckpt.runs.reader import Glance
from sb3_mlflow_ckpt.runs.summaries import select, summarize
from sb3_mlflow_ckpt.web.checkpoint_files import Check
from sb3_mlflow_ckpt.web.checkpoint_views import CheckpointList, checkpoint_list, wanted_check
from sb3_mlflow_ckpt.web.comparison_views import settings
from sb3_mlflow_ckpt.web.run_facts import mirror_state, span_of, status_of
from sb3_mlflow_ckpt.web.run_views import changes, config_groups, exactness
from sb3_mlflow_ckpt.web.views import ListQuery, run_list

RECORD: dict[str, Any] = {
    "run_id": "1" * 32,
    "agent_id": "a",
    "status": "completed",
    "config": {"algo": "PPO", "env_id": "CartPole-v1", "total_timesteps": 10_000, "mlflow": True},
    "mlflow": {"tracking_uri": "http://mlflow:5000", "experiment_id": "1", "run_id": "1" * 32},
    "mirrors": ["MLflow"],
}


def item(episode: int, **fields: Any) -> dict[str, Any]:
    return {
        "episode": episode, "path": f"/c/a/{'1' * 32}/ep{episode:06d}.zip", "uri": None, "num_timesteps": episode * 10,
        "timestamp": f"2026-01-01T00:{episode % 60:02d}:00.000Z", "bytes": 1000, "sha256": "0" * 64,
        "mean_reward": float(episode), "trigger": "interval", "state": "local", "on_disk": True, "pinned": False,
        **fields,
    }  # fmt: skip


def listed(items: list[dict[str, Any]], checks: dict[int, Check] | None = None) -> CheckpointList:
    return checkpoint_list(RECORD, items, checks or {}, total=len(items), older=None, newest=items)


def test_a_checkpoint_has_a_command_for_each_program_and_copy() -> None:
    both = item(10, uri="runs:/1/checkpoints/ep000010.zip", state="mirrored")
    (row,) = listed([both]).rows
    assert {(command.program, command.source) for command in row.commands} == {
        (program, source) for program in ("trainer", "mlflow") for source in ("path", "uri")
    }
    for command in row.commands:
        wanted, other = ("runs:/", "/c/a") if command.source == "uri" else ("/c/a", "runs:/")
        assert wanted in command.command and other not in command.command and not command.note


def test_the_copy_in_mlflow_stands_in_for_a_file_that_is_gone_and_says_so() -> None:
    remote = item(10, uri="runs:/1/checkpoints/ep000010.zip", state="mirrored", on_disk=False)
    (row,) = listed([remote], {10: Check("absent")}).rows
    assert all("runs:/" in command.command for command in row.commands)
    assert {command.source: command.note for command in row.commands} == {"path": "only in MLflow", "uri": ""}
    assert row.check == "not on disk" and not row.here


def test_a_pruned_checkpoint_offers_no_command_whatever_else_it_says() -> None:
    (row,) = listed([item(10, state="pruned", on_disk=True, uri="runs:/1/x.zip")]).rows
    assert row.pruned and row.commands == () and row.check == "pruned" and not row.here


def test_a_damaged_file_is_not_offered_and_an_older_one_is() -> None:
    found = listed([item(10), item(20)], {20: Check("corrupt", "its SHA-256 differs")})
    assert [row.episode for row in found.rows] == [20, 10]
    assert found.rows[0].commands == () and found.rows[0].problem == "its SHA-256 differs" and not found.rows[0].here
    assert found.primary is not None and found.primary.episode == 10


def test_the_best_checkpoint_is_marked_only_where_rewards_differ() -> None:
    assert [row.best for row in listed([item(10, mean_reward=5.0), item(20, mean_reward=1.0)]).rows] == [False, True]
    assert not any(row.best for row in listed([item(10, mean_reward=5.0), item(20, mean_reward=5.0)]).rows)


def test_what_is_offered_first_is_checked_first() -> None:
    items = [item(10), item(20), item(30, state="pruned", on_disk=False)]
    assert wanted_check(items, {}) == 20
    assert wanted_check(items, {20: Check("corrupt")}) == 10
    assert wanted_check(items, {20: Check("verified")}) is None
    # A run that went back to an older checkpoint has lower numbers after higher ones.
    assert wanted_check([item(10, timestamp="2026-01-02T00:00:00.000Z"), item(20)], {}) == 10
    assert wanted_check([], {}) is None


def test_a_status_says_what_is_missing_and_since_when() -> None:
    lost = status_of({"status": "lost", "heartbeat_at": "2026-01-01T00:00:00.000Z"})
    assert (lost.kind, lost.note, lost.since and lost.since.shown) == ("lost", "No heartbeat", "2026-01-01 00:00 UTC")
    stalled = status_of({"status": "stalled", "last_step_at": None})
    assert (stalled.note, stalled.since) == ("No step", None)
    assert status_of({"status": "zombie\n"}).kind == "unknown"


def test_a_running_run_has_no_duration_that_would_grow_old() -> None:
    times = {"started_at": "2026-01-01T00:00:00.000Z", "heartbeat_at": "2026-01-01T01:00:00.000Z", "ended_at": None}
    assert span_of({"status": "running", **times}).taken == ""
    assert span_of({"status": "lost", **times}).taken == "1 h"


def test_mirrors_wait_or_hold_all() -> None:
    run = {"mirrors": ["MLflow"]}
    assert mirror_state(run, Glance(checkpoints=3, waiting=2)) == ("2 waiting", "waiting")
    assert mirror_state(run, Glance(checkpoints=3)) == ("mirrored", "all")
    assert (
        mirror_state({"mirrors": []}, Glance(checkpoints=3)) == mirror_state({"mirrors": 3}, Glance()) == ("", "none")
    )


def test_a_list_leads_to_its_other_orders_filters_and_pages() -> None:
    runs = [summarize({"run_id": str(n), "status": "running", "started_at": f"2026-01-{n:02d}"}) for n in range(1, 6)]
    query = ListQuery(q="", status=("running",))
    shown = run_list(select(runs, query.asked(), 2), {}, query)
    assert (shown.first, shown.last, shown.total, shown.previous) == (1, 2, 5, None)
    assert shown.next is not None and shown.next.startswith("?cursor=") and shown.next.endswith("status=running")
    assert (shown.columns["started_at"].order, shown.columns["name"].order) == ("descending", "")
    assert shown.columns["started_at"].query == "?status=running&sort=started_at"
    assert shown.columns["mean_reward"].query == "?status=running&sort=-mean_reward"
    running = next(chip for chip in shown.chips if chip.status.name == "running")
    assert (running.active, running.count, running.query) == (True, 5, "")
    assert not shown.is_empty and shown.is_live


def test_a_configuration_is_grouped_by_its_mappings() -> None:
    groups = config_groups({"seed": 1, "hyperparameters": {"n_steps": 8}, "env_kwargs": {}, "b": {"c": {"d": 2}}})
    assert dict(groups)["hyperparameters"] == (("n_steps", "8"),)
    assert ("seed", "1") in dict(groups)["settings"] and dict(groups)["b"] == (("c.d", "2"),)
    assert config_groups(None) == config_groups([1]) == ()


def test_changes_go_from_old_to_new_and_bad_ones_are_passed_over() -> None:
    (change,) = changes({"overrides": {"lr": {"from": 3e-4, "to": 1e-4}, "bad": 3}})
    assert (change.key, change.before, change.after) == ("lr", "0.0003", "0.0001")


def test_a_resume_says_whether_it_is_exact_and_why_not() -> None:
    assert exactness({"resume": {"exact": True}}) == "Exact continuation"
    assert exactness({"resume": {"exact": False, "reason": "no buffer"}}) == "Not an exact continuation: no buffer"
    assert exactness({"resume": None}) == exactness({"resume": 3}) == exactness({}) == ""


def test_a_comparison_shows_first_what_differs() -> None:
    rows = settings([{"run_id": "1", "config": {"a": 1, "z": 1}}, {"run_id": "2", "config": {"a": 1, "z": 2, "n": 3}}])
    assert [(row.key, row.differs) for row in rows] == [("n", True), ("z", True), ("a", False)]
    assert rows[0].values == ("not set", "3")
