"""Owns how a process learns that it must end: signals become a flag, an unhandled error reaches its listener."""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalGuard:
    """Turns the first SIGTERM or SIGINT into a flag; further ones change nothing.

    A handler must not save: it may run in the middle of an update. Whoever trains looks at `received` at a safe
    point. `mlflow run` can deliver SIGINT and then SIGTERM for one Ctrl-C, so a second signal is harmless.

    Args:
        enabled: Whether `install` does anything.

    Attributes:
        received: The signal's number, or None.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.received: int | None = None
        self._enabled = enabled
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over."""
        self.received = None
        if not self._enabled or self._before:
            return
        if threading.current_thread() is not threading.main_thread():
            logger.warning("Training outside the main thread: SIGTERM and SIGINT are not taken over")
            return
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, self._handle)

    def remove(self) -> None:
        """Give the signals back."""
        for signum, handler in self._before.items():
            # None is a handler that was not set from Python; it cannot be put back.
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
        before = self._before.get(signum)
        if callable(before) and isinstance(getattr(before, "__self__", None), SignalGuard):
            # Another training in this process, or a second callback of this one, must hear of it too.
            before(signum, frame)


class ExitGuard:
    """Calls a listener when the process ends while it is installed: an unhandled error, or a plain exit.

    SB3 tells a callback nothing when `learn` raises.

    Args:
        listener: Is given the error, or None.
    """

    def __init__(self, listener: Callable[[BaseException | None], None]) -> None:
        self._listener = listener
        self._before: Callable[[type[BaseException], BaseException, TracebackType | None], Any] | None = None

    def install(self) -> None:
        """Begin to listen."""
        self._before = sys.excepthook
        sys.excepthook = self._on_error
        atexit.register(self._on_exit)

    def remove(self) -> None:
        """Stop listening."""
        # Somebody may have set a hook after ours, which calls ours: then it must stay.
        if self._before is not None and sys.excepthook == self._on_error:
            sys.excepthook = self._before
        self._before = None
        atexit.unregister(self._on_exit)

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before = self._before or sys.__excepthook__
        try:
            self._listener(error)
        finally:
            before(kind, error, trace)

    def _on_exit(self) -> None:
        self._listener(RuntimeError("The process ended before the training did"))
