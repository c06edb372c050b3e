"""A child process that is told and asked in lines of JSON, whatever it does with them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest
from processes import wait_for

from sb3_mlflow_ckpt.child_process import ChildProcess, ProcessDiedError

Start = Callable[[str], ChildProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[ChildProcess] = []

    def start(script: str) -> ChildProcess:
        started.append(ChildProcess([sys.executable, "-c", f"import sys, time\n{script}"]))
        return started[-1]

    yield start
    for child in started:
        child.kill()


def test_what_it_is_told_comes_back_whole_whatever_its_size(start: Start) -> None:
    child = start("for line in sys.stdin: print(line, end='', flush=True)")
    # Many times what a pipe holds.
    child.tell({"long": "x" * 3_000_000})
    assert len(child.hear()["long"]) == 3_000_000


def test_lines_that_come_together_are_heard_one_by_one(start: Start) -> None:
    child = start("""print('{"a": 1}\\n{"b": 2}\\n{"c"', end='', flush=True); sys.stdin.read()""")
    assert child.hear() == {"a": 1}
    # Read with the first one: no poll tells of it.
    assert child.heard() == {"b": 2}
    assert child.heard() is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [("sys.exit(3)", "it ended"), ("print('[1]')", "it said"), ("print('what?')", "it said"), ("print('{', end='')", "it ended")],
    ids=["ends", "no object", "no JSON", "no whole line"],
)  # fmt: skip
def test_one_that_ends_or_says_what_makes_no_sense_counts_as_dead(start: Start, script: str, reason: str) -> None:
    with pytest.raises(ProcessDiedError, match=reason):
        start(script).hear()


def test_one_that_takes_no_more_counts_as_dead(start: Start) -> None:
    child = start("sys.stdin.close(); sys.stdout.close()")
    with pytest.raises(ProcessDiedError):
        for _ in range(100):
            child.tell({"a": "x" * 100_000})


def test_what_is_not_json_is_not_told(start: Start) -> None:
    with pytest.raises(ProcessDiedError, match="not JSON serializable"):
        start("sys.stdin.read()").tell({"a": object()})


@pytest.mark.parametrize("waits", [lambda child: child.hear(), lambda child: child.tell({"a": "x" * 1_000_000})])
def test_whoever_waits_for_it_is_out_a_moment_after_its_end(
    start: Start, waits: Callable[[ChildProcess], None]
) -> None:
    # A child of its own has its ends of the pipes, and outlives it.
    child = start("import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])")
    wait_for(lambda: psutil.Process(child.id).children(), "the child's child")
    [holder] = psutil.Process(child.id).children()

    def wait() -> None:
        with suppress(ProcessDiedError):
            waits(child)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert waiting.is_alive()
    child.kill()
    waiting.join(60)
    assert not waiting.is_alive() and holder.is_running()
    holder.kill()
    with pytest.raises(ProcessDiedError, match="ended"):
        child.tell({})
