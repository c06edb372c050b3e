"""Runs functions in processes of their own, forked from this one so that what is imported is there at once."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from injector import Fault, arm, came

Report = Callable[..., None]
LONGEST = 120.0


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: Its exit code; minus the signal's number where one killed it.
        reports: What it told before, in order.
        seconds: How long it lived.
    """

    code: int
    reports: list[dict[str, Any]]
    seconds: float

    def told(self, key: str) -> list[Any]:
        return [report[key] for report in self.reports if key in report]


def run(
    function: Callable[[Report], None],
    cwd: Path,
    fault: Fault | None = None,
    *,
    kill_after: float | None = None,
    signum: int = signal.SIGKILL,
    **arming: Any,
) -> Ended:
    """Run a function in a fork of this process, in a folder.

    Args:
        function: Is given a function that reports `key=value`s; they reach the parent even if it is killed next.
        cwd: Its working folder; what it prints goes to `output` there.
        fault: Armed in it before.
        kill_after: Seconds after which it is sent a signal.
        signum: The signal.
        arming: Further arguments of `arm`.
    """
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(function, cwd, fault, writing, arming)
    os.close(writing)
    content, deadline, sent = b"", started + LONGEST, kill_after is None
    while True:
        due = deadline if sent else started + (kill_after or 0.0)
        ready, _, _ = select.select([reading], [], [], max(0.0, due - time.monotonic()))
        if ready:
            piece = os.read(reading, 1 << 16)
            content += piece
            if not piece:
                break
        elif sent:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"{function} did not end within {LONGEST:.0f} s; see {cwd / 'output'}")
        else:
            os.kill(pid, signum)
            sent = True
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    reports = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return Ended(os.waitstatus_to_exitcode(status), reports, time.monotonic() - started)


def _child(
    function: Callable[[Report], None], cwd: Path, fault: Fault | None, writing: int, arming: dict[str, Any]
) -> None:
    code = 1
    try:
        os.chdir(cwd)
        output = os.open(cwd.with_suffix(".output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)

        def report(**facts: Any) -> None:
            os.write(writing, json.dumps(facts).encode() + b"\n")

        try:
            if fault is not None:
                arm(cwd, fault, **arming)
            function(report)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:
            traceback.print_exc()
            report(error=[type(error).__name__, *(base.__name__ for base in type(error).__mro__[1:])], message=str(error))
    finally:
        if fault is not None and fault.action:
            os.write(writing, json.dumps({"came": came()}).encode() + b"\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
