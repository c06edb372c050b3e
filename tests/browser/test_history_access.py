"""For everybody: axe-core on every page and state, the keyboard alone, no script, the dark, paper, a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, Server, Visit, axe_violations
from history import checkpoint_row, run_row, shown_runs, text_of, texts_of
from playwright.sync_api import Page, expect
from real_runs import NAMES, RealRuns

THEMES = ("light", "dark")
STATES = ("tracked", "third of three", "killed", "stopped", "stalled", "broken simulator", "pruned", "damaged")
"""One run of each status and of each thing that can be said of a checkpoint."""


@pytest.fixture(scope="module")
def empty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("empty")
    served = Server(folder, "--checkpoint-dir", folder / "none")
    yield served
    served.stop()


def open_everything(page: Page) -> None:
    """Open every disclosure: what is folded is looked at, too."""
    page.evaluate("() => document.querySelectorAll('details').forEach(details => details.open = true)")


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_wrong_with_any_run_s_page(
    server: Server, visit: Visit, real_runs: RealRuns, theme: str
) -> None:
    visitor = visit(server, color_scheme=theme)
    for name in STATES:
        page = visitor.open(f"/training/{real_runs.id(name)}")
        open_everything(page)
        assert (name, axe_violations(page)) == (name, [])


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing_wrong_with_any_other_page(
    server: Server, empty_server: Server, visit: Visit, real_runs: RealRuns, theme: str
) -> None:
    compared = "&".join(f"run={real_runs.id(name)}" for name in NAMES[:8])
    targets = {
        "/training": 200,
        "/training?q=no-such-run": 200,
        f"/training/compare?{compared}": 200,
        "/training/compare": 200,
        "/api": 200,
        "/training/0123456789abcdef": 404,
        "/nowhere": 404,
        "/training?sort=nonsense": 422,
    }
    for size, some in ((DESKTOP, list(targets)), (PHONE, list(targets)[:3])):
        visitor = visit(server, color_scheme=theme, size=size)
        visitor.expected += ["404", "422"]
        for target in some:
            answer = visitor.page.goto(target)
            assert answer is not None and answer.status == targets[target]
            open_everything(visitor.page)
            assert (target, axe_violations(visitor.page)) == (target, [])
    assert axe_violations(visit(empty_server, color_scheme=theme).open("/training")) == []


def test_the_keyboard_alone_leads_everywhere(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server).open("/training")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("() => document.activeElement.dataset.sort ?? document.activeElement.name ?? ''"))
        if stops[-1] == "started_at":
            break
    # From the filters to the heads of the columns, in the order in which they are seen.
    assert [stop for stop in stops if stop] == [
        *("q", "algo", "env", "agent"),
        *("status", "name", "algo", "mean_reward", "num_timesteps", "started_at"),
    ]
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("sort=started_at"))
    head = page.locator("th:has([data-sort=started_at])")
    expect(head).to_have_attribute("aria-sort", "ascending")
    page.wait_for_load_state()
    assert shown_runs(page) == [run["run_id"] for run in reversed(real_runs.store.list())]


@pytest.mark.parametrize("target", ["list", "run"])
def test_what_has_the_focus_is_seen_to_have_it(
    server: Server, visit: Visit, real_runs: RealRuns, target: str
) -> None:
    page = visit(server).open("/training" if target == "list" else f"/training/{real_runs.id('third of three')}")
    unseen = []
    for _ in range(120):
        page.keyboard.press("Tab")
        unseen += page.evaluate("""() => {
            const focused = document.activeElement;
            if (focused === document.body) return [];
            const shown = [focused, ...focused.querySelectorAll('*'), focused.nextElementSibling, focused.parentElement];
            const ring = shown.some(element => element && (getComputedStyle(element).outlineStyle !== 'none'
                || getComputedStyle(element).boxShadow !== 'none'
                || (element.closest('svg') && parseFloat(getComputedStyle(element).strokeWidth) > 0)));
            return ring ? [] : [focused.outerHTML.slice(0, 120)];
        }""")
    assert unseen == []


def test_without_a_script_everything_is_there(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    visitor = visit(server, java_script_enabled=False)
    page = visitor.open("/training")
    assert texts_of(page.locator("#runs .name")) == [run["name"] for run in real_runs.store.list()]
    # No time is only an age.
    assert all(re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text) for text in texts_of(page.locator("#runs time")))
    page.get_by_role("searchbox").fill("chain")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator("#runs .name")).to_have_count(3)
    page.get_by_role("link", name="third of three").click()
    record = real_runs.record("third of three")
    newest = record["checkpoint_paths"][-1]
    row = checkpoint_row(page, newest["episode"])
    # The forms of a command are chosen without a script, too.
    expect(row.locator(".command code:visible")).to_contain_text("python -m sb3_mlflow_ckpt.trainer")
    page.locator("label:has(#program-mlflow)").click()
    expect(row.locator(".command code:visible")).to_contain_text("mlflow run .")
    expect(page.get_by_role("group", name="Mean reward by environment steps")).to_be_visible()


def test_the_dark_is_dark(server: Server, visit: Visit) -> None:
    def brightness(theme: str) -> tuple[float, float]:
        page = visit(server, color_scheme=theme).open("/training")
        colours = page.evaluate("() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        parts = [[float(part) for part in re.findall(r"[\d.]+", colour)[:3]] for colour in colours]
        scale = 255 if "rgb" in colours[0] else 1
        return sum(parts[0]) / scale / 3, sum(parts[1]) / scale / 3

    paper, ink = brightness("light")
    assert paper > 0.9 and ink < 0.3
    paper, ink = brightness("dark")
    assert paper < 0.2 and ink > 0.7


def test_paper_shows_the_run_and_nothing_to_press(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server).open(f"/training/{real_runs.id('third of three')}")
    page.emulate_media(media="print")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    expect(page.get_by_role("group", name="Mean reward by environment steps")).to_be_visible()
    assert page.locator("button:visible").count() == 0
    assert page.get_by_role("navigation", name="Pages").count() == 0
    assert len(page.pdf()) > 10_000


@pytest.mark.parametrize("target", ["/training", "run", "/training/compare", "/api"])
def test_a_phone_is_wide_enough(server: Server, visit: Visit, real_runs: RealRuns, target: str) -> None:
    if target == "run":
        target = f"/training/{real_runs.id('tracked')}"
    if target == "/training/compare":
        target += f"?run={real_runs.id('baseline')}&run={real_runs.id('quick dqn')}"
    page = visit(server, size=PHONE).open(target)
    open_everything(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE[0]
    if target == "/training":
        row = run_row(page, real_runs.id("baseline"))
        for part in (".name", ".status", ".numbers", ".c-progress", ".c-started"):
            expect(row.locator(part).first).to_be_visible()


def test_a_chart_is_legible_on_a_phone(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    for size in (DESKTOP, PHONE):
        page = visit(server, size=size).open(f"/training/{real_runs.id('third of three')}")
        labels = page.locator("#curve .axis-labels text:visible")
        heights = labels.evaluate_all("all => all.map(text => text.getBoundingClientRect().height)")
        assert heights and min(heights) >= 11
        boxes = labels.evaluate_all("all => all.map(text => text.getBoundingClientRect()).map(b => [b.left, b.right, b.top, b.bottom])")
        crossing = [
            (one, other)
            for index, one in enumerate(boxes)
            for other in boxes[index + 1 :]
            if one[0] < other[1] and other[0] < one[1] and one[2] + 2 < other[3] and other[2] + 2 < one[3]
        ]
        assert crossing == []


def test_nothing_is_told_by_a_colour_alone(server: Server, visit: Visit, real_runs: RealRuns) -> None:
    page = visit(server, forced_colors="active").open("/training")
    for run in real_runs.store.list():
        status = run_row(page, run["run_id"]).locator(".status")
        assert text_of(status) == run["status"]
        assert status.locator("svg").count() == 1


def test_who_wants_no_movement_gets_none(server: Server, visit: Visit) -> None:
    page = visit(server, reduced_motion="reduce").open("/training")
    moving = page.evaluate("() => document.getAnimations().filter(a => a.playState === 'running').length")
    assert moving == 0


def test_no_file_is_written(real_runs: RealRuns, server: Server, visit: Visit) -> None:
    """Looking changes nothing in the folder of a run."""
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in real_runs.checkpoint_dir.rglob("*")}

    before = state()
    page = visit(server).open("/training")
    for name in NAMES:
        page.goto(f"/training/{real_runs.id(name)}")
    assert state() == before
