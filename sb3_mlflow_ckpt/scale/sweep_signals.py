"""Owns how the driver of a sweep is stopped: a signal has its trials save, and Ray Tune end them and keep its state.

A second one, a second or more after it, ends the driver at once, and Ray and the trials with it: a resume goes on from
what they have saved, as after a kill.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.leaving import leave
from sb3_mlflow_ckpt.scale.sweep_stop import have_saved
from sb3_mlflow_ckpt.signal_watch import watch

if TYPE_CHECKING:
    from ray.tune import Callback

# One Ctrl-C may come twice: from the terminal, and from the program that started this one.
_SAME_SECONDS = 1.0


class SweepSignals:
    """Passes what the driver hears to Ray Tune, while it runs: enter it when Ray is there.

    Args:
        tell: Is given a line at the first signal.
        grace_seconds: How long trials may take to save.

    Attributes:
        received: The first signal's number, or None.
        flag: Tells the trials, once it is there.
    """

    def __init__(self, tell: Callable[[str], None], grace_seconds: float) -> None:
        self.received: int | None = None
        self.flag: Any = None
        self._tell = tell
        self._grace_seconds = grace_seconds
        self._deadline: float | None = None
        self._stop_tune: Any = None
        self._since = 0.0
        self._told = self._passed_on = False
        self._lock = threading.Lock()
        self._before: Any = None

    def __enter__(self) -> SweepSignals:
        global _signals
        _signals = self
        if watch.add(self):
            # Ray has set one that ends the process at once.
            self._before = signal.signal(signal.SIGTERM, self._as_interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        watch.discard(self)

    def heard(self, signum: int) -> None:
        """Take note of a signal; a second one ends the process."""
        with self._lock:
            if self.received is None:
                self.received, self._since = signum, time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # It may come here late, of a signal that the other thread has heard long ago.
            return
        if not self._told:
            self._told = True
            self._tell("Interrupted: the trials save, and end. Once more ends at once; --resume goes on after either")
        elif time.monotonic() - self._since > _SAME_SECONDS and not hasattr(sys, "ps1"):
            # A notebook is not ended: it holds more than this sweep.
            leave(128 + self.received, "Interrupted again, and ended at once; go on with the same command and --resume")

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: Tune is told once the trials have saved."""

    def pass_on(self, trials: Sequence[Any]) -> None:
        """Tell the trials of a signal, and Tune when they have saved; Tune calls it again and again."""
        if self._stop_tune is None and threading.current_thread() is threading.main_thread():
            # What Tune would do at this signal, without asking anybody.
            self._stop_tune = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, self._as_interrupt)
        if self.received is None or self._passed_on:
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_seconds
            if self.flag is not None:
                self.flag.hoist.remote()
        if self.flag is not None and time.monotonic() < self._deadline and not have_saved(self.flag, trials):
            return
        self._passed_on = True
        if callable(self._stop_tune):
            # Called, not raised: that would be heard as a second signal.
            self._stop_tune(signal.SIGUSR1, None)

    def _as_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.heard(signum)


_signals: SweepSignals | None = None


def passing_on() -> Callback:
    """Return the callback by which Tune hears of the signals of this process.

    It holds nothing: Tune writes it down with its snapshot, and a restored sweep has signals of its own.
    """
    from ray.tune import Callback

    class _PassingOn(Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if _signals is not None:
                _signals.pass_on(trials)

        def __reduce__(self) -> Any:
            return passing_on, ()

    return _PassingOn()
