"""A replicator's end: nothing that wakes it is lost, and a mirror that cannot be told costs the others nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from journals import new_run, start_run

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.replication import MirroredJournal, Replicator


class Noticing:
    """A mirror that takes no time, or hangs, and counts its ends."""

    stores_checkpoints = True

    def __init__(self, name: str, hangs: threading.Event | None = None) -> None:
        self.name = name
        self.closed = 0
        self._hangs = hangs

    def open(self, record: Mapping[str, Any]) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    def earlier(self) -> dict[str, Any]:
        return {}

    def replicate(self, journal: MirroredJournal) -> None:
        if self._hangs is not None:
            self._hangs.wait()

    def tell_end(self, record: Mapping[str, Any]) -> None:
        pass

    def cancel(self, status: str) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[RunJournal]:
    journal = start_run(tmp_path, "run")
    yield journal
    journal.close()


class Halt:
    """Halts a replicator's thread before one line of its loop, the n-th that it comes to, until its run closes."""

    def __init__(self, line: int) -> None:
        self.reached, self.closes = threading.Event(), threading.Event()
        self._lines_left = line

    def __call__(self, frame: FrameType, event: str, argument: object) -> Halt | None:
        if frame.f_code is not Replicator._run.__code__:
            return None
        if event == "line":
            if self._lines_left == 0:
                self.reached.set()
                self.closes.wait()
            self._lines_left -= 1
        return self


def test_a_run_that_closes_at_whatever_line_of_the_loop_wakes_it(journal: RunJournal) -> None:
    before = threading.gettrace()
    for line in range(100):
        replicator, halt = Replicator(Noticing("it"), journal), Halt(line)
        threading.settrace(halt)
        try:
            replicator.start()
        finally:
            threading.settrace(before)  # type: ignore[arg-type]
        if not halt.reached.wait(10.0):
            halt.closes.set()
            assert replicator.close(5.0)
            break
        # `close` wakes the thread first of all, and asks whether to hurry only then.
        assert replicator.close(5.0, lambda halt=halt: bool(halt.closes.set())), f"the wake-up before line {line}"  # type: ignore[misc]
    assert line > 5


def test_a_thread_that_cannot_be_started_at_the_end_leaves_no_other_mirror_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    hanging, other = Noticing("hanging", released), Noticing("other")
    # Its checkpoints make it the first that is closed.
    other.stores_checkpoints = False
    folder = RunFolder(tmp_path, "agent", "run")
    live = LiveRun(folder, new_run("run", "agent"), (hanging, other), RunOptions(sync_timeout_seconds=1.0))
    # More than there is: the system refuses a thread, as the interpreter does while it shuts down.
    before = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=time.sleep).start()
        assert live.finish("completed") == ["hanging"]
    finally:
        threading.stack_size(before)
        released.set()
    assert other.closed == 1
    assert "hanging misses a part of this run" in caplog.text
