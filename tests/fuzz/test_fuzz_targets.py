"""Every target of the fuzzer over what the code itself writes, and over the same mutations of it each time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from targets import TARGETS, mutations, watched

COUNTS = {"member": 60, "foreign": 40, "zip": 150, "uri": 60, "record": 60}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_any_bytes_are_read_or_refused_with_an_error_of_ours(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.run(seed)
    for content in [b"", b"\0", *mutations(seeds, COUNTS.get(name, 300), seed=4)]:
        with watched(content):
            target.run(content)
