"""Owns the copy of runs in MongoDB: records, checkpoints' entries and learning curves, never checkpoints' files.

Never imports stable-baselines3.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.mirrors.stored_run import BATCH, StoredRun, SupersededError
from sb3_mlflow_ckpt.pins import pinned_episodes
from sb3_mlflow_ckpt.replication import MirroredJournal
from sb3_mlflow_ckpt.runs.curve import PlacedPoint, read_points
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, redact
from sb3_mlflow_ckpt.runs.folder import entry
from sb3_mlflow_ckpt.runs.mongo_database import (
    CHECKPOINTS,
    DEFAULT_DATABASE,
    END,
    LEVEL,
    METRICS,
    LazyDatabase,
    answering,
    encode,
    open_database,
)

logger = logging.getLogger(__name__)

_BYTES_PER_SLICE = 1 << 18
# Times that a look at the folder takes, until the next.
_PINS_PAUSE = 100


@dataclass
class _Sent:
    """What the database is known to have of one run; a fresh one means: send everything.

    Attributes:
        record: The record as it was sent last.
        line: The ledger's line up to which checkpoints were taken up.
        unsent: Those that were taken up and not yet sent.
        pinned: Those that were pinned when that was last looked for.
        next_look_for_pins: When it is looked for again.
        offset: How far `metrics.jsonl` was read, in bytes.
        waiting: Points that were read and not yet sent.
        settled: Whether what earlier attempts left and this one does not know was removed.
        warned: Whether it was said that a later attempt owns the run.
    """

    record: dict[str, Any] | None = None
    line: int = 0
    unsent: dict[int, None] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    next_look_for_pins: float = 0.0
    offset: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)
    settled: bool = False
    warned: bool = False


class MongoMirror:
    """Copies runs to a MongoDB database, where `MongoRuns` reads them.

    The first call for a journal sends everything, so that whatever is missing is made good; later ones send what
    changed. What was not acknowledged is sent again.

    Args:
        uri: MongoDB's address.
        database: The database's name.
    """

    name = "MongoDB"
    stores_checkpoints = False

    def __init__(self, uri: str, database: str = DEFAULT_DATABASE) -> None:
        self._lazy = LazyDatabase(uri, database, open_database)
        self._sent: WeakKeyDictionary[MirroredJournal, _Sent] = WeakKeyDictionary()
        self._trains = False

    def blueprint(self) -> dict[str, Any] | None:
        """Return what makes this mirror in another process (`mirror_process`)."""
        if type(self) is not MongoMirror:
            return None
        return {"kind": "mongo", "uri": self._lazy.uri, "database": self._lazy.name}

    @classmethod
    def from_blueprint(cls, blueprint: Mapping[str, Any]) -> MongoMirror:
        """Return the mirror that another process has opened."""
        mirror = cls(blueprint["uri"], blueprint["database"])
        mirror._trains = True
        return mirror

    def take_back(self) -> None:
        """Forget what was sent from here: another process has sent since."""
        self._sent.clear()

    @property
    def address(self) -> str:
        """Where MongoDB is, without credentials."""
        return redact(self._lazy.uri)

    def open(self, record: Mapping[str, Any]) -> str | None:
        """Contact the database and make its indexes.

        Returns:
            None: MongoDB does not name runs.

        Raises:
            MirrorUnavailableError: It does not answer within 5 s.
        """
        with answering(self._lazy.uri):
            self._lazy.get().command("ping")
        self._trains = True
        return None

    def describe(self) -> dict[str, Any]:
        """Return which database it is, without credentials."""
        return {"mongo": {"uri": redact(self._lazy.uri), "database": self._lazy.name}}

    def earlier(self) -> dict[str, Any]:
        """Return nothing: a run goes on elsewhere only with a checkpoint, and those are in MLflow."""
        return {}

    def replicate(self, journal: MirroredJournal) -> None:
        """Send everything that the journal has and the database has not.

        A run that a later attempt has taken over in the database is left as it is there.

        Raises:
            MirrorUnavailableError: The database does not answer.
        """
        record = journal.record
        if not record.get("run_id"):
            return
        sent = self._sent.setdefault(journal, _Sent())
        with answering(self._lazy.uri):
            run = StoredRun(self._lazy.get(), record["run_id"], int(record.get("attempt", 0)))
            try:
                self._send_record(run, _plain(record), sent)
                changed = self._send_checkpoints(run, journal, sent)
                curve_end = self._send_curve(run, journal, sent)
                if not sent.settled:
                    # All that this attempt knows bears its number now; it does not know what another machine did.
                    if not record.get("elsewhere"):
                        run.remove_older()
                    sent.settled = changed = True
                if changed or curve_end is not None:
                    run.stamp(curve_end)
            except SupersededError:
                self._warn_of_successor(record, sent)

    def heal(self, journal: RunJournal, *, verify: bool = False) -> list[str]:
        """Compare the database with the folder, and make it the same.

        Args:
            journal: The run.
            verify: Changes nothing: all is compared as it is.

        Returns:
            What was changed, a line each.

        Raises:
            MirrorUnavailableError: The database does not answer.
        """
        record = journal.record
        if not record.get("run_id"):
            return []
        with answering(self._lazy.uri):
            run = StoredRun(self._lazy.get(), record["run_id"], int(record.get("attempt", 0)))
            if run.superseded:
                self._warn_of_successor(record, self._sent.setdefault(journal, _Sent()))
                return []
            sent, lines = _Sent(settled=True), []
            sent.record = run.record()
            if sent.record is None:
                lines.append("the record was missing: it is sent")
            elif changed := sorted({key for keys in _difference(sent.record, _plain(record)).values() for key in keys}):
                lines.append(f"the record had another {', '.join(changed)}: it is sent")
            ledger, pinned = journal.snapshot(), pinned_episodes(journal.folder)
            entries = [encode(entry(journal.folder, ledger, episode, pinned)) for episode in ledger.saved]
            points = [_stored_point(placed) for placed in read_points(journal.folder.metrics)[0]]
            self._send_record(run, _plain(record), sent)
            lines += run.make_same(CHECKPOINTS, entries, ("episode",), "checkpoints")
            lines += run.make_same(METRICS, points, ("time", "num_timesteps"), "learning curve")
            if lines:
                run.stamp(points[-1] if points else None)
        return lines

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """Do nothing: the record is what is sent first."""

    def cancel(self, status: str) -> None:
        """Close the connections: `open` made nothing that must go."""
        self.close()

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        self._lazy.close()

    def _send_record(self, run: StoredRun, record: dict[str, Any], sent: _Sent) -> None:
        if record == sent.record:
            return
        if sent.record is not None and not run.change(_difference(sent.record, record), beats=self._trains):
            # The record is gone, or a later attempt's: then the rest may be gone as well.
            sent.record, sent.offset, sent.settled = None, 0, False
            sent.line, sent.next_look_for_pins = 0, 0.0
            sent.waiting.clear()
        if sent.record is None:
            run.replace(record, beats=self._trains)
        sent.record = record

    def _warn_of_successor(self, record: Mapping[str, Any], sent: _Sent) -> None:
        if not sent.warned:
            logger.warning(
                "MongoDB holds a later attempt of the run %s; attempt %s is not sent",
                record["run_id"],
                record.get("attempt"),
            )
        sent.warned = True

    def _send_checkpoints(self, run: StoredRun, journal: MirroredJournal, sent: _Sent) -> bool:
        pinned = self._look_for_pins(journal, sent)
        ledger, sent.line = journal.changed_since(sent.line, *sent.unsent, *(pinned ^ sent.pinned))
        sent.pinned = pinned
        sent.unsent.update(dict.fromkeys(ledger.saved))
        changed = bool(sent.unsent)
        while batch := [*islice(sent.unsent, BATCH)]:
            # One of another attempt's may be gone from the ledger meanwhile.
            known = [episode for episode in batch if episode in ledger.saved]
            run.upsert(CHECKPOINTS, [encode(entry(journal.folder, ledger, e, pinned)) for e in known], ("episode",))
            for episode in batch:
                del sent.unsent[episode]
        return changed

    def _look_for_pins(self, journal: MirroredJournal, sent: _Sent) -> set[int]:
        """Return the episodes that are pinned, as they were seen last.

        Nobody tells of a pin, and looking takes as long as the folder is: it may have a hundredth of the time. At the
        run's end all is seen.
        """
        began = time.monotonic()
        if began < sent.next_look_for_pins and journal.record.get("status") not in TERMINAL_STATUSES:
            return sent.pinned
        pinned = pinned_episodes(journal.folder)
        sent.next_look_for_pins = began + _PINS_PAUSE * (time.monotonic() - began)
        return pinned

    def _send_curve(self, run: StoredRun, journal: MirroredJournal, sent: _Sent) -> dict[str, Any] | None:
        """Send the points that are missing; return the last of them."""
        last = None
        while sent.waiting or self._read_points(journal, sent):
            run.upsert(METRICS, sent.waiting[:BATCH], ("time", "num_timesteps"))
            last = sent.waiting[:BATCH][-1]
            del sent.waiting[:BATCH]
        return last

    def _read_points(self, journal: MirroredJournal, sent: _Sent) -> bool:
        """Read a slice of the curve: how long an outage was must not show in the memory that its end takes."""
        while not sent.waiting:
            points, offset = read_points(journal.folder.metrics, sent.offset, _BYTES_PER_SLICE)
            if offset == sent.offset:
                return False
            sent.waiting, sent.offset = [_stored_point(placed) for placed in points], offset
        return True


def _stored_point(placed: PlacedPoint) -> dict[str, Any]:
    return {**encode(placed.point), LEVEL: placed.level, END: placed.end}


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as `run.json` gives it back, its keys safe for MongoDB."""
    plain: dict[str, Any] = encode(json.loads(json.dumps(record)))
    return plain


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    changed = {key: value for key, value in now.items() if key not in before or before[key] != value}
    gone = {key: "" for key in before if key not in now}
    return {operator: keys for operator, keys in (("$set", changed), ("$unset", gone)) if keys}
