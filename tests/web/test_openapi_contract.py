"""The description of the API that is committed is the one that the server gives, and it is whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from web_server import ServedApp

ROOT = Path(__file__).parents[2]
DESCRIPTION = ROOT / "docs" / "openapi.json"


def test_the_committed_description_is_what_the_server_says(server: ServedApp, serve) -> None:
    committed = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    hint = "docs/openapi.json is stale: run python docs/write_openapi.py"
    assert server.ask("/api/openapi.json").json == committed, hint
    # Whatever the settings are.
    bearer = {"Authorization": "Bearer a-token-that-nobody-guesses"}
    other = serve(token="a-token-that-nobody-guesses", root_path="/history")
    assert other.ask("/history/api/openapi.json", headers=bearer).json == committed


def test_the_script_says_whether_the_description_is_stale(tmp_path: Path) -> None:
    for name, stale in (("write_openapi.py", None), ("openapi.json", "{}")):
        (tmp_path / name).write_text(stale or (ROOT / "docs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    script = [sys.executable, str(tmp_path / "write_openapi.py")]
    check = subprocess.run([*script, "--check"], capture_output=True, text=True)
    assert check.returncode == 1 and "stale" in check.stderr
    subprocess.run(script, check=True)
    assert (tmp_path / "openapi.json").read_bytes() == DESCRIPTION.read_bytes()


def test_every_operation_only_reads_and_declares_its_problems() -> None:
    document = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    assert len(document["paths"]) >= 9
    for path, operations in document["paths"].items():
        assert set(operations) == {"get"}, path
        operation = operations["get"]
        assert operation["summary"] and operation["description"] and operation["operationId"]
        for status in ("405", "421", "500", "503", "401"):
            content = operation["responses"][status]["content"]
            assert set(content) == {"application/problem+json"}
        assert "404" in operation["responses"] or "{" not in path
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (path, parameter)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references == set(document["components"]["schemas"])
