"""Owns the documents of one run in MongoDB, as one attempt may write them: a later attempt fences it out.

Two processes can hold copies of one run folder, and the older may wake up after the newer took over. Each document
bears the number of the attempt that wrote it, and no write replaces that of a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

from pymongo import ReplaceOne, UpdateOne
from pymongo.errors import BulkWriteError, DuplicateKeyError

from sb3_mlflow_ckpt.runs.document import SCHEMA_VERSION
from sb3_mlflow_ckpt.runs.mongo_database import (
    ATTEMPT,
    CHECKPOINTS,
    CURVE_END,
    END,
    METRICS,
    RUNS,
    SEEN_AT,
    UPDATED_AT,
    MongoDatabase,
    make_indexes,
)

BATCH = 100
"""Documents in one request: few enough that it ends well within the time that an operation may take."""
_DUPLICATE_KEY = 11000
_END_OF_CURVE = ("time", "num_timesteps", END)
_Write: TypeAlias = "ReplaceOne[dict[str, Any]] | UpdateOne"
_Items: TypeAlias = Sequence[Mapping[str, Any]]


class SupersededError(Exception):
    """A later attempt has taken over the run in the database."""


class StoredRun:
    """One run in the database, written by one attempt.

    Args:
        database: Where it lies.
        run_id: Its id.
        attempt: The number of the attempt that writes.
    """

    def __init__(self, database: MongoDatabase, run_id: str, attempt: int) -> None:
        self._database = database
        self._run_id = run_id
        self._attempt = attempt
        self._not_later = {"$not": {"$gt": attempt}}
        self._own = {"_id": run_id, ATTEMPT: self._not_later}

    @property
    def superseded(self) -> bool:
        """Whether a later attempt has taken over."""
        return self._database[RUNS].find_one({"_id": self._run_id, ATTEMPT: {"$gt": self._attempt}}) is not None

    def record(self) -> dict[str, Any] | None:
        """Return the record as it is stored, or None where there is none."""
        stored = self._database[RUNS].find_one({"_id": self._run_id})
        own = ("_id", SEEN_AT, UPDATED_AT, CURVE_END)
        return None if stored is None else {key: value for key, value in stored.items() if key not in own}

    def change(self, update: Mapping[str, Any], *, beats: bool) -> bool:
        """Change fields of the record; return whether it is there and this attempt's.

        Args:
            update: The operators.
            beats: Whether it is a sign of life, which bears the server's own time.
        """
        whole = {**update, "$currentDate": {UPDATED_AT: True, **({SEEN_AT: True} if beats else {})}}
        return self._database[RUNS].update_one(self._own, whole).matched_count > 0

    def stamp(self, curve_end: Mapping[str, Any] | None) -> None:
        """Say that something was written, after it was: who sees the stamp finds what it stands for.

        Args:
            curve_end: The last point of the curve as it is stored; None where none was written.
        """
        told = {} if curve_end is None else {"$set": {CURVE_END: {key: curve_end[key] for key in _END_OF_CURVE}}}
        self.change(told, beats=False)

    def replace(self, record: Mapping[str, Any], *, beats: bool) -> None:
        """Put the record in place of what is there.

        Raises:
            SupersededError: That is a later attempt's.
        """
        # Somebody may have dropped the collections, and what keeps documents apart with them.
        make_indexes(self._database)
        try:
            self._database[RUNS].replace_one(self._own, {"_id": self._run_id, **record}, upsert=True)
        except DuplicateKeyError:
            if self.superseded:
                raise SupersededError from None
            raise
        if beats:
            self.change({}, beats=True)

    def upsert(self, collection: str, items: _Items, key: Sequence[str]) -> None:
        """Write encoded documents, each known by `key` among the run's.

        Raises:
            SupersededError: A later attempt has taken over; then nothing of this batch stays.
        """
        if self.superseded:
            raise SupersededError
        filters = [{"run_id": self._run_id, **{name: item[name] for name in key}} for item in items]
        write = self._add if collection == METRICS else self._replace
        requests = [write(known, item) for known, item in zip(filters, items, strict=True)]
        try:
            self._database[collection].bulk_write(requests, ordered=False)
        except BulkWriteError as error:
            if not self.superseded or any(e["code"] != _DUPLICATE_KEY for e in error.details["writeErrors"]):
                raise
        # It may have slept since it looked: what it wrote after the other took over is taken back.
        if self.superseded:
            self._database[collection].delete_many({"$or": filters, ATTEMPT: self._attempt})
            raise SupersededError

    def remove_older(self) -> None:
        """Remove what only earlier attempts know."""
        for collection in (CHECKPOINTS, METRICS):
            self._database[collection].delete_many({"run_id": self._run_id, ATTEMPT: {"$lt": self._attempt}})

    def make_same(self, collection: str, items: _Items, key: Sequence[str], what: str) -> list[str]:
        """Make the run's documents these, and no others; return what was changed, a line each."""
        expected = {tuple(item[name] for name in key): item for item in items}
        foreign: list[Any] = []
        different: list[Any] = []
        for stored in self._database[collection].find({"run_id": self._run_id}):
            identity, known = stored.pop("_id"), tuple(stored.get(name) for name in key)
            item = expected.get(known) if all(isinstance(part, (str, int, float)) for part in known) else None
            if item is None or _number(stored.get(ATTEMPT)) > self._attempt:
                foreign.append(identity)
            elif stored == self._document(item):
                del expected[known]
            else:
                different.append(identity)
        for batch in _batches([*foreign, *different]):
            self._database[collection].delete_many({"_id": {"$in": batch}})
        for batch in _batches(expected.values()):
            self.upsert(collection, batch, key)
        return [
            *([f"{what}: {len(foreign)} that the folder does not know removed"] if foreign else []),
            *([f"{what}: {len(expected)} missing or different sent"] if expected else []),
        ]

    def _add(self, known: Mapping[str, Any], item: Mapping[str, Any]) -> _Write:
        # A point never changes: what an earlier attempt writes again is the same, and must not lower the number.
        # Sought by its key alone, which every server does by its index.
        document = self._document(item)
        attempt = document.pop(ATTEMPT)
        return UpdateOne(known, {"$set": document, "$max": {ATTEMPT: attempt}}, upsert=True)

    def _replace(self, known: Mapping[str, Any], item: Mapping[str, Any]) -> _Write:
        return ReplaceOne({**known, ATTEMPT: self._not_later}, self._document(item), upsert=True)

    def _document(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {**item, "run_id": self._run_id, "schema_version": SCHEMA_VERSION, ATTEMPT: self._attempt}


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else 0


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := [*islice(rest, BATCH)]:
        yield batch
