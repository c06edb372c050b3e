"""Owns how the driver of a sweep is stopped: a signal has Ray Tune end its trials and keep its state for a resume."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from sb3_mlflow_ckpt.signal_watch import watch


class SweepSignals:
    """Passes what the driver hears to Ray Tune, while it runs: enter it when Ray is there.

    Attributes:
        received: The first signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: Any = None

    def __enter__(self) -> SweepSignals:
        if watch.add(self):
            # Ray has set one that ends the process at once; Tune listens to SIGINT alone.
            self._before = signal.signal(signal.SIGTERM, self._as_interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        watch.discard(self)

    def heard(self, signum: int) -> None:
        """Take note of a signal; the command must not end at once, as it does where nothing is under way."""
        if self.received is None:
            self.received = signum

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: Tune listens itself."""

    def _as_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.heard(signum)
        signal.raise_signal(signal.SIGINT)
