"""The buttons that copy: what is on the clipboard behind them, and that a shell goes on from there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, Server, Visitor, inside_viewport, running_browser
from conftest import Visit
from pasting import pasted
from playwright.sync_api import Page, expect
from real_runs import RealRuns

from sb3_mlflow_ckpt.resume_commands import resume_command

CLIPBOARD = ["clipboard-read", "clipboard-write"]


@pytest.fixture(scope="module")
def own_runs(real_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    """A copy of the runs, to which the shell may add some."""
    folder = tmp_path_factory.mktemp("copied") / "work"
    shutil.copytree(real_runs.checkpoint_dir, folder / real_runs.checkpoint_dir.name)
    return RealRuns(folder)


@pytest.fixture(scope="module")
def server(own_runs: RealRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = Server(tmp_path_factory.mktemp("serve"), "--checkpoint-dir", own_runs.checkpoint_dir, "--allowed-host", "training-box")
    yield served
    served.stop()


def clipboard(page: Page) -> str:
    return str(page.evaluate("() => navigator.clipboard.readText()"))


def command_of(record: dict[str, Any], item: dict[str, Any], **form: Any) -> str:
    command = resume_command(record, item, **{"program": "trainer", "source": "path", **form})
    assert command is not None
    return command
