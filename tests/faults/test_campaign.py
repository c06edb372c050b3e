"""The short form of the campaign: each protocol killed at a part of its named points, at random, and refused by the disk."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from injector import PRELOAD, library
from processes import DEADLINE, ROOT, environment
from workloads import WORKLOADS

_CAMPAIGN = Path(__file__).with_name("campaign.py")
_SEED = int(os.environ.get("SB3_MLFLOW_CKPT_TEST_SEED") or random.randrange(10**6))
_RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()


def _run(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, _CAMPAIGN, *map(str, words)],
        env=environment(**{PRELOAD: str(library())}), capture_output=True, text=True, timeout=2 * DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("protocol", [name for name, workload in WORKLOADS.items() if not workload.mirrored])
def test_nothing_is_lost(protocol: str) -> None:
    words = ("--only", protocol, "--kills", 2, "--errors", 4, "--points-at-most", 8, "--seed", _SEED, "--json")
    *told, last = _run(*words).splitlines()
    rows: list[dict[str, Any]] = json.loads(last)
    assert [row["lost"] for row in rows if row["lost"]] == [], f"seed {_SEED}: {told}"
    assert all(row["times"] for row in rows)


def test_every_point_that_a_protocol_meets_is_told_in_the_document() -> None:
    """A new step of a protocol is a new name here: then it is killed there, too, and the document says so."""
    met = {name for names in json.loads(_run("--points")).values() for name in names}
    table = _RELIABILITY.partition("<!-- points -->")[2].partition("<!-- /points -->")[0]
    assert set(re.findall(r"`([a-z]+:[a-z-]+)`", table)) == met
