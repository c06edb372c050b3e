"""A list that is searched, filtered, sorted and turned over: its address tells all of it, and leads back to it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from browser import Server, Visit
from history import shown_runs, text_of
from playwright.sync_api import Page, expect
from real_runs import RealRuns

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.summaries import SORTS, RunQuery, select

COPIES = 130
HEADS = ("status", "name", "algo", "mean_reward", "num_timesteps", "started_at")


@pytest.fixture(scope="module")
def many_runs(real_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> FolderRuns:
    """Records and curves of the real runs, again and again under new ids, as months of work leave them."""
    folder = tmp_path_factory.mktemp("many") / "checkpoints"
    now = datetime.now(timezone.utc)
    ended = [run for run in real_runs.store.list() if run["status"] in ("completed", "failed", "interrupted")]
    for number, run in zip(range(COPIES), itertools.cycle(ended), strict=False):
        source = RunFolder(real_runs.checkpoint_dir, run["agent_id"], run["run_id"])
        copy = RunFolder(folder, run["agent_id"], uuid.UUID(int=number + 1).hex)
        copy.path.mkdir(parents=True)
        started = (now - timedelta(hours=number)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record: dict[str, Any] = json.loads(source.record.read_text())
        record |= {"run_id": copy.run_id, "root_run_id": copy.run_id, "started_at": started}
        copy.record.write_text(json.dumps(record))
        for name in ("metrics.jsonl", "checkpoints.jsonl"):
            shutil.copy(source.path / name, copy.path / name)
    return FolderRuns(folder)


@pytest.fixture(scope="module")
def server(many_runs: FolderRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("serve")
    served = Server(folder, "--checkpoint-dir", many_runs.checkpoint_dir)
    yield served
    served.stop()


def wanted(store: FolderRuns, query: RunQuery, limit: int = 50) -> list[str]:
    return [run["run_id"] for run in select(store.summaries(), query, limit).items]


def head(page: Page, key: str) -> Any:
    return page.locator(f"th:has([data-sort={key}])")


def test_a_head_sorts_and_says_so(server: Server, visit: Visit, many_runs: FolderRuns) -> None:
    page = visit(server).open("/training")
    assert set(HEADS) <= set(SORTS)
    for key in HEADS:
        orders = []
        for _ in range(2):
            page.locator(f"[data-sort={key}]").click()
            page.wait_for_load_state()
            sort = re.search(r"sort=(-?\w+)", page.url)
            # The order that lists have of themselves is not in the address.
            query = RunQuery(sort=sort[1] if sort else "-started_at")
            assert query.sort.removeprefix("-") == key
            order = "descending" if query.sort.startswith("-") else "ascending"
            expect(head(page, key)).to_have_attribute("aria-sort", order)
            assert page.locator("th[aria-sort]").count() == 1
            assert shown_runs(page) == wanted(many_runs, query)
            orders.append(order)
        assert sorted(orders) == ["ascending", "descending"]


def test_a_search_and_filters_are_in_the_address(server: Server, visit: Visit, many_runs: FolderRuns) -> None:
    page = visit(server).open("/training")
    page.get_by_role("searchbox").fill("three")
    page.get_by_role("searchbox").press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=three$"))
    page.wait_for_load_state()
    assert shown_runs(page) == wanted(many_runs, RunQuery(text="three"))
    page.locator("select[name=algo]").select_option("ppo")
    expect(page).to_have_url(re.compile("algo=ppo"))
    page.wait_for_load_state()
    page.get_by_role("list", name="Statuses").get_by_role("link", name=re.compile("^completed")).click()
    expect(page).to_have_url(re.compile("status=completed"))
    page.wait_for_load_state()
    found = RunQuery(text="three", algo="ppo", status=("completed",))
    assert shown_runs(page) == wanted(many_runs, found) != []
    total = select(many_runs.summaries(), found).total
    expect(page.locator("#range")).to_contain_text(f"of {total}")
    # Whoever is given the address sees the same, in the same fields.
    other = visit(server).open(page.url.removeprefix(server.ui))
    assert shown_runs(other) == shown_runs(page)
    expect(other.get_by_role("searchbox")).to_have_value("three")
    expect(other.locator("select[name=algo]")).to_have_value("ppo")
    other.get_by_role("link", name="Clear").click()
    expect(other).to_have_url(f"{server.ui}/training")


def test_the_environment_and_the_agent_are_filters(server: Server, visit: Visit, many_runs: FolderRuns) -> None:
    page = visit(server).open("/training")
    page.locator("select[name=env]").select_option("toy_environments:FixedLength-v0")
    expect(page).to_have_url(re.compile("env="))
    page.wait_for_load_state()
    assert shown_runs(page) == wanted(many_runs, RunQuery(env_id="toy_environments:FixedLength-v0")) != []
    page.goto("/training")
    page.locator("select[name=agent]").select_option("chain")
    expect(page).to_have_url(re.compile("agent=chain"))
    page.wait_for_load_state()
    assert shown_runs(page) == wanted(many_runs, RunQuery(agent_id="chain")) != []


def test_pages_hold_every_run_once_and_the_browser_s_back_leads_back(
    server: Server, visit: Visit, many_runs: FolderRuns
) -> None:
    page = visit(server).open("/training?sort=name")
    every = wanted(many_runs, RunQuery(sort="name"), limit=500)
    seen: list[list[str]] = [shown_runs(page)]
    for _ in range(COPIES):
        following = page.get_by_role("link", name="Next")
        if not following.count():
            break
        following.click()
        page.wait_for_load_state()
        seen.append(shown_runs(page))
    assert [run for part in seen for run in part] == every
    assert len(seen) == -(-COPIES // 50)
    expect(page.locator("#pager")).to_contain_text(f"{COPIES}")
    page.go_back()
    assert shown_runs(page) == seen[-2]
    page.get_by_role("link", name="Previous").click()
    page.wait_for_load_state()
    assert shown_runs(page) == seen[0]
    # From a run back to the very list.
    page.locator("#runs .name").nth(2).click()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.go_back()
    assert shown_runs(page) == seen[0]


def test_what_matches_nothing_says_so(server: Server, visit: Visit) -> None:
    page = visit(server).open("/training?q=no-such-run-anywhere")
    expect(page.get_by_role("heading", name="No run matches")).to_be_visible()
    page.get_by_role("link", name="Clear the filters").click()
    page.wait_for_url("**/training")
    page.wait_for_load_state()
    assert len(shown_runs(page)) == 50


def test_a_sort_that_does_not_exist_is_a_page_that_says_so(server: Server, visit: Visit) -> None:
    visitor = visit(server)
    visitor.expected.append("422")
    page = visitor.open("/training?sort=colour")
    expect(page.get_by_role("heading", level=1)).to_have_text("This address cannot be used")
    assert "colour" in text_of(page.locator("#problem"))
