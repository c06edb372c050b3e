"""Owns what the list of runs shows: summaries and glances made into rows, filters into addresses. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.reader import Glance
from sb3_mlflow_ckpt.runs.summaries import DEFAULT_SORT, Page, RunQuery
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.charts import sparkline
from sb3_mlflow_ckpt.web.formats import Moment, mapping
from sb3_mlflow_ckpt.web.run_facts import (
    Progress,
    RunLink,
    Span,
    Status,
    SweepLink,
    algo_name,
    is_live,
    mirror_state,
    parent_link,
    progress_of,
    run_link,
    span_of,
    status_of,
    sweep_link,
)

COLUMNS: Mapping[str, str] = {
    "status": "Status",
    "name": "Run",
    "algo": "Algorithm",
    "mean_reward": "Reward",
    "num_timesteps": "Progress",
    "started_at": "Started",
}
"""The columns that a list can be sorted by, with what stands over them."""
_GREATEST_FIRST = ("mean_reward", "num_timesteps", "started_at")
_FILTERS = {"algo": "Algorithm", "env": "Environment", "agent": "Agent"}
_CHOICES = {"algo": "algo", "env": "env_id", "agent": "agent_id"}


@dataclass(frozen=True)
class RunRow:
    """One run of the list."""

    run: RunLink
    status: Status
    agent: str
    sweep: SweepLink | None
    algo: str
    env: str
    rewards: Markup
    last: str
    best: str
    progress: Progress
    checkpoints: int
    latest_episode: str
    latest_at: Moment | None
    mirror: str
    mirror_kind: str
    parent: RunLink | None
    started: Moment | None
    span: Span


@dataclass(frozen=True)
class ListQuery:
    """The state of a list as its address tells it."""

    q: str = ""
    status: tuple[str, ...] = ()
    algo: str = ""
    env: str = ""
    agent: str = ""
    sweep: str = ""
    sort: str = DEFAULT_SORT
    cursor: str = ""

    def asked(self) -> RunQuery:
        """Return the question to the store; raises InvalidQueryError."""
        return RunQuery(
            self.status,
            self.algo or None,
            self.env or None,
            self.agent or None,
            sweep_id=self.sweep or None,
            text=self.q,
            sort=self.sort,
        )

    @property
    def is_filtered(self) -> bool:
        """Return whether it leaves anything out."""
        return bool(self.q or self.status or self.algo or self.env or self.agent or self.sweep)

    def address(self, **changes: Any) -> str:
        """Return the query of an address with some changes, on the first page unless a cursor is among them."""
        new = replace(self, **{"cursor": "", **changes})
        given = [(name, getattr(new, name)) for name in ("q", "algo", "env", "agent", "sweep", "cursor")]
        pairs = [(name, value) for name, value in given if value]
        pairs += [("status", status) for status in new.status]
        pairs += [("sort", new.sort)] if new.sort != DEFAULT_SORT else []
        return f"?{urlencode(pairs, errors='replace')}" if pairs else ""


@dataclass(frozen=True)
class Chip:
    """A status to filter by."""

    status: Status
    count: int
    active: bool
    query: str


@dataclass(frozen=True)
class Column:
    """The head of a column: where a click on it leads, and the value of `aria-sort`."""

    key: str
    title: str
    query: str
    order: str


@dataclass(frozen=True)
class Choice:
    """A filter with its values: what is sent, what is shown, whether it is chosen."""

    name: str
    title: str
    options: tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True)
class RunList:
    """The page of all runs."""

    query: ListQuery
    rows: tuple[RunRow, ...]
    chips: tuple[Chip, ...]
    columns: Mapping[str, Column]
    choices: tuple[Choice, ...]
    first: int
    last: int
    total: int
    previous: str | None
    next: str | None
    is_empty: bool
    is_live: bool


def run_list(page: Page, glances: Mapping[str, Glance], query: ListQuery) -> RunList:
    """Return the list of a page of runs."""
    rows = tuple(run_row(run, glances.get(run["run_id"], Glance())) for run in page.items)
    return RunList(
        query=query,
        rows=rows,
        chips=tuple(_chip(name, page.statuses.get(name, 0), query) for name in STATUSES),
        columns={key: _column(key, query) for key in COLUMNS},
        choices=tuple(_choice(name, page.choices, query) for name in _FILTERS),
        first=page.first,
        last=page.first + len(rows) - 1 if rows else 0,
        total=page.total,
        previous=None if page.previous_cursor is None else query.address(cursor=page.previous_cursor),
        next=None if page.next_cursor is None else query.address(cursor=page.next_cursor),
        is_empty=not any(page.choices.values()) and not page.total and not query.is_filtered,
        is_live=any(is_live(row.status) for row in rows),
    )


def run_row(run: Mapping[str, Any], glance: Glance) -> RunRow:
    """Return one run of the list."""
    latest, progress = glance.latest or {}, mapping(run.get("progress"))
    mirror, kind = mirror_state(run, glance)
    rewards = [reward for _, reward in glance.rewards]
    return RunRow(
        run=run_link(run),
        status=status_of(run),
        agent=formats.text(run.get("agent_id")),
        sweep=sweep_link(run.get("sweep_id")),
        algo=algo_name(run.get("algo")),
        env=formats.text(run.get("env_id")),
        rewards=sparkline(glance.rewards),
        # A record is renewed less often than its curve, and older ones do not tell the best.
        last=formats.reward(progress.get("mean_reward")) or formats.reward(next(iter(rewards[-1:]), None)),
        best=formats.reward(progress.get("best_mean_reward")) or formats.reward(max(rewards, default=None)),
        progress=progress_of(progress),
        checkpoints=glance.checkpoints,
        latest_episode=formats.count(latest.get("episode")),
        latest_at=formats.moment(latest.get("timestamp")),
        mirror=mirror,
        mirror_kind=kind,
        parent=parent_link(run),
        started=formats.moment(run.get("started_at")),
        span=span_of(run),
    )


def _chip(name: str, count: int, query: ListQuery) -> Chip:
    active = name in query.status
    chosen = tuple(status for status in STATUSES if (status in query.status) is not (status == name))
    return Chip(Status(name, name), count, active, query.address(status=chosen))


def _column(key: str, query: ListQuery) -> Column:
    first, second = (f"-{key}", key) if key in _GREATEST_FIRST else (key, f"-{key}")
    order = {key: "ascending", f"-{key}": "descending"}.get(query.sort, "")
    return Column(key, COLUMNS[key], query.address(sort=second if query.sort == first else first), order)


def _choice(name: str, choices: Mapping[str, Sequence[str]], query: ListQuery) -> Choice:
    chosen, values = getattr(query, name), list(choices.get(_CHOICES[name], ()))
    if chosen and chosen not in values:
        values.insert(0, chosen)
    options = tuple((value, formats.text(value), value == chosen) for value in values)
    return Choice(name, _FILTERS[name], options)
