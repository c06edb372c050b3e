"""Owns what tests need of a browser: Debian's chromium, pages that fail on what no page may do, axe-core."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright
from web_server import ServeCommand, ask

PROGRAMS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
ANOTHER_NAME = "training-box"
"""A name under which the browser reaches the loopback: on http, pages of another one than localhost may do less."""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    f"--host-resolver-rules=MAP {ANOTHER_NAME} 127.0.0.1",
)
DESKTOP, PHONE = (1280, 900), (390, 844)


def chromium() -> str:
    """Return the browser's program; skip, aloud, where there is none."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip("NOT TESTED IN A BROWSER: install chromium, for example with apt-get install chromium")
    return found


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run a browser for as long as a block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield browser
        browser.close()


class Server:
    """The command `serve` on two free ports of the loopback.

    Args:
        folder: Where it is started and its output kept.
        flags: What it is called with.
    """

    def __init__(self, folder: Path, *flags: object) -> None:
        self._command = ServeCommand(folder, "--port", 0, "--ui-port", 0, *flags)
        try:
            self.api_port, self.ui_port = self._command.ports()
        except BaseException:
            self.stop()
            raise

    @property
    def ui(self) -> str:
        return f"http://localhost:{self.ui_port}"

    def json(self, target: str) -> Any:
        """Return what the API answers."""
        return ask(self.api_port, target).json

    def stop(self) -> None:
        """End it; the same again does nothing."""
        self._command.stop()


class Visitor:
    """A person with a browser window, who notices what no page may do: errors, and requests to other places.

    Args:
        browser: The browser.
        server: Whose pages.
        options: Of the window: `size`, `origin`, `color_scheme`, `java_script_enabled`, ...
    """

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.server = server
        width, height = options.pop("size", DESKTOP)
        self._origin = options.pop("origin", server.ui)
        self.context: BrowserContext = browser.new_context(
            viewport={"width": width, "height": height}, base_url=self._origin, **options
        )
        self.context.set_default_timeout(15_000)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.expected: list[str] = []
        """Parts of problems that a test brings about itself."""
        self.requests: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        self.page.on("request", self._requested)

    def open(self, path: str) -> Page:
        """Go to a page; return the tab."""
        self.page.goto(path)
        return self.page

    def close(self) -> None:
        """Close the window; fail if anything was noticed."""
        self.context.close()
        noticed = [text for text in self.problems if not any(part in text for part in self.expected)]
        assert not noticed, noticed

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console {message.type}: {message.text}")

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)
        if not request.url.startswith((f"{self._origin}/", "data:", "about:", "blob:")):
            self.problems.append(f"request to another place: {request.url}")


Visit = Callable[..., Visitor]


def axe_violations(page: Page) -> list[str]:
    """Return what axe-core finds wrong with a page as it is: a line for each element, WCAG 2.2 AA and best practice."""
    source = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(source)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22a", "wcag22aa", "best-practice"]
    result = page.evaluate("tags => axe.run(document, {runOnly: tags})", tags)
    assert result["passes"], "axe-core looked at nothing"
    return [
        f"{found['id']}: {node['target']} {' '.join(node['failureSummary'].split())}"
        for found in result["violations"]
        for node in found["nodes"]
    ]


def inside_viewport(page: Page, box: dict[str, float] | None) -> bool:
    """Return whether a bounding box is in the part of the page that is seen from left to right."""
    size = page.viewport_size
    assert size is not None
    return box is not None and box["x"] >= 0 and box["x"] + box["width"] <= size["width"]


def words(text: str) -> str:
    """Return a text with single spaces."""
    return re.sub(r"\s+", " ", text).strip()
