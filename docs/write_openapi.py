"""Writes docs/openapi.json, the description of the REST API; with `--check` only says whether it is up to date.

Run it after a change of the API: python docs/write_openapi.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.web.app import create_app
from sb3_mlflow_ckpt.web.settings import WebSettings

DESCRIPTION = Path(__file__).with_name("openapi.json")


def openapi() -> str:
    """Return the document's text; the server's settings and runs do not change it."""
    app = create_app(FolderRuns("checkpoints"), WebSettings(checkpoint_dir=Path("checkpoints")))
    return json.dumps(app.openapi(), indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Write the description, or check it."""
    text = openapi()
    if arguments == ["--check"]:
        current = DESCRIPTION.read_text(encoding="utf-8") if DESCRIPTION.exists() else ""
        if current != text:
            print(f"{DESCRIPTION} is stale: run python {Path(__file__).name} in docs/", file=sys.stderr)
            return 1
        return 0
    DESCRIPTION.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
