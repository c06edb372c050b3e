"""Owns the background writer: one thread, a bounded queue, jobs in order, failures that reach the training thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs jobs one after the other in a thread.

    A full queue makes `submit` wait: training must not run away from a disk that is too slow for it, and each
    waiting job holds a copy of the model.

    Args:
        max_pending: Jobs that may wait.
    """

    def __init__(self, max_pending: int = 2) -> None:
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=max_pending)
        self._failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        # A daemon: an exception on the training thread must end the process; `close` is what waits for the disk.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> float:
        """Queue a job; return the seconds that the caller waited for room."""
        started = time.perf_counter()
        self._jobs.put(job)
        return time.perf_counter() - started

    @property
    def has_failed(self) -> bool:
        """Whether there is a failure that was not returned yet: asked at every step."""
        return not self._failures.empty()

    def failure(self) -> BaseException | None:
        """Return the oldest failure that was not returned yet, or None."""
        try:
            return self._failures.get_nowait()
        except queue.Empty:
            return None

    def report(self, failure: BaseException) -> None:
        """Have `failure` return what another thread of the run met."""
        self._failures.put(failure)

    def drain(self) -> None:
        """Wait until every job that was submitted has ended."""
        self._jobs.join()

    def close(self) -> None:
        """Drain and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                logger.debug("A job of the checkpoint writer failed", exc_info=error)
                self._failures.put(error)
            finally:
                self._jobs.task_done()
        self._jobs.task_done()
