"""Owns how runs lie in MongoDB: collections, indexes, what a value becomes there, and the connection.

- `training_runs`: the records, `_id` is the run id;
- `training_checkpoints`: the items of `checkpoint_paths`, one for each (run_id, episode);
- `training_metrics`: the learning curves, one document for each (run_id, time, num_timesteps).

A record's size so does not grow with the run's length. Never imports stable-baselines3.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from pymongo import ASCENDING, DESCENDING, IndexModel, MongoClient, WriteConcern, timeout
from pymongo.database import Database
from pymongo.errors import PyMongoError

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.runs.document import redact

RUNS = "training_runs"
CHECKPOINTS = "training_checkpoints"
METRICS = "training_metrics"
ATTEMPT = "attempt"
"""The number of the attempt that wrote a document."""
SEEN_AT = "seen_at"
"""When a trainer last gave a sign of life, by the server's clock: hosts' clocks may be wrong."""
UPDATED_AT = "updated_at"
"""When anything of a run was last written, by the server's clock; written last of all."""
CURVE_END = "curve_end"
"""What a record's document says of its curve: `time`, `num_timesteps` and `END` of the last point."""
LEVEL = "%level"
"""The level of a curve's point; no key of a point is encoded as this."""
END = "%end"
"""The offset behind a point's line in the run folder's `metrics.jsonl`."""
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
_NO_UTF8 = "%text"
_EMPTY_KEY = "%"
# Halves of surrogate pairs, which stand for the bytes of file names that are no text.
_UNPAIRED = re.compile("[\ud800-\udfff]")
BOOKKEEPING = frozenset({"_id", "run_id", "schema_version", ATTEMPT, LEVEL, END})
"""A document's own keys beside those of a checkpoint's entry or a point."""


def encode_key(key: str) -> str:
    """Return a key as every MongoDB version can store it: percent-encoded where it has a meaning of its own."""
    if not key:
        return _EMPTY_KEY
    key = key.replace("%", "%25").replace(".", "%2E").replace("\0", "%00")
    key = _UNPAIRED.sub(lambda match: f"%u{ord(match[0]):04X}", key)
    return "%24" + key[1:] if key.startswith("$") else key


def decode_key(key: str) -> str:
    """Return the key that `encode_key` was given."""
    if key == _EMPTY_KEY:
        return ""
    return re.sub("%(?:(25|2E|00|24)|u(D[89A-F][0-9A-F]{2}))", lambda match: chr(int(match[1] or match[2], 16)), key)


def encode(value: Any) -> Any:
    """Return a JSON value as MongoDB can store it.

    Keys are safe; there is no NaN and no infinity, no integer above 64 bits, and no text that UTF-8 lacks.
    """
    if isinstance(value, Mapping):
        return {encode_key(str(key)): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and value not in _INT64:
        return {_BIG_INTEGER: str(value)}
    if isinstance(value, str) and _UNPAIRED.search(value):
        return {_NO_UTF8: json.dumps(value)}
    return value


def decode(value: Any) -> Any:
    """Return the JSON value that `encode` was given."""
    if isinstance(value, Mapping):
        if value.keys() in ({_BIG_INTEGER}, {_NO_UTF8}):
            return _decode_scalar(*value.items())
        return {decode_key(key): decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    # bson's Int64 is a subclass of int.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _decode_scalar(item: tuple[str, Any]) -> Any:
    kind, text = item
    try:
        found = int(text) if kind == _BIG_INTEGER else json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text  # Somebody else wrote it.
    return found if isinstance(found, (int, str)) else text


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
        RUNS: [*(IndexModel([*keys, newest]) for keys in filters), IndexModel([(UPDATED_AT, ASCENDING)])],
        CHECKPOINTS: [IndexModel([("run_id", ASCENDING), ("episode", ASCENDING)], unique=True)],
        METRICS: [IndexModel(points, unique=True), IndexModel([("run_id", ASCENDING), (LEVEL, ASCENDING)])],
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


def _parse_problem(error: Exception, uri: str) -> str:
    """Return what is wrong with a URI, in pymongo's words unless they quote a part of the credentials."""
    credentials = re.search("//(.*)@", uri, flags=re.DOTALL)
    secrets = set(re.findall(r"\w+", credentials[1])) if credentials else set()
    if secrets & set(re.findall(r"\w+", str(error))):
        return "the URI is not valid; percent-encode user name and password (urllib.parse.quote_plus)"
    return redact(str(error))
