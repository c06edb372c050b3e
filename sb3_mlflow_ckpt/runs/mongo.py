"""Owns the reading of runs from MongoDB: the store that serves the runs of many hosts. Never imports SB3."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import islice
from typing import Any

from pymongo import ASCENDING, DESCENDING

from sb3_mlflow_ckpt.errors import RunNotFoundError
from sb3_mlflow_ckpt.runs.curve import HIGHEST_LEVEL, PlacedPoint, is_point, lowest_level, thinned
from sb3_mlflow_ckpt.runs.document import derived_status
from sb3_mlflow_ckpt.runs.kept import Kept
from sb3_mlflow_ckpt.runs.mongo_database import (
    BOOKKEEPING,
    CHECKPOINTS,
    CURVE_END,
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
    RUNS_WITH_GLANCES,
    RUNS_WITH_ITEMS,
    SPARKLINE_POINTS,
    Document,
    Documents,
    Glance,
    glance,
    may_change_by_itself,
    part_of,
    spellings,
    summary,
)
from sb3_mlflow_ckpt.runs.summaries import SOURCES, summarize

_GLANCED = ["mirrors", CURVE_END, UPDATED_AT]
_OWN = ("_id", SEEN_AT, UPDATED_AT, CURVE_END)
# What was removed bears no stamp: that is looked for now and then.
_SECONDS_BETWEEN_COUNTS = 5.0
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
        self._kept: dict[str, _Summary] = {}
        self._read_at: datetime | None = None
        self._counted = float("-inf")
        self._items: Kept[str, Documents] = Kept(RUNS_WITH_ITEMS)
        self._seen: Kept[str, Glance] = Kept(RUNS_WITH_GLANCES)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"{redacted(self._lazy.uri)} (database {self._lazy.name})"

    def get(self, run_id: str) -> Document:
        """Return a run's record with its derived status and its `checkpoint_paths`."""
        with self._reading() as database:
            stored = self._find(database, run_id)
            return {**_record(stored, _server_time(database)), "checkpoint_paths": [*self._items_of(database, stored)]}

    def record(self, run_id: str) -> Document:
        """Return a run's record with its derived status."""
        with self._reading() as database:
            return _record(self._find(database, run_id), _server_time(database))

    def checkpoints(self, run_id: str, *, before: int | None = None, limit: int | None = None) -> Documents:
        """Return items of `checkpoint_paths`, ascending by episode."""
        with self._reading() as database:
            return part_of(self._items_of(database, self._find(database, run_id, UPDATED_AT)), before, limit)

    def curve(self, run_id: str, points: int | None = None) -> Documents:
        """Return the points of a run's learning curve, by time."""
        with self._reading() as database:
            stored = self._find(database, run_id, CURVE_END)
            if points is not None:
                return thinned(_sample(database, stored, points), points)
            rows = database[METRICS].find({"run_id": stored["_id"]})
            return [_item(row) for row in rows.sort([("time", ASCENDING), ("num_timesteps", ASCENDING)])]

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
                self._refresh(database, now)
                return [kept.shown(now) for kept in self._kept.values()]

    def glances(self, run_ids: Sequence[str]) -> dict[str, Glance]:
        """Return what a list shows beside the summaries of some runs."""
        with self._reading() as database:
            found = {str(row["_id"]): row for row in database[RUNS].find({"_id": {"$in": [*run_ids]}}, _GLANCED)}
            return {
                run_id: self._seen.get(run_id, stored.get(UPDATED_AT), partial(self._glance, database, stored))
                for run_id, stored in found.items()
            }

    def _glance(self, database: MongoDatabase, stored: Mapping[str, Any]) -> Glance:
        few = thinned(_sample(database, stored, SPARKLINE_POINTS), SPARKLINE_POINTS)
        return glance(stored, self._items_of(database, stored), few)

    def _items_of(self, database: MongoDatabase, stored: Mapping[str, Any]) -> Documents:
        def read() -> Documents:
            rows = database[CHECKPOINTS].find({"run_id": stored["_id"]})
            # Somebody else may have written something else.
            items = [item for item in map(_item, rows) if isinstance(item.get("episode"), int)]
            return sorted(items, key=lambda item: int(item["episode"]))

        return self._items.get(str(stored["_id"]), stored.get(UPDATED_AT), read)

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

    def _refresh(self, database: MongoDatabase, now: datetime | None) -> None:
        changed = {} if self._read_at is None else {UPDATED_AT: {"$gte": self._read_at - _OVERLAP}}
        self._take(database[RUNS].find(changed, [*SOURCES, SEEN_AT]))
        self._read_at = now
        if time.monotonic() - self._counted < _SECONDS_BETWEEN_COUNTS:
            return
        if database[RUNS].estimated_document_count() != len(self._kept):
            self._kept.clear()
            self._take(database[RUNS].find({}, [*SOURCES, SEEN_AT]))
        self._counted = time.monotonic()

    def _take(self, stored: Iterable[Mapping[str, Any]]) -> None:
        for row in stored:
            record = decode({key: value for key, value in row.items() if key not in _OWN})
            self._kept[str(row["_id"])] = _Summary(summarize(record), _utc(row.get(SEEN_AT)))


class _Summary:
    """A summary as it was read, and when the server saw its run.

    Args:
        summary: With the stored status.
        seen: When a trainer last gave a sign of life.
    """

    __slots__ = ("seen", "summary")

    def __init__(self, summary: Document, seen: datetime | None) -> None:
        self.summary, self.seen = summary, seen

    def shown(self, now: datetime | None) -> Document:
        if not may_change_by_itself(self.summary["status"]):
            return self.summary
        return {**self.summary, "status": derived_status(self.summary, now, self.seen)}


def _sample(database: MongoDatabase, stored: Mapping[str, Any], points: int) -> list[PlacedPoint]:
    """Return the points of the levels that are wanted, and the last: without a search for which is the last."""
    end = stored.get(CURVE_END)
    if not isinstance(end, Mapping) or not isinstance(end.get(END), int):
        return []
    run_id, level = stored["_id"], lowest_level(end[END], points)
    wanted = {"run_id": run_id, LEVEL: {"$gte": level}} if level else {"run_id": run_id}
    last = {"run_id": run_id, "time": end.get("time"), "num_timesteps": end.get("num_timesteps")}
    rows = {row["_id"]: row for row in (*database[METRICS].find(wanted), *database[METRICS].find(last))}
    return [PlacedPoint(_item(row), _level(row), 0) for row in rows.values() if is_point(row)]


def _level(row: Mapping[str, Any]) -> int:
    level = row.get(LEVEL)
    return level if isinstance(level, int) else HIGHEST_LEVEL


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
