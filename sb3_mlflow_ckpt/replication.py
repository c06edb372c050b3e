"""Owns the `Mirror` protocol and the threads that bring mirrors up to date with a run's journal.

A mirror that is down or slow costs training nothing: each has a thread of its own, which tries again until the
run ends, and what is missing then is sent by `sb3-mlflow-ckpt checkpoints sync`. Whether the thread does the work
itself or has a process do it is its `Place`'s business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import CheckpointLedger
from sb3_mlflow_ckpt.runs.document import redact

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 15.0
_POLL_SECONDS = 0.2
_SILENT_SECONDS = 2.0
_TELL_SECONDS, _HURRIED_SECONDS = 3.0, 2.0


class MirroredJournal(Protocol):
    """What mirrors know of a run: `journal.RunJournal`, or what another process was told of it."""

    @property
    def folder(self) -> RunFolder:
        """Where the run is kept."""
        ...

    @property
    def ledger(self) -> CheckpointLedger:
        """What became of its checkpoints; it goes on changing."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """A copy of its record."""
        ...

    def update(self, **fields: Any) -> None:
        """Change fields of the record."""
        ...

    def add_mirrored(self, episode: int, uri: str, sha256: str | None) -> None:
        """Note that a checkpoint lies whole in the mirror."""
        ...

    def add_unmirrored(self, episode: int, sha256: str | None) -> None:
        """Note that the mirror's retention removed its copy."""
        ...

    def waiting_for_mirror(self) -> set[int]:
        """Return the episodes that are on disk and were never mirrored."""
        ...

    def newest_mirrored(self, *further: int) -> int | None:
        """Return the episode in the mirror, or of some further ones, that was saved last."""
        ...

    def in_mirror(self) -> CheckpointLedger:
        """Return a copy of the ledger as far as it tells of checkpoints that lie in the mirror or wait for it."""
        ...

    def changed_since(self, line: int, *further: int) -> tuple[CheckpointLedger, int]:
        """Return a copy of the ledger as far as lines behind a number told of it, and the number of the last line."""
        ...


class Mirror(Protocol):
    """A copy of runs somewhere else.

    Attributes:
        name: What messages call it.
        stores_checkpoints: Whether it holds checkpoints' files, so that retention waits for it.
    """

    name: str
    stores_checkpoints: bool

    def open(self, record: Mapping[str, Any]) -> str | None:
        """Contact the service before training starts.

        Returns:
            The id that the service gave the run, where it names runs; None otherwise.

        Raises:
            MirrorUnavailableError: It does not answer.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the record says of the mirror after `open`, so that a later `sync` finds it again."""
        ...

    def earlier(self) -> dict[str, Any]:
        """Return what the service knows of an earlier attempt of the run after `open`: `attempt`, `started_at`.

        A run whose machine was lost goes on at another one, which has no folder that would tell.

        Returns:
            The least number of this attempt, and when the run began; empty where there was no earlier one.
        """
        ...

    def replicate(self, journal: MirroredJournal) -> None:
        """Send everything that the journal has and the mirror has not. Idempotent; raises on an outage."""
        ...

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """Tell how a run ended while an earlier request still hangs; what else is missing is sent by a sync."""
        ...

    def cancel(self, status: str) -> None:
        """Take back what `open` made: the training does not start. Must not raise.

        Args:
            status: Why: `failed` or `interrupted`.
        """
        ...

    def close(self) -> None:
        """Release connections; a later use opens others."""
        ...


class Place(Protocol):
    """Where a mirror does its work.

    Attributes:
        process_id: The id of the process that does it; None where that is this one.
    """

    @property
    def process_id(self) -> int | None: ...

    def replicate(self) -> None:
        """Do what the mirror's `replicate` does."""
        ...

    def close(self) -> None:
        """End what is under way, wherever that is more than a thread."""
        ...


class _InThread:
    process_id = None

    def __init__(self, mirror: Mirror, journal: RunJournal) -> None:
        self.replicate = lambda: mirror.replicate(journal)

    def close(self) -> None:
        pass


class Replicator:
    """Runs one mirror in a daemon thread: wakes on every change of the journal, retries with a growing pause.

    Args:
        mirror: What to bring up to date.
        journal: The run.
        place: Where the mirror does its work; in the thread itself where it is None.
    """

    def __init__(self, mirror: Mirror, journal: RunJournal, place: Place | None = None) -> None:
        self.mirror = mirror
        self._journal = journal
        self._place = place or _InThread(mirror, journal)
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._done = threading.Event()
        self._abandoned = threading.Event()
        self._failure: BaseException | None = None
        journal.on_change(self._changed.set)
        # A daemon: a request that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"mirror-{mirror.name}", daemon=True)

    def start(self) -> None:
        """Begin; everything that is in the journal already is sent first."""
        self._changed.set()
        self._thread.start()

    @property
    def process_id(self) -> int | None:
        """The id of the process in which the mirror works; None where that is this one."""
        return self._place.process_id

    @property
    def failure(self) -> BaseException | None:
        """Why the last attempt failed, or None where it succeeded."""
        return self._failure

    def abandon(self) -> None:
        """Send nothing more; what is under way is not waited for."""
        self._abandoned.set()
        self._changed.set()
        self._place.close()

    def close(self, timeout: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Send what is left; return whether the mirror has everything.

        Args:
            timeout: The longest time to wait, in seconds.
            hurry: Asked several times a second: whether to stop waiting.
        """
        self._closing.set()
        self._changed.set()
        deadline, told = time.monotonic() + timeout, False
        while self._thread.is_alive() and time.monotonic() < deadline and not hurry():
            self._thread.join(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            if not told and self._thread.is_alive() and time.monotonic() > deadline - timeout + _SILENT_SECONDS:
                logger.warning("Sending the rest to %s, for at most %.0f s", self.mirror.name, timeout)
                told = True
        if self._done.is_set():
            self.mirror.close()
        else:
            self._tell_end(hurry)
        # A request may hang beyond this; when it returns, the thread must not write to a journal that is closed.
        self._abandoned.set()
        self._place.close()
        return self._done.is_set()

    def _tell_end(self, hurry: Callable[[], bool]) -> None:
        """Have the mirror told how the run ended: an upload that hangs must not leave it running there for ever."""

        def tell() -> None:
            try:
                self.mirror.tell_end(self._journal.record)
            except Exception as error:
                logger.debug("%s was not told of the end", self.mirror.name, exc_info=error)

        thread = threading.Thread(target=tell, name=f"end-{self.mirror.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The interpreter shuts down, or there are too many: no reason to leave the other mirrors open.
            logger.debug("%s was not told of the end", self.mirror.name, exc_info=error)
        else:
            began = time.monotonic()
            while thread.is_alive() and time.monotonic() - began < (_HURRIED_SECONDS if hurry() else _TELL_SECONDS):
                thread.join(_POLL_SECONDS)

    def _run(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._changed.wait()
            if self._abandoned.is_set():
                return
            # Cleared before the work: a change that comes during it wakes the next round. And before it is looked
            # whether the run closes: `close` says so first and wakes then, which must not be cleared unseen.
            self._changed.clear()
            closing = self._closing.is_set()
            try:
                self._place.replicate()
            except Exception as error:
                if self._abandoned.is_set():
                    return
                self._note(error)
                self._changed.set()
                # Closing cuts the pause short, so that the last round is not spent waiting.
                if self._closing.wait(pause):
                    self._abandoned.wait(min(pause, 1.0))
                pause = min(2 * pause, _LONGEST_RETRY_SECONDS)
                continue
            if self._abandoned.is_set():
                return
            if self._failure is not None:
                logger.warning("%s answers again; what was missing has been sent", self.mirror.name)
            self._failure, pause = None, _FIRST_RETRY_SECONDS
            if closing:
                self._done.set()
                return

    def _note(self, error: Exception) -> None:
        if self._failure is None:
            reason = redact(str(error)).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "%s is behind; training goes on, and what it misses is sent later (%s)",
                self.mirror.name,
                reason[0][:300],
            )
            logger.debug("%s", self.mirror.name, exc_info=error)
        self._failure = error


def close_all(
    replicators: Sequence[Replicator], timeout: float, hurry: Callable[[], bool] = lambda: False
) -> list[str]:
    """Close replicators within one common deadline; return the names of the mirrors that miss something."""
    deadline = time.monotonic() + timeout
    return [r.mirror.name for r in replicators if not r.close(max(0.0, deadline - time.monotonic()), hurry)]
