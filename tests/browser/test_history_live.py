"""Pages that stay open: what changes without losing one's place, and what an outage looks like."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Server, Visit, axe_violations
from history import checkpoint_row, run_row, shown_runs, text_of
from playwright.sync_api import Page, expect
from processes import DEADLINE, Leash, python, start_trainer, wait_for
from real_runs import RealRuns
from servers import MongoServer

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns

# A page asks every five seconds while something runs.
SOON = 20_000
_FLAGS = ("--hyperparameters", "{n_steps: 64, batch_size: 64, n_epochs: 1}", "--checkpoint-interval-episodes", 10)


class LiveTraining:
    """A training that takes the steps that a test allows, among real runs that have ended.

    Args:
        folder: Its working folder.
    """

    def __init__(self, folder: Path) -> None:
        self.leash = Leash(folder, 600)
        self.checkpoint_dir = folder / "checkpoints"
        flags = ("--env-wrappers", f"[{self.leash.wrapper}]", "--agent-id", "live", "--run-name", "live")
        length = ("--total-timesteps", 6000, "--heartbeat-seconds", 1, "--mlflow", "false", "--seed", 5)
        self.process = start_trainer(*_FLAGS, *flags, *length, "--keep-last-n-checkpoints", 0, cwd=folder)
        wait_for(lambda: self.episodes() >= 20, "two checkpoints", self.process)
        [run] = FolderRuns(self.checkpoint_dir).list(agent_id="live")
        self.run_id = str(run["run_id"])

    def episodes(self) -> int:
        """Return the newest checkpoint's episode."""
        saved = self.checkpoint_dir.glob("live/*/ep*_metadata.json")
        return max((int(re.findall(r"ep(\d+)_", path.name)[0]) for path in saved), default=0)

    def go_on(self, steps: int) -> int:
        """Let it take so many steps in all; return the newest episode that was saved when it stands still again."""
        before, heartbeats = self.episodes(), set[str]()
        self.leash.allow(steps)

        def stands_still() -> bool:
            record = FolderRuns(self.checkpoint_dir).record(self.run_id)
            if record["progress"]["num_timesteps"] == steps:
                # What was queued at the last step is saved long before the third one.
                heartbeats.add(record["heartbeat_at"])
            return len(heartbeats) > 2

        wait_for(stands_still, "the end of the leash", self.process)
        assert self.episodes() > before
        return self.episodes()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(DEADLINE)


@pytest.fixture(scope="module")
def training(real_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveTraining]:
    folder = tmp_path_factory.mktemp("live") / "work"
    shutil.copytree(real_runs.checkpoint_dir, folder / "checkpoints")
    live = LiveTraining(folder)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def server(training: LiveTraining, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = Server(tmp_path_factory.mktemp("serve"), "--checkpoint-dir", training.checkpoint_dir)
    yield served
    served.stop()


def scroll_of(page: Page) -> float:
    return float(page.evaluate("() => scrollY"))


# In the order of the training's life.


def test_a_list_goes_on_without_losing_one_s_place(server: Server, visit: Visit, training: LiveTraining) -> None:
    page = visit(server, size=(1280, 500)).open("/training?status=running&status=completed")
    row = run_row(page, training.run_id)
    page.get_by_role("searchbox").fill("half a wor")
    page.get_by_label("Compare live").check()
    last = page.locator("#runs .name").last
    last.focus()
    last.scroll_into_view_if_needed()
    address, scroll, order = page.url, scroll_of(page), shown_runs(page)
    assert scroll > 0
    said = text_of(row.locator(".c-saved"))
    episode = training.go_on(1500)
    expect(row.locator(".c-saved")).to_contain_text(f"ep {episode}", timeout=SOON)
    assert text_of(row.locator(".c-saved")) != said
    assert (page.url, scroll_of(page), shown_runs(page)) == (address, scroll, order)
    expect(last).to_be_focused()
    expect(page.get_by_role("searchbox")).to_have_value("half a wor")
    expect(page.get_by_label("Compare live")).to_be_checked()


def test_a_run_s_page_goes_on_without_losing_one_s_place(server: Server, visit: Visit, training: LiveTraining) -> None:
    page = visit(server, size=(1280, 500)).open(f"/training/{training.run_id}")
    expect(page.locator("main")).to_contain_text("running")
    known = training.episodes()
    row = checkpoint_row(page, known)
    details = row.locator("details")
    details.locator("summary").click()
    page.get_by_text("The curve in numbers").click()
    page.locator("label:has(#program-mlflow)").click()
    button = row.get_by_role("button", name=f"Copy path of episode {known}")
    button.focus()
    button.scroll_into_view_if_needed()
    top = (button.bounding_box() or {})["y"]
    points = page.locator("#curve-rows tr").count()
    episode = training.go_on(2500)
    expect(checkpoint_row(page, episode)).to_be_visible(timeout=SOON)
    expect(page.locator("#curve-rows tr")).not_to_have_count(points, timeout=SOON)
    expect(page.locator(".resume")).to_contain_text(f"episode {episode}")
    expect(button).to_be_focused()
    expect(page.locator("#program-mlflow")).to_be_checked()
    assert details.evaluate("details => details.open")
    assert abs((button.bounding_box() or {})["y"] - top) < 2, "what one reads was moved"


def test_a_run_that_begins_comes_into_the_list(server: Server, visit: Visit, training: LiveTraining) -> None:
    [run] = [run for run in FolderRuns(training.checkpoint_dir).list() if run["name"] == "pruned"]
    folder = RunFolder(training.checkpoint_dir, run["agent_id"], run["run_id"]).path
    elsewhere = training.checkpoint_dir.with_name("elsewhere")
    folder.rename(elsewhere)
    page = visit(server).open("/training?sort=name")
    before = shown_runs(page)
    assert run["run_id"] not in before
    elsewhere.rename(folder)
    expect(run_row(page, run["run_id"])).to_be_visible(timeout=SOON)
    after = shown_runs(page)
    assert [each for each in after if each != run["run_id"]] == before
    names = [text_of(run_row(page, each).locator(".name")) for each in after]
    assert names == sorted(names)


def test_an_unreachable_server_leaves_what_was_there(server: Server, visit: Visit, training: LiveTraining) -> None:
    visitor = visit(server)
    visitor.expected += ["ERR_INTERNET_DISCONNECTED", "Failed to fetch"]
    page = visitor.open("/training")
    expect(page.locator("[data-connection]")).to_have_text("Live")
    banner = page.locator("[data-offline]")
    expect(banner).to_be_hidden()
    rows = shown_runs(page)
    visitor.context.set_offline(True)
    expect(banner).to_be_visible(timeout=SOON)
    expect(page.locator("[data-connection]")).to_have_text("Offline")
    assert shown_runs(page) == rows
    visitor.context.set_offline(False)
    expect(banner).to_be_hidden(timeout=SOON)
    expect(page.locator("[data-connection]")).to_have_text("Live")


def test_the_end_of_a_run_is_seen_and_said(server: Server, visit: Visit, training: LiveTraining) -> None:
    listed, shown = visit(server).open("/training"), visit(server).open(f"/training/{training.run_id}")
    status = run_row(listed, training.run_id).locator(".status")
    expect(status).to_have_text("running")
    # What an announcement says is kept: a screen reader hears it once.
    listed.evaluate("""() => {
        window.heard = [];
        const status = document.querySelector('[data-status]');
        new MutationObserver(() => window.heard.push(status.textContent)).observe(status, {childList: true});
    }""")
    training.leash.release()
    wait_for(lambda: training.process.poll() is not None, "the end of the training")
    assert training.process.returncode == 0
    expect(status).to_have_text("completed", timeout=SOON)
    expect(shown.locator("main .status").first).to_have_text("completed", timeout=SOON)
    expect(shown).to_have_title(re.compile("completed"))
    heard = listed.evaluate("() => new Promise(done => setTimeout(() => done(window.heard.join()), 200))")
    assert "live is completed now" in heard


# A database that is stopped and started again.


@pytest.fixture
def database(mongo_server: Callable[[], MongoServer], real_runs: RealRuns, tmp_path: Path) -> Iterator[tuple[MongoServer, Server]]:
    """A MongoDB-compatible server that holds the real runs, and the product serving it."""
    mongo = mongo_server()
    shutil.copytree(real_runs.checkpoint_dir, tmp_path / "checkpoints")
    done = python("-m", "sb3_mlflow_ckpt", "checkpoints", "sync", "--mongo-uri", mongo.uri, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    served = Server(tmp_path, "--mongo-uri", mongo.uri, "--checkpoint-dir", tmp_path / "checkpoints")
    yield mongo, served
    served.stop()


def test_a_database_that_is_down_is_named_and_comes_back(
    database: tuple[MongoServer, Server], visit: Visit, real_runs: RealRuns
) -> None:
    mongo, server = database
    visitor = visit(server)
    visitor.expected += ["503"]
    page = visitor.open("/training")
    every = shown_runs(page)
    assert set(every) == {run["run_id"] for run in real_runs.store.list()}
    banner = page.get_by_role("alert")
    assert banner.count() == 0
    mongo.stop()
    page.reload()
    expect(banner).to_contain_text("does not answer", timeout=SOON)
    expect(banner.locator("time")).to_have_attribute("datetime", re.compile(r"^20\d\d-"))
    assert "MongoDB" in text_of(banner)
    assert shown_runs(page) == every
    assert axe_violations(page) == []
    # What was not seen before cannot be shown: a page says so.
    page.goto(f"/training/{real_runs.id('baseline')}")
    expect(page.get_by_role("heading", level=1)).to_contain_text("does not answer")
    assert axe_violations(page) == []
    mongo.start()
    expect(page.get_by_role("heading", level=1)).to_contain_text("baseline", timeout=2 * SOON)
    page.goto("/training")
    expect(page.get_by_role("alert")).to_have_count(0, timeout=SOON)
    assert shown_runs(page) == every
