"""Owns what lists show of runs: a summary of each, and which of them a question asks for, in which order. Pure.

Every store hands out summaries, and this module alone filters, sorts and cuts them into pages, so that a page is the
same whatever the store.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sb3_mlflow_ckpt.errors import InvalidQueryError
from sb3_mlflow_ckpt.runs.document import STATUSES

LARGEST_PAGE = 500
DEFAULT_PAGE = 50
DEFAULT_SORT = "-started_at"

_FIELDS = (
    *("run_id", "agent_id", "name", "algo", "env_id", "status", "attempt", "parent", "root_run_id", "progress"),
    *("started_at", "heartbeat_at", "heartbeat_seconds", "last_step_at", "ended_at", "host", "mlflow", "mirrors"),
)
SOURCES = (*_FIELDS, "error.type", "error.message", "resume.exact", "config.seed", "sweep.id")
"""What of a record a summary is made of."""
_SEARCHED = ("name", "run_id", "agent_id", "algo", "env_id", "host")


def summarize(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lists show of a record: no configuration, no traceback, nothing that grows with the run's length."""
    summary = {key: record.get(key) for key in _FIELDS}
    error, resume, config, sweep = (_mapping(record.get(key)) for key in ("error", "resume", "config", "sweep"))
    summary["error"] = {key: error.get(key) for key in ("type", "message")} if error else None
    summary["exact"] = resume.get("exact") if resume else None
    summary["seed"] = config.get("seed")
    summary["sweep_id"] = sweep.get("id")
    return summary


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _progress(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda run: _mapping(run.get("progress")).get(key)


def _field(key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda run: run.get(key)


SORTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    **{key: _field(key) for key in ("started_at", "ended_at", "name", "agent_id", "algo", "env_id", "status")},
    **{key: _progress(key) for key in ("num_timesteps", "episode", "mean_reward", "best_mean_reward")},
}
"""What runs can be sorted by."""
_CHOICES = ("algo", "env_id", "agent_id")


@dataclass(frozen=True)
class RunQuery:
    """Which runs are asked for, and in which order.

    Attributes:
        status: Only these statuses; any where it is empty.
        algo: Only this algorithm, in whatever case.
        env_id: Only this environment.
        agent_id: Only this agent.
        root_run_id: Only the runs of this chain of resumes.
        sweep_id: Only the trials of this sweep.
        text: Words that must all occur in name, id, agent, algorithm, environment or host, in whatever case.
        sort: One of `SORTS`, with `-` before it for the greatest first. Runs without a value come last.

    Raises:
        InvalidQueryError: There is no such status or sort.
    """

    status: tuple[str, ...] = ()
    algo: str | None = None
    env_id: str | None = None
    agent_id: str | None = None
    root_run_id: str | None = None
    sweep_id: str | None = None
    text: str = ""
    sort: str = DEFAULT_SORT

    def __post_init__(self) -> None:
        unknown = [status for status in self.status if status not in STATUSES]
        if unknown:
            raise InvalidQueryError("status", f"there is no status {unknown[0]!r}; there are {', '.join(STATUSES)}")
        if self.sort.removeprefix("-") not in SORTS:
            raise InvalidQueryError("sort", f"runs cannot be sorted by {self.sort!r}, but by {', '.join(SORTS)}")

    def admits(self, run: Mapping[str, Any]) -> bool:
        """Return whether a run is one that is asked for, whatever its status."""
        return (
            (self.algo is None or str(run.get("algo")).casefold() == self.algo.casefold())
            and (self.env_id is None or run.get("env_id") == self.env_id)
            and (self.agent_id is None or run.get("agent_id") == self.agent_id)
            and (self.root_run_id is None or run.get("root_run_id") == self.root_run_id)
            and (self.sweep_id is None or run.get("sweep_id") == self.sweep_id)
            and (not self.text or self._found_in(run))
        )

    def _found_in(self, run: Mapping[str, Any]) -> bool:
        text = "\n".join(str(run[key]) for key in _SEARCHED if run.get(key)).casefold()
        # An id is also found as it is written with dashes.
        return all(word in text or word.replace("-", "") in text for word in self.text.casefold().split())

    @property
    def descending(self) -> bool:
        """Whether the greatest comes first."""
        return self.sort.startswith("-")

    def order(self, run: Mapping[str, Any]) -> tuple[int, Any, str]:
        """Return a run's place in the ascending order; the descending one is that from its end.

        Plain values, which Python compares quickly: a list of ten thousand runs is sorted for each page of it.
        """
        value = SORTS[self.sort.removeprefix("-")](run)
        # Numbers before texts: a record that somebody edited may hold either. What is neither comes last either way.
        if isinstance(value, str):
            return 1, value, str(run["run_id"])
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            return (2 if self.descending else 0), value, str(run["run_id"])
        return (0 if self.descending else 2), 0, str(run["run_id"])


@dataclass(frozen=True)
class Page:
    """A page of the runs that a query asks for.

    Attributes:
        items: The summaries.
        next_cursor: What the next page begins behind; None at the end.
        previous_cursor: What the page before begins behind: empty for the first page, None where this is the first.
        total: How many runs the query admits.
        first: The place of the first item among them, from 1; 0 for an empty page.
        statuses: How many runs of each status the rest of the query admits.
        choices: The values of `algo`, `env_id` and `agent_id` in the whole store, sorted.
    """

    items: Sequence[Mapping[str, Any]]
    next_cursor: str | None
    previous_cursor: str | None
    total: int
    first: int
    statuses: Mapping[str, int]
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)


def select(
    summaries: Iterable[Mapping[str, Any]], query: RunQuery, limit: int = DEFAULT_PAGE, cursor: str | None = None
) -> Page:
    """Return the page of the runs that a query asks for, behind a cursor.

    Runs that come or go between two pages shift nothing: a cursor names a place in the order, not a number.

    Raises:
        InvalidQueryError: The cursor is not one of this query's order, or the limit is out of bounds.
    """
    if not 1 <= limit <= LARGEST_PAGE:
        raise InvalidQueryError("limit", f"a page holds 1 to {LARGEST_PAGE} runs")
    every = list(summaries)
    found = [run for run in every if query.admits(run)]
    statuses = Counter(str(run["status"]) for run in found)
    chosen = [run for run in found if not query.status or run["status"] in query.status]
    chosen.sort(key=query.order)
    begin = 0
    if cursor:
        place = _place(cursor, query)
        if query.descending:
            begin = len(chosen) - bisect.bisect_left(chosen, place, key=query.order)
        else:
            begin = bisect.bisect_right(chosen, place, key=query.order)
    if query.descending:
        chosen.reverse()
    items = chosen[begin : begin + limit]
    before = None if begin == 0 else "" if begin <= limit else _cursor(chosen[begin - limit - 1], query)
    return Page(
        items=items,
        next_cursor=_cursor(items[-1], query) if begin + limit < len(chosen) else None,
        previous_cursor=before,
        total=len(chosen),
        first=begin + 1 if items else 0,
        statuses={status: statuses.get(status, 0) for status in STATUSES},
        choices={key: sorted({str(run[key]) for run in every if run.get(key)}) for key in _CHOICES},
    )


def _cursor(run: Mapping[str, Any], query: RunQuery) -> str:
    value = SORTS[query.sort.removeprefix("-")](run)
    # Where somebody edited a record there may be a list: it is ordered as if there were nothing.
    place = [query.sort, value if isinstance(value, (str, int, float)) else None, run["run_id"]]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _place(cursor: str, query: RunQuery) -> tuple[int, Any, str]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        sort, value, run_id = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if sort != query.sort or not isinstance(run_id, str) or isinstance(value, (dict, list)):
            raise ValueError("it is of another order")
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise InvalidQueryError("cursor", "it is not one that this list gave out; begin without it") from error
    key = sort.removeprefix("-")
    stand_in: dict[str, Any] = {"run_id": run_id, key: value, "progress": {key: value}}
    return query.order(stand_in)
