from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Server, Visit, Visitor, chromium, running_browser
from filelock import FileLock
from playwright.sync_api import Browser, expect
from real_runs import RealRuns, train_all

# Several run side by side.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    """Runs that were really trained, once for all worker processes of the session."""
    chromium()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "real-runs"
    with FileLock(f"{folder}.lock"):
        done = folder / "done.json"
        if not done.exists():
            folder.mkdir()
            train_all(folder)
            done.write_text(json.dumps(True))
    return RealRuns(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser; not for the session, since its event loop would be in the way of other modules' ones."""
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def server(real_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The product, serving the real runs."""
    served = Server(tmp_path_factory.mktemp("serve"), "--checkpoint-dir", real_runs.checkpoint_dir)
    yield served
    served.stop()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens windows on a server, which must all end without having noticed anything."""
    visitors: list[Visitor] = []

    def open_window(server: Server, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, server, **options))
        return visitors[-1]

    yield open_window
    for visitor in visitors:
        visitor.close()
