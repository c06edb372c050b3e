"""Owns the files of a run folder that mirrors replay: `run.json`, `metrics.jsonl`, `checkpoints.jsonl`.

`run.json` holds what changes in place and is rewritten atomically; the other two only grow, a line a fact:

- `metrics.jsonl`: a point of the learning curve;
- `checkpoints.jsonl`: `saved`, `mirrored`, `unmirrored`, `missing`, `pruned`, in the order in which they happened.

The presence of a checkpoint's metadata is its commit; the line `saved` follows it, and is made good at the next
start where a crash came between (`corrections`), or with the next line where the disk refused it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt import atomic, json_lines, strict_json
from sb3_mlflow_ckpt.dead_writers import sweep
from sb3_mlflow_ckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    RunFolderBusyError,
    RunTakenOverError,
)
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import CheckpointLedger, corrections, saved_facts
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, timestamp_now
from sb3_mlflow_ckpt.ownership import TIDYING_SECONDS, FolderClaim
from sb3_mlflow_ckpt.runs.document import wrong_field
from sb3_mlflow_ckpt.timeline import Timeline

logger = logging.getLogger(__name__)

# More than a point is long.
_TAIL_BYTES = 1 << 16


def read_record(folder: RunFolder) -> dict[str, Any]:
    """Return what `run.json` holds.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointCorruptError: It cannot be read, or is not a JSON object.
    """
    try:
        record = strict_json.loads(atomic.read_bytes(folder.record))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(folder.record, "The folder holds no run record") from error
    except OSError as error:
        raise CheckpointCorruptError(
            folder.record, f"the run record cannot be read ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise CheckpointCorruptError(folder.record, f"the run record is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointCorruptError(folder.record, "the run record is not a JSON object")
    wrong = wrong_field(record)
    if wrong is not None:
        raise CheckpointCorruptError(folder.record, f"the run record is not valid at {wrong!r}")
    return record


class EventFeed:
    """The lines of a run's checkpoints as they come, for somebody who keeps a ledger of their own.

    Args:
        events: Those that came before.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        self._events = deque(events)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take a line in."""
        self._events.append(event)

    def take(self) -> list[Mapping[str, Any]]:
        """Return those that were not taken yet."""
        taken = []
        with suppress(IndexError):
            while True:
                taken.append(self._events.popleft())
        return taken


class RunJournal:
    """The one writer of a run folder's record, curve and checkpoint ledger. Safe to call from any thread.

    Opening takes the folder's lock. Before every write it is made sure that the folder is still this journal's: one
    that was removed or renamed meanwhile is made again; one that another process has taken over is left to it.

    Args:
        folder: The run folder; made if it is missing.
        patience: How long to wait for somebody who holds it, in seconds.

    Raises:
        RunFolderBusyError: A live process holds the folder.
    """

    def __init__(self, folder: RunFolder, patience: float = 0.0) -> None:
        self.folder = folder
        self._claim = FolderClaim(folder, patience)
        try:
            self._read()
        except BaseException:
            self._claim.release()
            raise

    def _read(self) -> None:
        folder = self.folder
        # Nobody else writes here now: what lies about half-written is a dead writer's.
        sweep(folder)
        self._timeline = Timeline()
        self._lock = threading.RLock()
        self._closed = False
        self._listeners: list[Callable[[], None]] = []
        self._feeds: list[EventFeed] = []
        self.ledger = CheckpointLedger()
        events, _ = json_lines.read_lines(folder.events)
        for event in events:
            self.ledger.apply(event)
        # Lines that the disk refused; they go before the next one.
        self._refused: list[dict[str, Any]] = []
        # The file that was read last and found to be of this attempt.
        self._own_record: tuple[int, ...] | None = None
        self._record: dict[str, Any] = read_record(folder) if folder.record.exists() else {}
        last_points = _last_points(folder.metrics)
        self._curve_end = max((steps for steps, _ in last_points), default=-1)
        for stamp in [
            *(time for _, time in last_points),
            *(saved.get("timestamp") for saved in self.ledger.saved.values()),
        ]:
            self._timeline.note(stamp)
        self.reconcile()

    @property
    def record(self) -> dict[str, Any]:
        """A copy of the record as it stands."""
        with self._lock:
            return dict(self._record)

    def start(self, record: Mapping[str, Any]) -> None:
        """Write the record of a run that starts, or starts again in its own folder (its attempt counts up)."""
        with self._lock:
            # An attempt at another machine has left nothing here: its mirrors tell.
            attempt = max(int(self._record.get("attempt", 0)) + 1, int(record.get("attempt", 1)))
            elsewhere = attempt > int(self._record.get("attempt", 0)) + 1 or self._record.get("elsewhere", False)
            kept = {key: self._record[key] for key in ("started_at", "parent") if self._record.get(key)}
            self._timeline.note((record.get("parent") or {}).get("timestamp"))
            self._record = {**record, **kept, "attempt": attempt, **({"elsewhere": True} if elsewhere else {})}
            atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))
        self._notify()

    def stamp(self, timestamp: str) -> str:
        """Return a time that lies after all that this run, and the one that it came from, gave out before."""
        with self._lock:
            return self._timeline.after(timestamp)

    def make_sure(self) -> None:
        """Make sure that the folder is still this journal's, as before every write.

        Raises:
            RunTakenOverError: Another process writes to it now.
            OSError: It is gone and cannot be made again.
            ValueError: The journal is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"The journal of {self.folder.path} is closed")
            if not self._claim.holds():
                self._claim_again()
            elif self._superseded():
                raise RunTakenOverError(self.folder.path)

    def update(self, **fields: Any) -> None:
        """Change fields of the record and rewrite it; a nested mapping replaces the one before."""
        with self._lock:
            self._record.update(fields)
            self._write_record()
        self._notify()

    def add_metrics(self, point: Mapping[str, Any]) -> None:
        """Append a point of the learning curve.

        An attempt that goes on in its own folder passes again through what the one before it lived to see after
        its last checkpoint. The curve does not double back: those points are there already.
        """
        if point.get("num_timesteps", 0) <= self._curve_end:
            return
        with self._lock:
            self.make_sure()
            stamp = {"time": self.stamp(point["time"])} if "time" in point else {}
            json_lines.append_line(self.folder.metrics, {**point, **stamp}, durable=False)
        self._notify()

    def add_saved(self, metadata: CheckpointMetadata) -> None:
        """Note that a checkpoint was committed."""
        self._add_event({"event": "saved", **saved_facts(metadata)})

    def add_mirrored(self, episode: int, uri: str, sha256: str | None) -> None:
        """Note that a checkpoint lies whole in the mirror at `uri`.

        Args:
            episode: Its episode.
            uri: Its address.
            sha256: What was sent; if the episode was saved again meanwhile it still waits for its mirror.
        """
        event = {"event": "mirrored", "episode": episode, "uri": uri, "sha256": sha256}
        self._add_event({**event, "time": timestamp_now()})

    def add_unmirrored(self, episode: int, sha256: str | None) -> None:
        """Note that the mirror's retention removed its copy of a checkpoint.

        Args:
            episode: Its episode.
            sha256: What was removed; if the episode was saved again meanwhile, the new content waits all the same.
        """
        self._add_event({"event": "unmirrored", "episode": episode, "sha256": sha256, "time": timestamp_now()})

    def add_missing(self, episode: int) -> None:
        """Note that the mirror lacks a checkpoint that it had: it waits again, if it is still on disk."""
        self._add_event({"event": "missing", "episode": episode, "time": timestamp_now()})

    def add_pruned(self, episode: int) -> None:
        """Note that a checkpoint's files were removed from the folder."""
        self._add_event({"event": "pruned", "episode": episode, "time": timestamp_now()})

    def waiting_for_mirror(self) -> set[int]:
        """Return the episodes that are on disk and were never mirrored."""
        with self._lock:
            return set(self.ledger.waiting)

    def newest_mirrored(self, *further: int) -> int | None:
        """Return the episode in the mirror, or of some further ones, that was saved last."""
        with self._lock:
            return self.ledger.newest_mirrored(*further)

    def on_disk(self) -> CheckpointLedger:
        """Return a copy of the ledger as far as it tells of checkpoints that are on disk."""
        with self._lock:
            return self.ledger.copy_of(self.ledger.on_disk)

    def in_mirror(self) -> CheckpointLedger:
        """Return a copy of the ledger as far as it tells of checkpoints that lie in the mirror or wait for it."""
        with self._lock:
            return self.ledger.copy_of({*self.ledger.uris, *self.ledger.waiting})

    def changed_since(self, line: int, *further: int) -> tuple[CheckpointLedger, int]:
        """Return a copy of the ledger as far as lines behind a number told of it, and the number of the last line.

        Args:
            line: The number that the last call returned; 0 for all.
            further: Episodes that the copy holds in any case.
        """
        with self._lock:
            changed, last = self.ledger.changed_since(line)
            return self.ledger.copy_of({*changed, *further}), last

    def snapshot(self) -> CheckpointLedger:
        """Return a copy of the ledger as it stands; `ledger` itself goes on changing under other threads."""
        with self._lock:
            return self.ledger.copy()

    def feed(self) -> EventFeed:
        """Return a feed of all lines: those that tell what the ledger holds, and from here on each that is added."""
        with self._lock:
            feed = EventFeed(self.ledger.events())
            self._feeds.append(feed)
            return feed

    def unfeed(self, feed: EventFeed) -> None:
        """Add no more lines to a feed."""
        with self._lock, suppress(ValueError):
            self._feeds.remove(feed)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` (quick, from any thread) after every change."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Release the folder; nothing is written to it from now on, by whatever thread comes late."""
        with self._lock:
            try:
                if self._refused:
                    self._write_events()
            except RunTakenOverError as error:
                logger.debug("%s", error)
            finally:
                self._closed = True
                self._claim.release()

    def _add_event(self, event: dict[str, Any]) -> None:
        """Take a fact in, and write it down; a disk that refuses the line does not undo the fact."""
        with self._lock:
            self.ledger.apply(event)
            for feed in self._feeds:
                feed.add(event)
            self._refused.append(event)
            self._write_events()
        self._notify()

    def _write_events(self) -> None:
        try:
            self.make_sure()
            while self._refused:
                # A removal whose line a power cut takes is found out at the next start (`corrections`).
                durable = self._refused[0]["event"] != "pruned"
                json_lines.append_line(self.folder.events, self._refused[0], durable=durable)
                del self._refused[0]
        except RunTakenOverError:
            raise
        except OSError as error:
            logger.warning("A line on the run's checkpoints was not written and follows later: %s", error)

    def _write_record(self) -> None:
        self.make_sure()
        atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))

    def _record_identity(self) -> tuple[int, ...] | None:
        try:
            found = self.folder.record.lstat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _superseded(self) -> bool:
        """Return whether a later attempt has written the record: a lock is no fence where a file system has none."""
        # Asked at every line that is written: a file that was read already says what it said. Looked at before it is
        # read, so that one which is exchanged in between is read again.
        identity = self._record_identity()
        if identity is not None and identity == self._own_record:
            return False
        superseded = self._is_of_later_attempt()
        self._own_record = None if superseded else identity
        return superseded

    def _is_of_later_attempt(self) -> bool:
        try:
            found = read_record(self.folder)
        except (CheckpointError, OSError):
            return False  # Whatever became of it, the next update writes it anew.
        attempt = found.get("attempt")
        return isinstance(attempt, int) and attempt > int(self._record.get("attempt", 0))

    def _claim_again(self) -> None:
        """Take the folder anew after it, or its lock, was removed or renamed in mid-run."""
        held = self._claim
        try:
            self._claim = FolderClaim(self.folder, TIDYING_SECONDS)
        except RunFolderBusyError as error:
            raise RunTakenOverError(self.folder.path) from error
        held.release()
        if self._superseded():
            raise RunTakenOverError(self.folder.path)
        if self._record and not self.folder.record.exists():
            logger.error(
                "%s was removed or renamed while its run trains. It is made again: "
                "the checkpoints that lay in it are not there any more, the next ones will be",
                self.folder.path,
            )
            atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))
        if not self.folder.events.exists():
            lines = [atomic.dump_json(event, indent=None) for event in self.ledger.events()]
            atomic.write_bytes(self.folder.events, b"".join(lines))
            self._refused.clear()
            self.reconcile()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def reconcile(self) -> None:
        """Make the ledger agree with the folder."""
        with self._lock:
            for event in corrections(self.folder, self.ledger):
                self._add_event(event)


def _last_points(path: Path) -> list[tuple[int, Any]]:
    """Return timesteps and time of the last points that earlier attempts left."""
    start = max(0, path.stat().st_size - _TAIL_BYTES) if path.exists() else 0
    points, _ = json_lines.read_lines(path, start)
    return [
        (point["num_timesteps"], point.get("time")) for point in points if isinstance(point.get("num_timesteps"), int)
    ]
