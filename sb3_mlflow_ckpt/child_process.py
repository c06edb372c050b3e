"""Owns a child process that is told things in lines of JSON and answers in such lines. Knows nothing of runs.

Nobody waits for it for ever, whatever it does: its pipes are polled for a moment at a time, and neither read nor
written where that would block. A thread that waits for it is out a moment after it was ended, even where no signal
ends it at once, or where another process holds its end of a pipe.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

_Done = TypeVar("_Done")

_MOMENT_SECONDS = 0.5
_END_SECONDS = 1.0
_MOST_BYTES = 1 << 16


class ProcessDiedError(Exception):
    """A child process ended, or said what makes no sense."""


class ChildProcess:
    """A child process, from this side. One thread talks with it; any thread ends it.

    Args:
        arguments: The program and its arguments.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        # No buffers: whoever waits would hold their locks. What a library prints on stderr is nobody's.
        self._child = subprocess.Popen(
            arguments, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._pipes = self._child.stdin, self._child.stdout
        self._input, self._output = (pipe.fileno() for pipe in self._pipes)
        os.set_blocking(self._input, False)
        # Held for a moment at a time: a descriptor that is closed under a poll may be another file's by then.
        self._in_use = threading.Lock()
        self._ended = False
        self._lines: deque[bytes] = deque()
        self._unfinished = b""

    @property
    def id(self) -> int:
        """The process's id."""
        return self._child.pid

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            ProcessDiedError: It takes no more, or the message is not JSON.
        """
        try:
            unsent = memoryview(json.dumps(message).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise ProcessDiedError(f"it cannot be told that: {error}") from error
        while unsent:
            write = partial(os.write, self._input, unsent[:_MOST_BYTES])
            unsent = unsent[self._once(self._input, select.POLLOUT, _MOMENT_SECONDS, write) or 0 :]

    def hear(self) -> dict[str, Any]:
        """Return the next thing that it says, however long that takes.

        Raises:
            ProcessDiedError: It died, was ended, or said what is not JSON.
        """
        while (said := self.heard(_MOMENT_SECONDS)) is None:
            pass
        return said

    def heard(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """Return the next thing that it says within a time; None where it says nothing.

        Raises:
            ProcessDiedError: It died, was ended, or said what is not JSON.
        """
        # What came with an earlier line is here already, and no poll tells of it.
        while not self._lines:
            content = self._once(self._output, select.POLLIN, seconds, partial(os.read, self._output, _MOST_BYTES))
            if content is None:
                return None
            if not content:
                raise ProcessDiedError(f"it ended with code {self._child.poll()}")
            *whole, self._unfinished = (self._unfinished + content).split(b"\n")
            self._lines.extend(whole)
        return _parsed(self._lines.popleft())

    def kill(self) -> None:
        """End it; the same again does nothing. Takes little more than a second, whatever it does."""
        self._ended = True
        self._child.kill()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(_END_SECONDS)
        with self._in_use:
            for pipe in self._pipes:
                pipe.close()

    def _once(self, descriptor: int, event: int, seconds: float, act: Callable[[], _Done]) -> _Done | None:
        """Do something with a pipe if it would not block within a time; None where it would."""
        try:
            with self._in_use:
                if self._ended:
                    raise ProcessDiedError("it was ended")
                # Not select(): that takes no descriptors from 1024 on, and a training with many environments has more.
                pipe = select.poll()
                pipe.register(descriptor, event)
                return act() if pipe.poll(1000 * seconds) else None
        except (OSError, ValueError) as error:
            raise ProcessDiedError(str(error)) from error


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise ProcessDiedError(f"it said {line[:80]!r}") from error
    if not isinstance(said, dict):
        raise ProcessDiedError(f"it said {line[:80]!r}")
    return said
