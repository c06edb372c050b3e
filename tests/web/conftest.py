from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web_runs import write_runs
from web_server import ServeCommand, ServedApp

from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.reader import RunReader
from sb3_mlflow_ckpt.web.settings import WebSettings

Serve = Callable[..., ServedApp]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves a store, the folder `checkpoints` where none is given; further words are settings."""
    apps: list[ServedApp] = []

    def start(store: RunReader | None = None, **settings: Any) -> ServedApp:
        folder = tmp_path / "checkpoints"
        apps.append(ServedApp(store or FolderRuns(folder), WebSettings(checkpoint_dir=folder, **settings)))
        return apps[-1]

    yield start
    for app in apps:
        app.close()


@pytest.fixture(scope="module")
def many_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a run of every kind; for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("runs") / "checkpoints"
    write_runs(folder)
    return folder


@pytest.fixture(scope="module")
def server(many_runs: Path) -> Iterator[ServedApp]:
    """A server of those runs."""
    app = ServedApp(FolderRuns(many_runs), WebSettings(checkpoint_dir=many_runs))
    yield app
    app.close()


@pytest.fixture
def serve_command(tmp_path: Path) -> Iterator[Callable[..., ServeCommand]]:
    """Starts the command `serve` in the test's folder."""
    commands: list[ServeCommand] = []

    def start(*flags: object, **extra: str) -> ServeCommand:
        folder = tmp_path / f"serve-{len(commands)}"
        folder.mkdir()
        commands.append(ServeCommand(folder, *flags, **extra))
        return commands[-1]

    yield start
    for command in commands:
        command.stop()
