"""SECURITY.md and docs/reliability.md name a test for every promise, and the tests are there."""

import ast
import re
from pathlib import Path

import pytest
from targets import TARGETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()


def _functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("text", [TEXT, RELIABILITY], ids=["security", "reliability"])
def test_every_test_that_is_named_exists(text: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 15
    assert [f"{file}::{name}" for file, name in named if name not in _functions(file)] == []


@pytest.mark.parametrize("text", [TEXT, RELIABILITY], ids=["security", "reliability"])
def test_every_promise_names_a_test(text: str) -> None:
    promises = text.partition("## What is promised")[2].partition("## How it works")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 12
    assert [row for row in rows if "::test_" not in row.rsplit(" | ", 1)[-1]] == []


def test_the_targets_of_the_fuzzer_are_the_ones_that_are_listed() -> None:
    listed = TEXT.rsplit("The targets are", 1)[1]
    assert re.findall(r"`(\w+)`", listed) == sorted(TARGETS)


def test_it_is_linked() -> None:
    assert "](SECURITY.md)" in (ROOT / "README.md").read_text()
    assert "](docs/reliability.md)" in (ROOT / "README.md").read_text()
    assert "](../SECURITY.md)" in (ROOT / "docs" / "safe-loading.md").read_text()
