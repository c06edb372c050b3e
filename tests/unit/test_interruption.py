"""What a signal's handlers do in the moments that no process of a test comes to for certain."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from processes import script

from sb3_mlflow_ckpt import interruption
from sb3_mlflow_ckpt.interruption import SignalGuard

_ENDED_BY_ANOTHER_THREAD = """
import signal, threading, time
from sb3_mlflow_ckpt import leaving
from sb3_mlflow_ckpt.interruption import CommandGuard
leaving._last_things = lambda line: time.sleep(1)
threading.Thread(target=leaving.leave, args=(3,)).start()
while not leaving._leaving.locked():
    time.sleep(0.01)
guard = CommandGuard()
guard.heard(signal.SIGTERM)
guard.interrupt(signal.SIGTERM, None)
print("went on")
"""
_SIGNALLED_WHILE_IT_LEAVES = """
import os, signal, threading, time
from sb3_mlflow_ckpt import leaving
from sb3_mlflow_ckpt.interruption import CommandGuard
guard = CommandGuard()
guard.install()
def last_things(line):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
leaving._last_things = last_things
leaving.leave(3)
"""


@pytest.mark.parametrize("source", [_ENDED_BY_ANOTHER_THREAD, _SIGNALLED_WHILE_IT_LEAVES], ids=["beside", "within"])
def test_a_process_that_is_being_ended_is_ended_whatever_comes(tmp_path: Path, source: str) -> None:
    done = script(source, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize(
    ("first", "second", "seconds", "hurried"),
    [
        (signal.SIGINT, signal.SIGINT, 0.5, False),
        (signal.SIGINT, signal.SIGINT, 1.5, True),
        # One Ctrl-C, of which `mlflow run` makes two signals.
        (signal.SIGINT, signal.SIGTERM, 1.5, False),
        (signal.SIGINT, signal.SIGTERM, 5.5, True),
        (signal.SIGTERM, signal.SIGINT, 1.5, True),
    ],
)
def test_only_a_later_signal_hurries(
    monkeypatch: pytest.MonkeyPatch, first: signal.Signals, second: signal.Signals, seconds: float, hurried: bool
) -> None:
    guard = SignalGuard(3600.0, lambda frame: None, lambda seconds, say: None)
    guard.heard(first)
    now = time.monotonic()
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now + seconds)
    guard.interrupt(second, None)
    assert guard.no_time_for_copies is hurried
    guard.remove()
