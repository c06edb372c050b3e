"""Owns the `RunReader` protocol: all that the API, the pages and the CLI know of where runs are kept.

Never imports a store's client.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from sb3_mlflow_ckpt.errors import InvalidIdError
from sb3_mlflow_ckpt.layout import check_id, id_spellings
from sb3_mlflow_ckpt.runs.document import derived_status

Document: TypeAlias = dict[str, Any]
# A class with a method named `list` cannot say `list[...]` in its own annotations.
Documents: TypeAlias = list[Document]


class RunReader(Protocol):
    """A store of run records. Every status that it shows is the derived one: `lost` for a stale heartbeat."""

    def get(self, run_id: str) -> Document:
        """Return a run's record with its `checkpoint_paths`, ascending by episode.

        Args:
            run_id: The id; a UUID with or without its dashes.

        Raises:
            RunNotFoundError: There is no such run, or its record cannot be read.
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        """Return the records without `checkpoint_paths`, newest `started_at` first.

        Args:
            agent_id: Only this agent's runs.
            status: Only runs that have this derived status.
            limit: The most to return.

        Raises:
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...

    def curve(self, run_id: str) -> Documents:
        """Return the points of a run's learning curve in the order in which they were made.

        Raises:
            RunNotFoundError: There is no such run.
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...


def summary(record: Mapping[str, Any], now: datetime | None = None, seen: datetime | None = None) -> Document:
    """Return a record as a list shows it: with its derived status.

    Args:
        record: The record.
        now: The present by the store's clock, where it has one.
        seen: When the store saw the last heartbeat, by the same clock.
    """
    return {**record, "status": derived_status(record, now, seen)}


def spellings(run_id: str) -> tuple[str, ...]:
    """Return the ids that may be meant; none for one that cannot name a folder, since no run can have it."""
    try:
        return id_spellings(check_id(run_id, "run_id"))
    except InvalidIdError:
        return ()
