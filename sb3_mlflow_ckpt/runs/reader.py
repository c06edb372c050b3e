"""Owns the `RunReader` protocol: all that the API, the pages and the CLI know of where runs are kept.

Never imports a store's client.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from sb3_mlflow_ckpt.errors import InvalidIdError
from sb3_mlflow_ckpt.layout import check_id, id_spellings
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, derived_status

Document: TypeAlias = dict[str, Any]
# A class with a method named `list` cannot say `list[...]` in its own annotations.
Documents: TypeAlias = list[Document]

SPARKLINE_POINTS = 48
RUNS_WITH_ITEMS = 64
"""Of how many runs a reader keeps the checkpoints: there may be thousands."""
RUNS_WITH_GLANCES = 4096


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

    def record(self, run_id: str) -> Document:
        """Return a run's record without its `checkpoint_paths`; raises as `get` does."""
        ...

    def checkpoints(self, run_id: str, *, before: int | None = None, limit: int | None = None) -> Documents:
        """Return items of `checkpoint_paths`, ascending by episode; raises as `get` does.

        Args:
            run_id: The id.
            before: Only episodes below this one.
            limit: Only so many, the highest.
        """
        ...

    def curve(self, run_id: str, points: int | None = None) -> Documents:
        """Return the points of a run's learning curve in the order in which they were made.

        Args:
            run_id: The id.
            points: At most so many, evenly spread, the first and the last among them; all where it is None.

        Raises:
            RunNotFoundError: There is no such run.
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...

    def version(self, run_id: str) -> str:
        """Return a text that is another one whenever what is shown of the run is; raises as `get` does.

        Asking for it reads neither checkpoints nor the curve.
        """
        ...

    def summaries(self) -> Documents:
        """Return the summary of every run (see `summaries.summarize`), in no order. They are not to be changed.

        What was read is kept, and only what has changed since is read again.

        Raises:
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...

    def glances(self, run_ids: Sequence[str]) -> dict[str, Glance]:
        """Return what a list shows beside the summaries of some runs; what has not changed is not read again.

        Raises:
            MirrorUnavailableError: The store is a server, and does not answer.
        """
        ...


@dataclass(frozen=True)
class Glance:
    """What a list shows of a run's checkpoints and curve.

    Attributes:
        checkpoints: How many the run has committed.
        resumable: How many of them are on disk or in a mirror.
        waiting: How many are on disk and in no mirror, although the run has a mirror for them.
        latest: The newest that is on disk or in a mirror, as an item of `checkpoint_paths`.
        rewards: `(num_timesteps, ep_rew_mean)` of at most `SPARKLINE_POINTS` points of the curve.
    """

    checkpoints: int = 0
    resumable: int = 0
    waiting: int = 0
    latest: Document | None = None
    rewards: tuple[tuple[int, float], ...] = ()


def summary(record: Mapping[str, Any], now: datetime | None = None, seen: datetime | None = None) -> Document:
    """Return a record as a list shows it: with its derived status.

    Args:
        record: The record.
        now: The present by the store's clock, where it has one.
        seen: When the store saw the last heartbeat, by the same clock.
    """
    return {**record, "status": derived_status(record, now, seen)}


def may_change_by_itself(status: str | None) -> bool:
    """Return whether a status, stored or derived, is one that time alone can change."""
    return status is not None and status not in TERMINAL_STATUSES


def part_of(items: Documents, before: int | None, limit: int | None) -> Documents:
    """Return the items of `checkpoint_paths` below an episode, and of those so many, the highest."""
    end = len(items) if before is None else bisect_left(items, before, key=lambda item: int(item["episode"]))
    return items[0 if limit is None else max(0, end - limit) : end]


def glance(summary: Mapping[str, Any], checkpoints: Sequence[Document], curve: Sequence[Document]) -> Glance:
    """Return what a list shows of a run's checkpoints and of a few points of its curve."""
    there = [item for item in checkpoints if item.get("state") != "pruned"]
    mirrors = summary.get("mirrors")
    is_mirrored = isinstance(mirrors, list) and "MLflow" in mirrors
    rewards = [(point["num_timesteps"], float(point["ep_rew_mean"])) for point in curve if _has_reward(point)]
    return Glance(
        checkpoints=len(checkpoints),
        resumable=len(there),
        waiting=sum(item.get("state") == "local" for item in there) if is_mirrored else 0,
        # The one that was saved last: a run that went back to an older one has lower numbers after higher ones.
        latest=max(there, key=lambda item: (str(item.get("timestamp")), item["episode"]), default=None),
        rewards=tuple(rewards),
    )


def _has_reward(point: Mapping[str, Any]) -> bool:
    value = point.get("ep_rew_mean")
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def spellings(run_id: str) -> tuple[str, ...]:
    """Return the ids that may be meant; none for one that cannot name a folder, since no run can have it."""
    try:
        return id_spellings(check_id(run_id, "run_id"))
    except InvalidIdError:
        return ()
