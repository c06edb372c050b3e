"""Owns the copy of runs in MongoDB: records, checkpoints' entries and learning curves, never checkpoints' files.

Never imports stable-baselines3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from pymongo import ReplaceOne
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.runs.document import SCHEMA_VERSION, redact
from sb3_mlflow_ckpt.runs.folder import curve_points, entry
from sb3_mlflow_ckpt.runs.mongo import (
    CHECKPOINTS,
    DEFAULT_DATABASE,
    METRICS,
    RUNS,
    LazyDatabase,
    MongoDatabase,
    answering,
    encode,
    open_database,
)

logger = logging.getLogger(__name__)

# Small enough that a batch ends well within the time that an operation may take.
_BATCH = 200

_Facts: TypeAlias = tuple[dict[str, Any], "str | None", bool]


@dataclass
class _Sent:
    """What the database is known to have of one run; a fresh one means: send everything.

    Attributes:
        record: The record as it was sent last.
        checkpoints: What each checkpoint's entry was made of, by episode.
        offset: How far `metrics.jsonl` was read, in bytes.
        waiting: Points that were read and not yet sent.
        warned: Whether it was said that a later attempt owns the run.
    """

    record: dict[str, Any] | None = None
    checkpoints: dict[int, _Facts] = field(default_factory=dict)
    offset: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)
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
        self._sent: WeakKeyDictionary[RunJournal, _Sent] = WeakKeyDictionary()

    def open(self, record: Mapping[str, Any]) -> str | None:
        """Contact the database and make its indexes.

        Returns:
            None: MongoDB does not name runs.

        Raises:
            MirrorUnavailableError: It does not answer within 5 s.
        """
        with answering(self._lazy.uri):
            self._lazy.get().command("ping")
        return None

    def describe(self) -> dict[str, Any]:
        """Return which database it is, without credentials."""
        return {"mongo": {"uri": redact(self._lazy.uri), "database": self._lazy.name}}

    def replicate(self, journal: RunJournal) -> None:
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
            database = self._lazy.get()
            if self._send_record(database, _plain(record), sent):
                self._send_checkpoints(database, journal, record["run_id"], sent)
                self._send_curve(database, journal, record["run_id"], sent)

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """Do nothing: the record is what is sent first."""

    def cancel(self, status: str) -> None:
        """Close the connections: `open` made nothing that must go."""
        self.close()

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        self._lazy.close()

    def _send_record(self, database: MongoDatabase, record: dict[str, Any], sent: _Sent) -> bool:
        """Bring the record up to date; return whether the run is this attempt's."""
        if record == sent.record:
            return True
        runs = database[RUNS]
        own = {"_id": record["run_id"], "attempt": {"$not": {"$gt": record.get("attempt", 0)}}}
        if sent.record is not None and runs.update_one(own, _difference(sent.record, record)).matched_count == 0:
            # The record is gone, or a later attempt's: then the rest may be gone as well.
            sent.record, sent.offset = None, 0
            sent.checkpoints.clear()
            sent.waiting.clear()
        if sent.record is None:
            try:
                runs.replace_one(own, {"_id": record["run_id"], **record}, upsert=True)
            except DuplicateKeyError:
                if not _has_successor(runs, record):
                    raise
                self._warn_of_successor(record, sent)
                return False
        sent.record = record
        return True

    def _warn_of_successor(self, record: Mapping[str, Any], sent: _Sent) -> None:
        if not sent.warned:
            logger.warning(
                "MongoDB holds a later attempt of the run %s; attempt %s is not sent",
                record["run_id"],
                record.get("attempt"),
            )
        sent.warned = True

    def _send_checkpoints(self, database: MongoDatabase, journal: RunJournal, run_id: str, sent: _Sent) -> None:
        ledger = journal.snapshot()
        facts: dict[int, _Facts] = {
            episode: (saved, ledger.uris.get(episode), episode in ledger.pruned)
            for episode, saved in ledger.saved.items()
        }
        changed = iter([episode for episode, fact in facts.items() if sent.checkpoints.get(episode) != fact])
        while batch := [*islice(changed, _BATCH)]:
            entries = [entry(journal.folder, ledger, episode) for episode in batch]
            _upsert(database[CHECKPOINTS], run_id, entries, ("episode",))
            sent.checkpoints.update({episode: facts[episode] for episode in batch})

    def _send_curve(self, database: MongoDatabase, journal: RunJournal, run_id: str, sent: _Sent) -> None:
        if not sent.waiting:
            self._read_points(journal, sent)
        while sent.waiting:
            _upsert(database[METRICS], run_id, sent.waiting[:_BATCH], ("time", "num_timesteps"))
            del sent.waiting[:_BATCH]
            if not sent.waiting:
                # What came while the backlog was sent.
                self._read_points(journal, sent)

    def _read_points(self, journal: RunJournal, sent: _Sent) -> None:
        rows, sent.offset = atomic.read_lines(journal.folder.metrics, sent.offset)
        sent.waiting = list(curve_points(rows).values())


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as `run.json` gives it back, its keys safe for MongoDB."""
    plain: dict[str, Any] = encode(json.loads(json.dumps(record)))
    return plain


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    changed = {key: value for key, value in now.items() if key not in before or before[key] != value}
    gone = {key: "" for key in before if key not in now}
    return {operator: keys for operator, keys in (("$set", changed), ("$unset", gone)) if keys}


def _has_successor(runs: Collection[dict[str, Any]], record: Mapping[str, Any]) -> bool:
    stored = runs.find_one({"_id": record["run_id"]}, {"attempt": 1})
    return stored is not None and stored.get("attempt", 0) > record.get("attempt", 0)


def _upsert(
    collection: Collection[dict[str, Any]], run_id: str, items: list[dict[str, Any]], key: tuple[str, ...]
) -> None:
    requests = []
    for item in items:
        document = {**encode(item), "run_id": run_id, "schema_version": SCHEMA_VERSION}
        requests.append(ReplaceOne({"run_id": run_id, **{name: item[name] for name in key}}, document, upsert=True))
    collection.bulk_write(requests, ordered=False)
