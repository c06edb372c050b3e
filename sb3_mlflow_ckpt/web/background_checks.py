"""Owns the checking of checkpoints that are looked at on a page: one at a time, in a thread, so that no page waits."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.web.checkpoint_files import Checks

logger = logging.getLogger(__name__)

_MOST_WAITING = 1000


class BackgroundChecks:
    """Reads checkpoints whole, one after another, and lets `Checks` keep what was found.

    Args:
        checks: Where the findings go.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._waiting: queue.Queue[tuple[RunFolder, int]] = queue.Queue(_MOST_WAITING)
        self._wanted: set[tuple[RunFolder, int]] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def want(self, folder: RunFolder, episodes: Iterable[int]) -> None:
        """Have checkpoints checked of which nothing is known; more than can wait are left out."""
        for episode in episodes:
            wanted = (folder, episode)
            with self._lock:
                if wanted in self._wanted or self._waiting.full() or self._checks.known(folder, episode) is not None:
                    continue
                self._wanted.add(wanted)
                self._waiting.put_nowait(wanted)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="checks", daemon=True)
                    self._thread.start()

    def _work(self) -> None:
        while True:
            wanted = self._waiting.get()
            try:
                self._checks.check(*wanted)
            except Exception:
                logger.exception("A checkpoint could not be checked")
            finally:
                with self._lock:
                    self._wanted.discard(wanted)
