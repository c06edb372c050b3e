"""The buttons that copy: what is on the clipboard behind them, and that a shell goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from browser import ANOTHER_NAME, DESKTOP, PHONE, Server, Visit, inside_viewport
from history import checkpoint_row, copy_button, primary_button, resumable
from pasting import pasted
from playwright.sync_api import Locator, Page, expect
from real_runs import RealRuns

from sb3_mlflow_ckpt.resume_commands import resume_command

PERMISSIONS = ["clipboard-read", "clipboard-write"]
FORMS = [(program, source) for program in ("trainer", "mlflow") for source in ("path", "uri")]


@pytest.fixture(scope="module")
def own_runs(real_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    """A copy of the runs, to which a shell may add some."""
    folder = tmp_path_factory.mktemp("copied") / "work"
    shutil.copytree(real_runs.checkpoint_dir, folder / real_runs.checkpoint_dir.name)
    return RealRuns(folder)


@pytest.fixture(scope="module")
def server(own_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--checkpoint-dir", own_runs.checkpoint_dir, "--allowed-host", ANOTHER_NAME)
    served = Server(tmp_path_factory.mktemp("serve"), *flags)
    yield served
    served.stop()


def clipboard(page: Page) -> str:
    return str(page.evaluate("() => navigator.clipboard.readText()"))


def command_of(record: dict[str, Any], item: dict[str, Any], program: Any = "trainer", source: Any = "path") -> str:
    command = resume_command(record, item, program=program, source=source)
    assert command is not None
    return command


def press_until(page: Page, wanted: Locator, key: str = "Tab", most: int = 200) -> None:
    """Press a key until an element has the focus."""
    for _ in range(most):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{most} times {key} did not lead to {wanted}")


def test_what_a_mouse_copies_resumes_the_run(server: Server, visit: Visit, own_runs: RealRuns) -> None:
    record = own_runs.record("stopped")
    newest = record["checkpoint_paths"][-1]
    page = visit(server, permissions=PERMISSIONS).open(f"/training/{record['run_id']}")
    button = primary_button(page)
    expect(button).to_have_text("Copy resume command")
    button.click()
    expect(button).to_have_text("Copied")
    expect(page.get_by_role("status")).to_have_text("Copied")
    command = clipboard(page)
    assert command == command_of(record, newest)
    with pasted(command, own_runs.folder, record["run_id"], (own_runs.checkpoint_dir,)) as resumed:
        parent = resumed["parent"]
        assert (parent["checkpoint"], parent["episode"], parent["sha256"]) == (
            newest["path"], newest["episode"], newest["sha256"],
        )  # fmt: skip
        page.goto(f"/training/{resumed['run_id']}")
        expect(page.locator("#lineage")).to_contain_text("stopped")
        page.get_by_role("link", name=f"ep {newest['episode']}").first.click()
        expect(checkpoint_row(page, newest["episode"])).to_be_in_viewport()


def test_what_the_keyboard_copies_resumes_the_run(server: Server, visit: Visit, own_runs: RealRuns) -> None:
    record = own_runs.record("tracked")
    oldest = record["checkpoint_paths"][0]
    assert (oldest["state"], oldest["on_disk"]) == ("mirrored", False)
    page = visit(server, permissions=PERMISSIONS).open(f"/training/{record['run_id']}")
    press_until(page, page.locator("#source-path"))
    page.keyboard.press("ArrowRight")
    button = copy_button(checkpoint_row(page, oldest["episode"]), source="uri")
    press_until(page, button)
    page.keyboard.press("Enter")
    expect(button).to_have_text("Copied")
    expect(button).to_be_focused()
    command = clipboard(page)
    assert command == command_of(record, oldest, source="uri")
    with pasted(command, own_runs.folder, record["run_id"], (own_runs.checkpoint_dir,)) as resumed:
        assert (resumed["parent"]["checkpoint"], resumed["parent"]["episode"]) == (oldest["uri"], oldest["episode"])


@pytest.mark.parametrize(("program", "source"), FORMS)
def test_every_form_of_every_command_is_copied_as_it_is(
    server: Server, visit: Visit, own_runs: RealRuns, program: str, source: str
) -> None:
    record = own_runs.record("tracked")
    page = visit(server, permissions=PERMISSIONS).open(f"/training/{record['run_id']}")
    page.locator(f"label:has(#program-{program})").click()
    page.locator(f"label:has(#source-{source})").click()
    for item in resumable(record):
        row = checkpoint_row(page, item["episode"])
        button = copy_button(row, program, source)
        button.click()
        expect(button).to_have_text("Copied")
        # Where the file is gone, MLflow's copy is named.
        there = source if source == "uri" or item["on_disk"] else "uri"
        expected = command_of(record, item, program, there)
        assert clipboard(page) == expected
        expect(row.locator(".command code:visible")).to_have_text(expected)


def test_ids_and_paths_are_copied(server: Server, visit: Visit, own_runs: RealRuns) -> None:
    record = own_runs.record("baseline")
    item = record["checkpoint_paths"][3]
    page = visit(server, permissions=PERMISSIONS).open(f"/training/{record['run_id']}")
    page.get_by_role("button", name="Copy the run id").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    assert clipboard(page) == record["run_id"]
    checkpoint_row(page, item["episode"]).locator("summary").click()
    page.get_by_role("button", name=f"Copy path of episode {item['episode']}", exact=True).click()
    page.wait_for_function("text => navigator.clipboard.readText().then(copied => copied === text)", arg=item["path"])


def test_a_page_that_has_no_clipboard_copies_all_the_same(server: Server, visit: Visit, own_runs: RealRuns) -> None:
    """On http and another name than localhost a browser gives pages no `navigator.clipboard`."""
    record = own_runs.record("stopped")
    visitor = visit(server, origin=f"http://{ANOTHER_NAME}:{server.ui_port}")
    page = visitor.open(f"/training/{record['run_id']}")
    assert page.evaluate("() => [isSecureContext, 'clipboard' in navigator]") == [False, False]
    primary_button(page).click()
    expect(primary_button(page)).to_have_text("Copied")
    reader = visit(server, permissions=PERMISSIONS).open("/training")
    assert clipboard(reader) == command_of(record, record["checkpoint_paths"][-1])
    # Nothing is left of the field that it was copied from, and the focus is where it was.
    expect(primary_button(page)).to_be_focused()
    assert page.locator("textarea").count() == 0


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_button_that_copies_is_inside_the_window(
    server: Server, visit: Visit, own_runs: RealRuns, size: tuple[int, int]
) -> None:
    visitor = visit(server, size=size)
    for name in ("tracked", "baseline", "damaged"):
        page = visitor.open(f"/training/{own_runs.id(name)}")
        box = primary_button(page).bounding_box()
        # The first thing that is wanted of a page is there without scrolling.
        assert inside_viewport(page, box) and box is not None and box["y"] + box["height"] <= size[1]
        for program, source in FORMS:
            page.locator(f"label:has(#program-{program})").click()
            page.locator(f"label:has(#source-{source})").click()
            buttons = page.locator(".command button:visible").all()
            assert len(buttons) > len(resumable(own_runs.record(name))) - 1
            assert [found for found in buttons if not inside_viewport(page, found.bounding_box())] == []
            assert all((found.bounding_box() or {}).get("height", 0) >= 28 for found in buttons)
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_pruned_checkpoint_offers_nothing_to_copy(server: Server, visit: Visit, own_runs: RealRuns) -> None:
    record = own_runs.record("pruned")
    page = visit(server).open(f"/training/{record['run_id']}")
    gone = [item["episode"] for item in record["checkpoint_paths"] if item["state"] == "pruned"]
    assert gone
    for episode in gone:
        assert checkpoint_row(page, episode).get_by_role("button").count() == 0
        expect(checkpoint_row(page, episode)).to_contain_text("nobody has it any more")
