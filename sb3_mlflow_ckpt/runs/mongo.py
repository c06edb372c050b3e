"""Owns how runs lie in MongoDB, and the reading of them: the store that serves the runs of many hosts.

- `training_runs`: the records, `_id` is the run id;
- `training_checkpoints`: the items of `checkpoint_paths`, one for each (run_id, episode);
- `training_metrics`: the learning curves, one document for each (run_id, time, num_timesteps).

A record's size so does not grow with the run's length. Never imports stable-baselines3.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from typing import Any, TypeAlias

from pymongo import ASCENDING, DESCENDING, IndexModel, MongoClient, WriteConcern, timeout
from pymongo.database import Database
from pymongo.errors import PyMongoError

from sb3_mlflow_ckpt.errors import MirrorUnavailableError, RunNotFoundError
from sb3_mlflow_ckpt.runs.document import redact
from sb3_mlflow_ckpt.runs.reader import Document, Documents, spellings, summary

RUNS = "training_runs"
CHECKPOINTS = "training_checkpoints"
METRICS = "training_metrics"
ATTEMPT = "attempt"
"""The number of the attempt that wrote a document."""
SEEN_AT = "seen_at"
"""When a trainer last gave a sign of life, by the server's clock: hosts' clocks may be wrong."""
DEFAULT_DATABASE = "sb3_mlflow_ckpt"

MongoDatabase: TypeAlias = Database[dict[str, Any]]

# An outage is noticed within 5 s. The last bounds an operation with its retries and, in pymongo, the search for a
# server that belongs to it; the first two bound what the client does by itself.
_SELECTION_MS = 3000
_CONNECT_MS = 3000
_OPERATION_MS = 4000

_INT64 = range(-(2**63), 2**63)
# A stored key never begins with "%" and goes on so: what stands for a whole value cannot be mistaken for a key.
_BIG_INTEGER = "%int"
_EMPTY_KEY = "%"
# A document's own keys beside those of a checkpoint's entry or a point.
_BOOKKEEPING = frozenset({"_id", "run_id", "schema_version", ATTEMPT})


def encode_key(key: str) -> str:
    """Return a key as every MongoDB version can store it: percent-encoded where it has a meaning of its own."""
    if not key:
        return _EMPTY_KEY
    key = key.replace("%", "%25").replace(".", "%2E").replace("\0", "%00")
    return "%24" + key[1:] if key.startswith("$") else key


def decode_key(key: str) -> str:
    """Return the key that `encode_key` was given."""
    if key == _EMPTY_KEY:
        return ""
    return re.sub("%(25|2E|00|24)", lambda match: chr(int(match[1], 16)), key)


def encode(value: Any) -> Any:
    """Return a JSON value as MongoDB can store it: safe keys, no NaN or infinity, no integer above 64 bits."""
    if isinstance(value, Mapping):
        return {encode_key(str(key)): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and value not in _INT64:
        return {_BIG_INTEGER: str(value)}
    return value


def decode(value: Any) -> Any:
    """Return the JSON value that `encode` was given."""
    if isinstance(value, Mapping):
        if value.keys() == {_BIG_INTEGER}:
            return int(value[_BIG_INTEGER])
        return {decode_key(key): decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    # bson's Int64 is a subclass of int.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def redacted(uri: str) -> str:
    """Return a MongoDB URI without its credentials and options, which may be secrets as well.

    A password whose `@`, `/` or `?` is not escaped, or a scheme that is left out, makes the URI invalid, and the
    password is removed all the same.
    """
    return re.sub(r"(?s)\?.*", "", re.sub(r"(?s)^(\w[\w+.-]*://)?.*@", r"\1***@", uri))


def connect(uri: str, database: str) -> MongoDatabase:
    """Return a database without contacting its server; facts written to it are on a majority's disks.

    Raises:
        MirrorUnavailableError: The URI or the database's name is not valid.
    """
    client: MongoClient[dict[str, Any]] | None = None
    try:
        client = MongoClient(
            uri,
            serverSelectionTimeoutMS=_SELECTION_MS,
            connectTimeoutMS=_CONNECT_MS,
            timeoutMS=_OPERATION_MS,
            appname="sb3-mlflow-ckpt",
        )
        return client.get_database(database, write_concern=WriteConcern(w="majority", j=True))
    # A port that is no number is a ValueError, an option of the wrong type a TypeError, a missing CA an OSError.
    except (PyMongoError, ValueError, TypeError, OSError) as error:
        if client is not None:
            client.close()
        # Not chained: pymongo's message, and so a traceback, may quote a part of the URI.
        raise MirrorUnavailableError("MongoDB", redacted(uri), _parse_problem(error, uri)) from None


def open_database(uri: str, database: str) -> MongoDatabase:
    """Return a database whose server answers, with its indexes made. Close `.client` when done.

    Raises:
        MirrorUnavailableError: The URI is not valid, or the server does not answer within 5 s.
    """
    opened = connect(uri, database)
    try:
        # One limit for all of it, not one for each command.
        with answering(uri), timeout(_OPERATION_MS / 1000):
            opened.command("ping")
            make_indexes(opened)
    except BaseException:
        opened.client.close()
        raise
    return opened


def make_indexes(database: MongoDatabase) -> None:
    """Make the indexes that are missing."""
    for collection, models in _indexes().items():
        database[collection].create_indexes(models)


def missing_indexes(database: MongoDatabase) -> list[str]:
    """Return the names of the indexes that are not there, as `collection.index`."""
    missing = []
    for collection, models in _indexes().items():
        there = set(database[collection].index_information())
        missing += [f"{collection}.{m.document['name']}" for m in models if m.document["name"] not in there]
    return missing


def _indexes() -> dict[str, list[IndexModel]]:
    newest = ("started_at", DESCENDING)
    filters: list[list[tuple[str, int]]] = [[], [("agent_id", ASCENDING)], [("status", ASCENDING)]]
    # In the order in which a curve is read: one index finds, sorts and keeps points unique.
    points = [("run_id", ASCENDING), ("time", ASCENDING), ("num_timesteps", ASCENDING)]
    return {
        RUNS: [IndexModel([*keys, newest]) for keys in filters],
        CHECKPOINTS: [IndexModel([("run_id", ASCENDING), ("episode", ASCENDING)], unique=True)],
        METRICS: [IndexModel(points, unique=True)],
    }


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn any error of pymongo into MirrorUnavailableError."""
    try:
        yield
    except PyMongoError as error:
        raise MirrorUnavailableError("MongoDB", redacted(uri), redact(str(error))) from error


class LazyDatabase:
    """A database whose client is made in the process that uses it, since a MongoClient does not survive a fork.

    Args:
        uri: MongoDB's address.
        database: The database's name.
        opener: `connect`, or `open_database` where the first use makes sure of server and indexes.
    """

    def __init__(self, uri: str, database: str, opener: Callable[[str, str], MongoDatabase]) -> None:
        self.uri = uri
        self.name = database
        self._opener = opener
        self._database: MongoDatabase | None = None
        self._pid: int | None = None
        self._lock = threading.Lock()

    def get(self) -> MongoDatabase:
        """Return the database, opened in this process."""
        pid = os.getpid()
        with self._lock:
            if self._database is None or self._pid != pid:
                self._database, self._pid = self._opener(self.uri, self.name), pid
            return self._database

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        with self._lock:
            # A parent's client is not this process's to close.
            if self._database is not None and self._pid == os.getpid():
                self._database.client.close()
            self._database = None


class MongoRuns:
    """The runs in a MongoDB database; see `RunReader`. Connects at first use.

    Args:
        uri: MongoDB's address.
        database: The database's name.
    """

    def __init__(self, uri: str, database: str = DEFAULT_DATABASE) -> None:
        # Without a ping: readers in many threads would wait for a dead server one after another.
        self._lazy = LazyDatabase(uri, database, connect)

    def __str__(self) -> str:
        return f"{redacted(self._lazy.uri)} (database {self._lazy.name})"

    def get(self, run_id: str) -> Document:
        """Return a run's record with its derived status and its `checkpoint_paths`."""
        with self._reading() as database:
            stored = self._find(database, run_id)
            entries = database[CHECKPOINTS].find({"run_id": stored["_id"]}).sort("episode", ASCENDING)
            return {**_record(stored, _server_time(database)), "checkpoint_paths": [_item(row) for row in entries]}

    def curve(self, run_id: str) -> Documents:
        """Return the points of a run's learning curve, by time."""
        with self._reading() as database:
            stored = self._find(database, run_id)
            points = database[METRICS].find({"run_id": stored["_id"]})
            return [_item(row) for row in points.sort([("time", ASCENDING), ("num_timesteps", ASCENDING)])]

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        """Return the records that match, newest first."""
        wanted: dict[str, Any] = {} if agent_id is None else {"agent_id": agent_id}
        if status is not None:
            # `lost` is never stored: it is what a running run's heartbeat tells.
            wanted["status"] = "running" if status == "lost" else status
        with self._reading() as database:
            cursor = database[RUNS].find(wanted).sort([("started_at", DESCENDING), ("_id", DESCENDING)])
            if limit and status not in ("running", "lost"):
                cursor = cursor.limit(limit)
            now = _server_time(database)
            runs = (_record(stored, now) for stored in cursor)
            return [*islice((run for run in runs if status in (None, run["status"])), limit)]

    def close(self) -> None:
        """Close the connections; the next use opens others."""
        self._lazy.close()

    @contextmanager
    def _reading(self) -> Iterator[MongoDatabase]:
        with answering(self._lazy.uri):
            yield self._lazy.get()

    def _find(self, database: MongoDatabase, run_id: str) -> dict[str, Any]:
        for spelling in spellings(run_id):
            stored = database[RUNS].find_one({"_id": spelling})
            if stored is not None:
                return stored
        raise RunNotFoundError(run_id, self)


def _server_time(database: MongoDatabase) -> datetime | None:
    """Return the present by the server's clock: what it wrote when it saw a run is judged by no other."""
    now = database.command("hello").get("localTime")
    return now.replace(tzinfo=timezone.utc) if isinstance(now, datetime) else None


def _record(stored: Mapping[str, Any], now: datetime | None) -> Document:
    record = decode({key: value for key, value in stored.items() if key not in ("_id", SEEN_AT)})
    seen = stored.get(SEEN_AT)
    return summary(record, now, seen.replace(tzinfo=timezone.utc) if isinstance(seen, datetime) else None)


def _item(stored: Mapping[str, Any]) -> Document:
    item: Document = decode({key: value for key, value in stored.items() if key not in _BOOKKEEPING})
    return item


def _parse_problem(error: Exception, uri: str) -> str:
    """Return what is wrong with a URI, in pymongo's words unless they quote a part of the credentials."""
    credentials = re.search("//(.*)@", uri, flags=re.DOTALL)
    secrets = set(re.findall(r"\w+", credentials[1])) if credentials else set()
    if secrets & set(re.findall(r"\w+", str(error))):
        return "the URI is not valid; percent-encode user name and password (urllib.parse.quote_plus)"
    return redact(str(error))
