"""Every page, read back in a real browser: what it says is what the run folders say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from browser import Server, Visit
from history import (
    checkpoint_row,
    facts_of_row,
    lacking,
    primary_button,
    run_row,
    shown_runs,
    terms,
    text_of,
    texts_of,
    times_in,
)
from playwright.sync_api import Page, expect
from real_runs import NAMES, RealRuns

from sb3_mlflow_ckpt.runs.comparison import config_differences, flat_config
from sb3_mlflow_ckpt.runs.lineage import lineage
from sb3_mlflow_ckpt.web import formats


def test_the_list_says_of_each_run_what_its_record_says(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server).open("/training")
    expect(page).to_have_title("Runs · Training History")
    records = [real_runs.store.get(run["run_id"]) for run in real_runs.store.list()]
    assert shown_runs(page) == [record["run_id"] for record in records]
    assert len(records) == len(NAMES)
    for record in records:
        row = run_row(page, record["run_id"])
        assert lacking(text_of(row), facts_of_row(record)) == []
        newest = [item for item in record["checkpoint_paths"] if item["state"] != "pruned"][-1]
        assert {record["started_at"], newest["timestamp"]} <= set(times_in(row))
        rewards = [point for point in real_runs.store.curve(record["run_id"]) if point["ep_rew_mean"] is not None]
        assert row.locator("svg.sparkline").count() == bool(rewards)
        href = row.get_by_role("link", name=record["name"]).get_attribute("href")
        assert href == f"/training/{record['run_id']}"


def test_the_list_says_since_when_a_run_is_silent(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server).open("/training")
    for name, said, key in (("killed", "No heartbeat", "heartbeat_at"), ("stalled", "No step", "last_step_at")):
        row = run_row(page, real_runs.id(name))
        assert said in text_of(row)
        assert real_runs.record(name)[key] in times_in(row)


def test_the_statuses_are_counted(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server).open("/training")
    statuses = [run["status"] for run in real_runs.store.list()]
    for chip in page.locator("#chips a").all():
        name, count = re.fullmatch(r"(\w+?) ?(\d+)", text_of(chip)).groups()
        assert int(count) == statuses.count(name)
    assert {"completed", "failed", "interrupted", "lost", "stalled"} <= set(statuses)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_s_page_says_what_its_record_says(server: Server, visit: Visit, real_runs: RealRuns, name: str) -> None:
    record = real_runs.record(name)
    page = visit(server).open(f"/training/{record['run_id']}")
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)
    whole = text_of(page.locator("main"))
    git = record["git"] or {}
    wanted = [record["run_id"], record["status"], record["host"], str(record["pid"]), record["agent_id"]]
    wanted += [record["env_id"], record["algo"].upper(), record["command"], str(record["config"]["seed"])]
    wanted += [str(git.get("commit") or "")[:12], *record["versions"], *record["versions"].values()]
    assert lacking(whole, wanted) == []
    figures = text_of(page.locator("#figures"))
    progress = record["progress"]
    counts = [progress["num_timesteps"], progress["total_timesteps"], progress["episode"], len(record["checkpoint_paths"])]
    rewards = [progress["mean_reward"], progress["best_mean_reward"]]
    assert lacking(figures, [*map(formats.count, counts), *map(formats.reward, rewards)]) == []
    assert record["started_at"] in times_in(page.locator("#figures"))
    if record["ended_at"]:
        assert record["ended_at"] in times_in(page.locator("main"))
    _check_checkpoints(page, record)


def _check_checkpoints(page: Page, record: dict[str, Any]) -> None:
    shown = page.locator("#checkpoints table tbody").evaluate_all("rows => rows.map(row => row.id)")
    assert shown == [f"ep-{item['episode']}" for item in reversed(record["checkpoint_paths"])]
    for item in record["checkpoint_paths"]:
        row = checkpoint_row(page, item["episode"])
        wanted = [formats.count(item["num_timesteps"]), formats.size(item["bytes"])]
        wanted += [formats.reward(item["mean_reward"])]
        if item["trigger"] != "interval":
            wanted.append(item["trigger"])
        if item["state"] == "pruned":
            wanted.append("pruned")
            assert row.locator("button").count() == 0
        else:
            wanted += [item["path"], item["sha256"]]
        if item["state"] == "mirrored":
            wanted += ["in MLflow", item["uri"]]
        assert lacking(text_of(row), wanted) == []
        assert item["timestamp"] in times_in(row)


@pytest.mark.parametrize("name", ["baseline", "third of three"])
def test_the_whole_configuration_is_there(server: Server, visit: Visit, real_runs: RealRuns, name: str) -> None:
    record = real_runs.record(name)
    page = visit(server).open(f"/training/{record['run_id']}")
    shown: dict[str, str] = {}
    for group in page.locator(".config .group").all():
        head = text_of(group.locator("h3"))
        prefix = "" if head == "Settings" else f"{head}."
        shown |= {f"{prefix}{key}": value for key, value in terms(group).items()}
    def written(value: Any) -> str:
        return re.sub(r"\s+", " ", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    assert shown == {key: written(value) for key, value in flat_config(record["config"]).items()}


def test_a_failed_run_shows_its_error(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    record = real_runs.record("broken simulator")
    page = visit(server).open(f"/training/{record['run_id']}")
    expect(page.get_by_role("heading", name=record["error"]["type"])).to_be_visible()
    expect(page.get_by_text(record["error"]["message"], exact=True)).to_be_visible()
    trace = page.get_by_role("region", name="Traceback")
    assert (trace.text_content() or "").strip() == record["error"]["traceback"].strip()
    assert "the simulator broke" in record["error"]["traceback"]


def test_a_damaged_newest_checkpoint_is_named_and_an_older_one_offered(
    server: Server, visit: Visit, real_runs: RealRuns
) -> None:
    record = real_runs.record("damaged")
    newest, older = record["checkpoint_paths"][-1], record["checkpoint_paths"][-2]
    page = visit(server).open(f"/training/{record['run_id']}")
    # What has not been read yet is read behind the answer, and the page hears of it.
    expect(checkpoint_row(page, newest["episode"])).to_contain_text("damaged", timeout=30_000)
    expect(checkpoint_row(page, older["episode"])).to_contain_text("verified", timeout=30_000)
    assert checkpoint_row(page, newest["episode"]).locator(".command").count() == 0
    expect(primary_button(page)).to_have_attribute("data-copy", re.compile(re.escape(older["path"])))


def test_the_lineage_leads_from_run_to_run(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    names = ["first of three", "second of three", "third of three"]
    page = visit(server).open(f"/training/{real_runs.id(names[1])}")
    listed = page.locator("#lineage li")
    assert [next(name for name in names if name in text) for text in texts_of(listed)] == names
    line = lineage(real_runs.store.summaries(), real_runs.id(names[1]))
    assert [run["name"] for run in (*line.ancestors, *line.children)] == [names[0], names[2]]
    page.locator("#lineage").get_by_role("link", name=names[2]).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(names[2])
    page.locator("header, main").get_by_role("link", name=re.compile(r"^ep ")).first.click()
    parent = real_runs.record(names[2])["parent"]
    expect(page).to_have_url(re.compile(rf"/training/{parent['run_id']}#ep-{parent['episode']}$"))
    expect(checkpoint_row(page, parent["episode"])).to_be_in_viewport()


def test_a_resumed_run_says_what_it_changed(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    record = real_runs.record("third of three")
    page = visit(server).open(f"/training/{record['run_id']}")
    changes = terms(page.locator(".changes"))
    assert set(changes) == set(record["overrides"]) >= {"learning_rate"}
    for key, change in record["overrides"].items():
        assert lacking(changes[key], [formats.setting(change["from"]), formats.setting(change["to"])]) == []
    untouched = visit(server).open(f"/training/{real_runs.id('baseline')}")
    assert untouched.locator(".changes").count() == 0


def test_the_curve_is_drawn_told_and_there_in_numbers(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    record = real_runs.record("third of three")
    page = visit(server).open(f"/training/{record['run_id']}")
    chart = page.get_by_role("group", name="Mean reward by environment steps")
    assert chart.count() == 1  # Of the two drawings one is seen.
    assert chart.locator(".resume").count() == 2
    items = {f"#ep-{item['episode']}" for item in record["checkpoint_paths"]}
    links = chart.get_by_role("link")
    assert {link.get_attribute("href") for link in links.all()} <= items
    expect(links.last).to_have_accessible_name(re.compile(f"^Checkpoint of episode {record['checkpoint_paths'][-1]['episode']}, "))
    links.last.click()
    expect(checkpoint_row(page, record["checkpoint_paths"][-1]["episode"])).to_be_in_viewport()
    page.get_by_text("The curve in numbers").click()
    rows = [text.split() for text in texts_of(page.locator("#curve-rows tr"))]
    own = page.locator("#curve-rows tr", has_text=record["run_id"][:8])
    assert own.count() == len(real_runs.store.curve(record["run_id"]))
    last = real_runs.store.curve(record["run_id"])[-1]
    expected = [formats.count(last["num_timesteps"]), formats.count(last["episode"]), formats.reward(last["ep_rew_mean"])]
    assert texts_of(own.last.locator("td"))[1:] == expected
    assert len(rows) > own.count()


def test_runs_are_compared(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    names = ["baseline", "quick a2c", "quick dqn"]
    records = {real_runs.id(name): real_runs.record(name) for name in names}
    page = visit(server).open("/training")
    for name in names:
        page.get_by_label(f"Compare {name}").check()
    page.get_by_role("button", name=re.compile("^Compare")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("3 runs compared")
    page.wait_for_load_state()
    order = texts_of(page.locator("#sides thead th bdi"))
    assert sorted(order) == sorted(names)
    by_order = [next(run for run in records.values() if run["name"] == name) for name in order]
    rows = {text_of(row.locator("th")): texts_of(row.locator("td")) for row in page.locator("#sides tbody tr").all()}
    for title, values in {
        "Status": [run["status"] for run in by_order],
        "Algorithm": [run["algo"].upper() for run in by_order],
        "Agent": [run["agent_id"] for run in by_order],
        "Best reward": [formats.reward(run["progress"]["best_mean_reward"]) for run in by_order],
        "Last reward": [formats.reward(run["progress"]["mean_reward"]) for run in by_order],
        "Episodes": [formats.count(run["progress"]["episode"]) for run in by_order],
        "Checkpoints": [str(len(run["checkpoint_paths"])) for run in by_order],
    }.items():
        assert rows[title] == values
    differing = config_differences({run["run_id"]: run["config"] for run in by_order})
    visible = page.locator("section.settings tbody tr:visible")
    assert texts_of(visible.locator("th")) == [row.key for row in differing]
    for row, difference in zip(visible.all(), differing, strict=True):
        assert texts_of(row.locator("td")) == [re.sub(r"\s+", " ", formats.setting(value)) for value in difference.values]
    page.get_by_label("Show what is the same, too").check()
    keys = {key for run in by_order for key in flat_config(run["config"])}
    assert page.locator("section.settings tbody tr:visible").count() == len(keys)
    legend = page.locator(".chart-legend a")
    assert [(link.get_attribute("href"), text_of(link)) for link in legend.all()] == [
        (run["run_id"], run["name"]) for run in by_order
    ]
    legend.first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(order[0])


def test_the_api_s_page_names_every_route(server: Server, visit: Visit) -> None:
    page = visit(server).open("/api")
    described = server.json("/api/openapi.json")["paths"]
    sections = page.locator("section.route")
    assert sorted(texts_of(sections.locator(".address code"))) == sorted(described)
    for link in page.get_by_role("navigation", name="Routes").get_by_role("link").all():
        assert page.locator(link.get_attribute("href") or "").count() == 1


def test_what_is_not_there_is_a_page_that_leads_back(server: Server, visit: Visit) -> None:
    visitor = visit(server)
    visitor.expected.append("404")
    page = visitor.open("/training/0123456789abcdef")
    expect(page.get_by_role("heading", level=1)).to_have_text("There is no such run")
    page.get_by_role("link", name="To the list of runs").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Training runs")


def test_an_empty_store_says_how_to_train(visit: Visit, tmp_path: Any) -> None:
    empty = Server(tmp_path, "--checkpoint-dir", tmp_path / "none")
    visitor = visit(empty)
    try:
        page = visitor.open("/training")
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
        expect(page.locator(".command-box code")).to_contain_text("python -m sb3_mlflow_ckpt.trainer")
    finally:
        # A window that still asks would notice that nobody answers.
        visitor.context.close()
        empty.stop()
