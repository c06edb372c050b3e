"""Owns how a process learns that it must end, and how long it may take: signals, and errors that nobody handles.

| of the grace period | what happens |
|---|---|
| first half | the training comes to a moment at which everything can be saved |
| then | it is saved from wherever the main thread stands |
| up to 0.8 | the mirrors catch up, for a third of the grace period at most |
| from 0.85 | the main thread does not come back: a thread records the end |
| 0.95 | the process is ended |
"""

from __future__ import annotations

import atexit
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from sb3_mlflow_ckpt.errors import TrainingInterrupted
from sb3_mlflow_ckpt.leaving import leave, wait_if_leaving
from sb3_mlflow_ckpt.signal_watch import SIGNALS, watch

logger = logging.getLogger(__name__)

DEFAULT_GRACE_SECONDS = 30.0
"""Kubernetes' own terminationGracePeriodSeconds, too."""
EXIT_CODES = {signum: 128 + signum for signum in SIGNALS}
_PATIENCE, _COPIED, _STUCK, _END = 0.5, 0.8, 0.85, 0.95
_NUDGE_SECONDS = 0.05
# Only a later signal is somebody's wish to hurry: `mlflow run` makes a SIGINT and, a little later, a SIGTERM of one
# Ctrl-C, and is not quick on a machine that is busy.
_SAME_SECONDS, _FOLLOWED_SECONDS = 1.0, 5.0
_TWO_OF_ONE = (signal.SIGINT, signal.SIGTERM)


class CommandGuard:
    """Ends the command line's process on a signal, at once, while no training is under way in it.

    It is first told of signals before anything slow is imported.
    """

    def __init__(self) -> None:
        self._trained_through = False

    def install(self) -> None:
        """Begin to listen."""
        watch.add(self)

    def heard(self, signum: int) -> None:
        """End the process, unless a training takes care of the signal."""
        line = f"Interrupted by {signal.Signals(signum).name}: no training was under way"
        leave(EXIT_CODES[signum], line, unless=self._trains)

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Go no further where the process is being ended: what it has lost by then would look like an error."""
        wait_if_leaving()

    def _trains(self) -> bool:
        # A training that was told has saved and is on its way out, within its own time.
        self._trained_through = self._trained_through or len(watch.listeners) > 1
        return self._trained_through


def _commanded() -> bool:
    """Return whether this process is the command line's."""
    return any(isinstance(listener, CommandGuard) for listener in watch.listeners)


class _Hold:
    """Counts the blocks that must not be interrupted: entered at every step, so it does nothing else."""

    __slots__ = ("depth",)

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


class SignalGuard:
    """Turns a signal into a flag while a training runs, and sees to it that the process ends within its grace period.

    Saving must not begin anywhere: whoever trains looks at `received` at a safe point. Where none comes within half
    of the grace period, `overdue` is called in the main thread, wherever that stands but within `hold`. Where that
    does not end the training either, `stuck` is called in another thread, and the process ends.

    Args:
        grace_seconds: The longest time from the first signal to the end of the process.
        overdue: Saves and raises, unless the frame that it is given is no place for that; then it is called again.
        stuck: Records the end, given the time that is left in seconds, and what prints a line about it.
        enabled: Whether `install` does anything.

    Attributes:
        received: The first signal's number, or None.
    """

    def __init__(
        self,
        grace_seconds: float,
        overdue: Callable[[FrameType | None], None],
        stuck: Callable[[float, Callable[[str], None]], None],
        *,
        enabled: bool = True,
    ) -> None:
        self.received: int | None = None
        self._grace = grace_seconds
        self._overdue = overdue
        self._stuck = stuck
        self._enabled = enabled
        self._since = 0.0
        self._hold = _Hold()
        self._hurried = self._nudged = False
        self._lock = threading.RLock()
        self._ended = threading.Event()

    @property
    def overdue(self) -> bool:
        """Whether the time to wait for a safe point is over."""
        return self.received is not None and (self._hurried or self._share() >= _PATIENCE)

    def stop(self, checkpoint: Path | None = None) -> None:
        """Raise `TrainingInterrupted` where a signal came."""
        if self.received is not None:
            raise TrainingInterrupted(self.received, checkpoint)

    @property
    def no_time_for_copies(self) -> bool:
        """Whether waiting for mirrors must end."""
        return self.received is not None and (self._hurried or self._share() >= _COPIED)

    def install(self) -> None:
        """Take the signals over."""
        self.received, self._hurried, self._nudged = None, False, False
        self._ended = threading.Event()
        if self._enabled and not watch.add(self):
            logger.warning("Training outside the main thread: signals are not taken over")
        wait_if_leaving()

    def remove(self) -> None:
        """Give the signals back: the run has ended."""
        self._ended.set()
        watch.discard(self)
        if self.received is not None and _commanded():
            # It is on its way out, with the exit code of the first signal.
            watch.ignore()

    def hold(self) -> _Hold:
        """Let nothing be interrupted within the block."""
        return self._hold

    def heard(self, signum: int) -> None:
        """Take note of a signal; the first one starts the clock."""
        with self._lock:
            if self.received is not None:
                return
            self.received, self._since = signum, time.monotonic()
            threading.Thread(target=self._count_down, args=(self._ended,), name="grace", daemon=True).start()

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Hurry on a second signal; save from where training stands when it is time."""
        nudged, self._nudged = self._nudged, False
        same = _FOLLOWED_SECONDS if (self.received, signum) == _TWO_OF_ONE else _SAME_SECONDS
        if not nudged and time.monotonic() - self._since > same:
            self._hurried = True
        if self.overdue and self._hold.depth == 0 and not self._ended.is_set():
            self._overdue(frame)

    def _share(self) -> float:
        return (time.monotonic() - self._since) / self._grace

    def _count_down(self, ended: threading.Event) -> None:
        assert self.received is not None
        while not ended.wait(_NUDGE_SECONDS) and self._share() < _STUCK:
            if self.overdue:
                self._nudged = True
                signal.pthread_kill(threading.main_thread().ident or 0, self.received)
        if ended.is_set():
            # A script goes on as it likes; the command line has nothing left to do but to end.
            if _commanded():
                time.sleep(max(0.0, self._left(_END)))
                leave(EXIT_CODES[self.received])
        elif not hasattr(sys, "ps1"):
            # A notebook is not ended: it holds more than this training.
            self._end_process(self.received)

    def _end_process(self, signum: int) -> None:
        said: list[str] = []

        def record() -> None:
            self._stuck(self._left(_END), said.append)

        # In a thread: a disk that hangs must not keep the process from ending.
        thread = threading.Thread(target=record, name="stuck", daemon=True)
        thread.start()
        thread.join(max(0.0, self._left(_END)))
        name = signal.Signals(signum).name
        leave(EXIT_CODES[signum], " ".join([f"Interrupted by {name}; training did not stop in time.", *said]))

    def _left(self, share: float) -> float:
        return (share - self._share()) * self._grace


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
