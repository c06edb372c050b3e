"""Owns what the pages show of runs: documents of a store turned into texts, links and flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from markupsafe import Markup

from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.reader import Glance
from sb3_mlflow_ckpt.runs.summaries import Page, RunQuery
from sb3_mlflow_ckpt.web import scales
from sb3_mlflow_ckpt.web.charts import sparkline
from sb3_mlflow_ckpt.web.formats import Moment, count, moment, reward, short_id, span, text

COLUMNS = (
    ("status", "Status", "status"),
    ("name", "Run", "name"),
    ("algo", "Algorithm and environment", "algo"),
    ("reward", "Mean reward", "-mean_reward"),
    ("progress", "Progress", "-num_timesteps"),
    ("checkpoints", "Checkpoints", None),
    ("started", "Started", "-started_at"),
)
"""A list's columns: their key, heading, and what a click on it sorts by first."""


class Links:
    """Where the pages and the API are.

    Args:
        root: Where a reverse proxy has put them; empty for its root.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def static(self, name: str) -> str:
        """Return the address of a file of the pages."""
        return f"{self._root}/static/{name}"

    def list(self, query: RunQuery | None = None, **changes: Any) -> str:
        """Return the address of the list, with a query of which some fields are changed."""
        return f"{self._root}/training{_query_string(query, changes)}"

    def run(self, run_id: Any, anchor: str = "") -> str:
        """Return the address of a run's page."""
        return f"{self._root}/training/{quote(str(run_id), safe='')}" + (f"#{anchor}" if anchor else "")

    def checkpoints(self, run_id: Any, before: int) -> str:
        """Return the address of a run's page with the checkpoints below an episode."""
        return f"{self.run(run_id)}?before={before}#checkpoints"

    def compare(self, run_ids: Sequence[str] = ()) -> str:
        """Return the address of the comparison of some runs."""
        query = urlencode([("run", run_id) for run_id in run_ids])
        return f"{self._root}/training/compare" + (f"?{query}" if query else "")

    def api(self, path: str = "") -> str:
        """Return an address of the API; of the page that describes it where the path is empty."""
        return f"{self._root}/api{path}"

    def download(self, run_id: Any, episode: Any) -> str:
        """Return the address of a checkpoint's zip."""
        return self.api(f"/training-runs/{quote(str(run_id), safe='')}/checkpoints/{episode}/download")


def _query_string(query: RunQuery | None, changes: Mapping[str, Any]) -> str:
    query = query or RunQuery()
    whole = {
        "q": query.text,
        "status": query.status,
        "algo": query.algo,
        "env": query.env_id,
        "agent": query.agent_id,
        "sort": query.sort if query.sort != RunQuery.sort else None,
        **changes,
    }
    listed = [(key, value if isinstance(value, tuple) else (value,)) for key, value in whole.items()]
    items = [(key, item) for key, values in listed for item in values if item]
    return f"?{urlencode(items)}" if items else ""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        steps: Environment steps.
        target: The target; None where it is not known.
        percent: Of the target, 0 to 100; None where it is not known.
    """

    steps: str
    target: str | None
    percent: int | None


def progress_of(run: Mapping[str, Any]) -> Progress:
    """Return how far a run is."""
    found = mapping(run.get("progress"))
    done, target = scales.number(found.get("num_timesteps")), scales.number(found.get("total_timesteps"))
    percent = min(100, int(100 * done / target)) if done is not None and target and done >= 0 and target > 0 else None
    return Progress(count(found.get("num_timesteps")), count(found["total_timesteps"]) if target else None, percent)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a value if it is a mapping, an empty one if not: a record may have been edited."""
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Life:
    """A run's status, and what it is judged by.

    Attributes:
        status: The derived status.
        since: What the status is about: "Heartbeat", "No step since", "No heartbeat since", "Ended".
        at: When that was.
    """

    status: str
    since: str = ""
    at: Moment | None = None


def life_of(run: Mapping[str, Any]) -> Life:
    """Return a run's status and by what it is judged."""
    status = str(run.get("status"))
    said, key = {
        "running": ("Heartbeat", "heartbeat_at"),
        "stalled": ("No step since", "last_step_at"),
        "lost": ("No heartbeat since", "heartbeat_at"),
    }.get(status, ("Ended", "ended_at"))
    return Life(status if status in STATUSES else text(status), said, moment(run.get(key)))


@dataclass(frozen=True)
class Mirrored:
    """Whether a run's checkpoints are in its mirror.

    Attributes:
        state: `all`, `waiting` or `none`.
        words: In words.
    """

    state: str
    words: str


def mirrored_of(run: Mapping[str, Any], glance: Glance) -> Mirrored:
    """Return whether a run's checkpoints are in its mirror."""
    if "MLflow" not in (run.get("mirrors") or ()):
        return Mirrored("none", "no mirror")
    if not glance.resumable:
        return Mirrored("none", "nothing to mirror")
    return (
        Mirrored("waiting", f"{count(glance.waiting)} not mirrored")
        if glance.waiting
        else Mirrored("all", "all mirrored")
    )


@dataclass(frozen=True)
class RunRow:
    """A run in the list."""

    run_id: str
    short_id: str
    url: str
    name: str | None
    agent: str
    algo: str
    env: str
    life: Life
    progress: Progress
    last_reward: str
    best_reward: str
    sparkline: Markup
    checkpoints: int
    latest: str | None
    latest_at: Moment | None
    mirrored: Mirrored
    parent: tuple[str, str] | None
    started: Moment | None
    lasted: str | None
    error: str | None


def run_row(run: Mapping[str, Any], glance: Glance, links: Links) -> RunRow:
    """Return a run as the list shows it."""
    progress, error = mapping(run.get("progress")), mapping(run.get("error"))
    rewards = [value for _, value in glance.rewards]
    best = progress.get("best_mean_reward")
    return RunRow(
        run_id=str(run["run_id"]),
        short_id=short_id(run["run_id"]),
        url=links.run(run["run_id"]),
        name=text(run["name"]) if run.get("name") else None,
        agent=text(run.get("agent_id")),
        algo=text(run.get("algo")),
        env=text(run.get("env_id")),
        life=life_of(run),
        progress=progress_of(run),
        last_reward=reward(progress.get("mean_reward")),
        best_reward=reward(best if best is not None else max(rewards, default=None)),
        sparkline=sparkline(glance.rewards),
        checkpoints=glance.checkpoints,
        latest=count(glance.latest.get("episode")) if glance.latest else None,
        latest_at=moment(glance.latest.get("timestamp")) if glance.latest else None,
        mirrored=mirrored_of(run, glance),
        parent=parent_of(run, links),
        started=moment(run.get("started_at")),
        lasted=lasted(run),
        error=text(f"{error.get('type')}: {error.get('message')}") if error else None,
    )


def parent_of(run: Mapping[str, Any], links: Links) -> tuple[str, str] | None:
    """Return what a run was resumed from in words, and the address of that."""
    parent = mapping(run.get("parent"))
    if not parent.get("run_id"):
        return None
    episode = parent.get("episode")
    words = f"episode {count(episode)} of {short_id(parent['run_id'])}"
    return words, links.run(parent["run_id"], f"ep-{episode}" if isinstance(episode, int) else "")


def lasted(run: Mapping[str, Any]) -> str | None:
    """Return how long a run lasted; None while it runs."""
    if run.get("ended_at"):
        return span(run.get("started_at"), run["ended_at"])
    return span(run.get("started_at"), run.get("heartbeat_at")) if run.get("status") == "lost" else None


@dataclass(frozen=True)
class Heading:
    """A column's heading.

    Attributes:
        key: The column's.
        title: What it says.
        url: The list sorted by it; None where it cannot be.
        order: `ascending`, `descending`, or None where the list is sorted by another.
    """

    key: str
    title: str
    url: str | None
    order: str | None


@dataclass(frozen=True)
class Chip:
    """A status to filter by: a link that adds it to those that are shown, or takes it away."""

    status: str
    count: int
    url: str
    chosen: bool


@dataclass(frozen=True)
class ListView:
    """The list page."""

    rows: Sequence[RunRow]
    query: RunQuery
    headings: Sequence[Heading]
    chips: Sequence[Chip]
    choices: Mapping[str, Sequence[str]]
    first: int
    last: int
    total: int
    is_empty: bool
    is_filtered: bool
    next_url: str | None
    previous_url: str | None
    clear_url: str = field(default="")


def list_view(page: Page, glances: Mapping[str, Glance], query: RunQuery, links: Links) -> ListView:
    """Return what the list page shows."""
    rows = [run_row(run, glances.get(run["run_id"], Glance()), links) for run in page.items]
    every = sum(page.statuses.values())
    filtered = bool(query.status or query.algo or query.env_id or query.agent_id or query.text)
    return ListView(
        rows=rows,
        query=query,
        headings=[_heading(key, title, sort, query, links) for key, title, sort in COLUMNS],
        chips=[_chip(status, found, query, links) for status, found in page.statuses.items()],
        choices={key: [value for value in values if value] for key, values in page.choices.items()},
        first=page.first,
        last=page.first + len(rows) - 1 if rows else 0,
        total=page.total,
        is_empty=not any(page.choices.values()) and not every,
        is_filtered=filtered,
        next_url=links.list(query, cursor=page.next_cursor) if page.next_cursor else None,
        previous_url=links.list(query, cursor=page.previous_cursor) if page.previous_cursor is not None else None,
        clear_url=links.list(RunQuery(sort=query.sort)),
    )


def _heading(key: str, title: str, sort: str | None, query: RunQuery, links: Links) -> Heading:
    if sort is None:
        return Heading(key, title, None, None)
    own = query.sort.removeprefix("-") == sort.removeprefix("-")
    other_way = query.sort.removeprefix("-") if query.sort.startswith("-") else f"-{query.sort}"
    order = ("descending" if query.sort.startswith("-") else "ascending") if own else None
    wanted = other_way if own else sort
    return Heading(key, title, links.list(query, sort=None if wanted == RunQuery.sort else wanted), order)


def _chip(status: str, found: int, query: RunQuery, links: Links) -> Chip:
    chosen = status in query.status
    others = tuple(name for name in query.status if name != status)
    return Chip(status, found, links.list(query, status=others if chosen else (*others, status)), chosen)
