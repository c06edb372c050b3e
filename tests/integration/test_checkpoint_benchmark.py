"""The benchmark of what a checkpoint costs runs, in its short form; how quick anything is nobody asks here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import DEADLINE, ROOT, environment

_FIGURES = {"seconds", "stall", "background", "peak", "bytes", "lost", "without"}
_METHODS = ("copy", "sb3", "sb3-mlflow", "lightning", "ours", "ours-mlflow")


def test_the_short_benchmark_measures_every_method_and_says_which_goals_are_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/checkpointing.py", "--quick", "--json", file),
            *("--methods", *_METHODS, "--seconds", "0.01"),
        ],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert set(figures) == {"machine", "options", "costs"}
    rows = {row["names"][1]: row for row in figures["costs"]}
    assert tuple(rows) == _METHODS and all(row["names"][0] == "mlp" for row in rows.values())
    for row in rows.values():
        assert row["method"] in done.stdout
        assert row["pairs"] or "not installed" in row["skipped"]
        for pair in row["pairs"]:
            assert set(pair) == _FIGURES
            assert 0 < pair["stall"] <= pair["seconds"] and pair["background"] > 0
    written = {name: row["pairs"][-1]["bytes"] for name, row in rows.items() if row["pairs"]}
    assert written["copy"] == 0
    # Parameters and two moments of each, on disk; with MLflow there as well.
    assert min(written["sb3"], written["ours"]) > rows["copy"]["state"] > 100_000
    assert written["sb3-mlflow"] == pytest.approx(2 * written["sb3"], rel=0.01)
    # A store on the same file system has the files themselves.
    assert written["ours-mlflow"] == pytest.approx(written["ours"], rel=0.05)

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from costs.document import document
    from costs.goals import GOALS, checks

    assert {check.goal for check in checks(figures)} == {1, 2, 4}
    page = document(figures)
    tables = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(tables) > len(GOALS) + len(rows) and all(line in page for line in tables)
