"""Writes docs/openapi.json, the description of the REST API. A test compares it with what the server says."""

from __future__ import annotations

import json
from pathlib import Path

from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.web.app import create_app
from sb3_mlflow_ckpt.web.settings import WebSettings


def openapi() -> str:
    """Return the document's text; the server's settings and runs do not change it."""
    app = create_app(FolderRuns("checkpoints"), WebSettings(checkpoint_dir=Path("checkpoints")))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("openapi.json").write_text(openapi())
