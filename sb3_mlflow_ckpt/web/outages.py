"""Owns patience with a store that is down: one request finds out, the others are answered at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.runs.reader import Document, Documents, Glance, RunReader

PAUSE_SECONDS = 2.0


class PatientRuns:
    """A store of runs; see `RunReader`. While it is down, what it said last is said again without asking it.

    A database that does not answer is waited for, and every open page asks again and again: without this, they would
    soon hold every thread of the server. Safe to use from any thread.

    Args:
        store: The store.
        pause_seconds: How long after an outage the store is left alone.
        clock: The present in seconds.
    """

    def __init__(
        self, store: RunReader, pause_seconds: float = PAUSE_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._pause = pause_seconds
        self._clock = clock
        self._outage: MirrorUnavailableError | None = None
        self._ask_again_at = 0.0
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self._store)

    def get(self, run_id: str) -> Document:
        with self._watched():
            return self._store.get(run_id)

    def record(self, run_id: str) -> Document:
        with self._watched():
            return self._store.record(run_id)

    def checkpoints(self, run_id: str, *, before: int | None = None, limit: int | None = None) -> Documents:
        with self._watched():
            return self._store.checkpoints(run_id, before=before, limit=limit)

    def curve(self, run_id: str, points: int | None = None) -> Documents:
        with self._watched():
            return self._store.curve(run_id, points)

    def version(self, run_id: str) -> str:
        with self._watched():
            return self._store.version(run_id)

    def summaries(self) -> Documents:
        with self._watched():
            return self._store.summaries()

    def glances(self, run_ids: Sequence[str]) -> dict[str, Glance]:
        with self._watched():
            return self._store.glances(run_ids)

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        with self._watched():
            return self._store.list(agent_id=agent_id, status=status, limit=limit)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with self._lock:
            outage = self._outage
            if outage is not None:
                if self._clock() < self._ask_again_at:
                    raise outage.again()
                # This request finds out; whoever comes meanwhile is told what was known.
                self._ask_again_at = float("inf")
        try:
            yield
        except MirrorUnavailableError as error:
            with self._lock:
                # What was refused answers: waiting does not hold it up.
                self._outage = None if error.refused else error
                self._ask_again_at = self._clock() + self._pause
            raise
        except BaseException:
            self._over()
            raise
        self._over()

    def _over(self) -> None:
        if self._outage is not None:
            with self._lock:
                self._outage = None
