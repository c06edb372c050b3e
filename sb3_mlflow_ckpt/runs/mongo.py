"""Owns the reading of runs from MongoDB: the store that serves the runs of many hosts. Never imports SB3."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import Any

from pymongo import ASCENDING, DESCENDING

from sb3_mlflow_ckpt.errors import RunNotFoundError
from sb3_mlflow_ckpt.runs.curve import HIGHEST_LEVEL, PlacedPoint, lowest_level, thinned
from sb3_mlflow_ckpt.runs.document import derived_status
from sb3_mlflow_ckpt.runs.mongo_database import (
    BOOKKEEPING,
    CHECKPOINTS,
    DEFAULT_DATABASE,
    END,
    LEVEL,
    METRICS,
    RUNS,
    SEEN_AT,
    UPDATED_AT,
    LazyDatabase,
    MongoDatabase,
    answering,
    connect,
    decode,
    redacted,
)
from sb3_mlflow_ckpt.runs.reader import (
    SPARKLINE_POINTS,
    Document,
    Documents,
    Glance,
    glance,
    may_change_by_itself,
    spellings,
    summary,
)
from sb3_mlflow_ckpt.runs.summaries import SOURCES, summarize

_OWN = ("_id", SEEN_AT, UPDATED_AT)
# What is written at once by many hosts may become visible in another order than that of its stamps.
_OVERLAP = timedelta(seconds=10)


class MongoRuns:
    """The runs in a MongoDB database; see `RunReader`. Connects at first use. Safe to use from any thread.

    Args:
        uri: MongoDB's address.
        database: The database's name.
    """

    def __init__(self, uri: str, database: str = DEFAULT_DATABASE) -> None:
        # Without a ping: readers in many threads would wait for a dead server one after another.
        self._lazy = LazyDatabase(uri, database, connect)
        self._kept: dict[str, _Kept] = {}
        self._newest: datetime | None = None
        self._glances: dict[str, tuple[datetime | None, Glance]] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{redacted(self._lazy.uri)} (database {self._lazy.name})"

    def get(self, run_id: str) -> Document:
        """Return a run's record with its derived status and its `checkpoint_paths`."""
        with self._reading() as database:
            stored = self._find(database, run_id)
            entries = database[CHECKPOINTS].find({"run_id": stored["_id"]}).sort("episode", ASCENDING)
            return {**_record(stored, _server_time(database)), "checkpoint_paths": [_item(row) for row in entries]}

    def record(self, run_id: str) -> Document:
        """Return a run's record with its derived status."""
        with self._reading() as database:
            return _record(self._find(database, run_id), _server_time(database))

    def checkpoints(self, run_id: str, *, before: int | None = None, limit: int | None = None) -> Documents:
        """Return items of `checkpoint_paths`, ascending by episode."""
        with self._reading() as database:
            wanted: dict[str, Any] = {"run_id": self._find(database, run_id, "_id")["_id"]}
            if before is not None:
                wanted["episode"] = {"$lt": before}
            entries = database[CHECKPOINTS].find(wanted).sort("episode", DESCENDING)
            return [_item(row) for row in (entries if limit is None else entries.limit(limit))][::-1]

    def curve(self, run_id: str, points: int | None = None) -> Documents:
        """Return the points of a run's learning curve, by time."""
        with self._reading() as database:
            run_id = self._find(database, run_id, "_id")["_id"]
            if points is not None:
                return thinned(_sample(database, run_id, points), points)
            stored = database[METRICS].find({"run_id": run_id})
            return [_item(row) for row in stored.sort([("time", ASCENDING), ("num_timesteps", ASCENDING)])]

    def version(self, run_id: str) -> str:
        """Return a text that is another one whenever anything that is shown of the run has changed."""
        with self._reading() as database:
            stored = self._find(database, run_id, *SOURCES, SEEN_AT, UPDATED_AT)
            status = _record(stored, _server_time(database))["status"]
            return f"{stored.get(UPDATED_AT)} {stored.get('attempt')} {status}"

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        """Return the records that match, newest first."""
        wanted: dict[str, Any] = {} if agent_id is None else {"agent_id": agent_id}
        derived = may_change_by_itself(status)
        if status is not None:
            wanted["status"] = "running" if derived else status
        with self._reading() as database:
            cursor = database[RUNS].find(wanted).sort([("started_at", DESCENDING), ("_id", DESCENDING)])
            if limit and not derived:
                cursor = cursor.limit(limit)
            now = _server_time(database)
            runs = (_record(stored, now) for stored in cursor)
            return [*islice((run for run in runs if status in (None, run["status"])), limit)]

    def summaries(self) -> Documents:
        """Return the summary of every run; what has not changed since the last call is not read again."""
        with self._reading() as database:
            # Before the lock is taken: threads that find the server down wait for it together, not one after another.
            now = _server_time(database)
            with self._lock:
                self._refresh(database)
                return [kept.shown(now) for kept in self._kept.values()]

    def glances(self, run_ids: Sequence[str]) -> dict[str, Glance]:
        """Return what a list shows beside the summaries of some runs."""
        with self._reading() as database:
            with self._lock:
                kept = {run_id: self._kept[run_id] for run_id in run_ids if run_id in self._kept}
                known = dict(self._glances)
            stale = [run_id for run_id, run in kept.items() if known.get(run_id, (None,))[0] != run.updated]
            fresh = _read_glances(database, {run_id: kept[run_id].summary for run_id in stale})
            with self._lock:
                self._glances.update({run_id: (kept[run_id].updated, found) for run_id, found in fresh.items()})
                return {run_id: self._glances[run_id][1] for run_id in kept if run_id in self._glances}

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        self._lazy.close()

    @contextmanager
    def _reading(self) -> Iterator[MongoDatabase]:
        with answering(self._lazy.uri):
            yield self._lazy.get()

    def _find(self, database: MongoDatabase, run_id: str, *fields: str) -> dict[str, Any]:
        for spelling in spellings(run_id):
            stored = database[RUNS].find_one({"_id": spelling}, [*fields] or None)
            if stored is not None:
                return stored
        raise RunNotFoundError(run_id, self)

    def _refresh(self, database: MongoDatabase) -> None:
        changed = {} if self._newest is None else {UPDATED_AT: {"$gte": self._newest - _OVERLAP}}
        self._take(database[RUNS].find(changed, [*SOURCES, SEEN_AT, UPDATED_AT]))
        # What was removed bears no stamp.
        if database[RUNS].estimated_document_count() != len(self._kept):
            self._kept.clear()
            self._take(database[RUNS].find({}, [*SOURCES, SEEN_AT, UPDATED_AT]))
            self._glances = {run_id: found for run_id, found in self._glances.items() if run_id in self._kept}

    def _take(self, stored: Iterable[Mapping[str, Any]]) -> None:
        for row in stored:
            updated = row.get(UPDATED_AT)
            updated = updated if isinstance(updated, datetime) else None
            record = decode({key: value for key, value in row.items() if key not in _OWN})
            self._kept[str(row["_id"])] = _Kept(summarize(record), _utc(row.get(SEEN_AT)), updated)
            if updated is not None:
                self._newest = updated if self._newest is None else max(updated, self._newest)


class _Kept:
    """A summary as it was read, and when the server saw its run.

    Args:
        summary: With the stored status.
        seen: When a trainer last gave a sign of life.
        updated: When anything of the run was last written, as the database holds it.
    """

    __slots__ = ("seen", "summary", "updated")

    def __init__(self, summary: Document, seen: datetime | None, updated: datetime | None) -> None:
        self.summary, self.seen, self.updated = summary, seen, updated

    def shown(self, now: datetime | None) -> Document:
        if not may_change_by_itself(self.summary["status"]):
            return self.summary
        return {**self.summary, "status": derived_status(self.summary, now, self.seen)}


def _sample(database: MongoDatabase, run_id: str, points: int) -> list[PlacedPoint]:
    """Return the points of the levels that are wanted, and the last."""
    newest = database[METRICS].find({"run_id": run_id}).sort([("time", DESCENDING), ("num_timesteps", DESCENDING)])
    last = [*newest.limit(1)]
    size = last[0].get(END) if last else None
    level = lowest_level(size, points) if isinstance(size, int) else 0
    wanted = {"run_id": run_id, LEVEL: {"$gte": level}} if level else {"run_id": run_id}
    rows = {row["_id"]: row for row in (*database[METRICS].find(wanted), *last)} if last else {}
    return [PlacedPoint(_item(row), int(row.get(LEVEL, HIGHEST_LEVEL)), 0) for row in rows.values()]


def _read_glances(database: MongoDatabase, runs: Mapping[str, Document]) -> dict[str, Glance]:
    entries: defaultdict[str, Documents] = defaultdict(list)
    if runs:
        for row in database[CHECKPOINTS].find({"run_id": {"$in": [*runs]}}):
            entries[row["run_id"]].append(_item(row))
    return {
        run_id: glance(run, entries[run_id], thinned(_sample(database, run_id, SPARKLINE_POINTS), SPARKLINE_POINTS))
        for run_id, run in runs.items()
    }


def _server_time(database: MongoDatabase) -> datetime | None:
    """Return the present by the server's clock: what it wrote when it saw a run is judged by no other."""
    return _utc(database.command("hello").get("localTime"))


def _utc(value: Any) -> datetime | None:
    return value.replace(tzinfo=timezone.utc) if isinstance(value, datetime) else None


def _record(stored: Mapping[str, Any], now: datetime | None) -> Document:
    record = decode({key: value for key, value in stored.items() if key not in _OWN})
    return summary(record, now, _utc(stored.get(SEEN_AT)))


def _item(stored: Mapping[str, Any]) -> Document:
    item: Document = decode({key: value for key, value in stored.items() if key not in BOOKKEEPING})
    return item
