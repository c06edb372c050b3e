"""Owns what pages say of any run, in a list or alone: its name, status, progress and how long it took. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from sb3_mlflow_ckpt.runs.document import STATUSES, TERMINAL_STATUSES
from sb3_mlflow_ckpt.runs.reader import Glance
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.formats import Moment, mapping


@dataclass(frozen=True)
class Status:
    """A run's status.

    Attributes:
        name: One of `STATUSES`, or whatever somebody wrote into a record.
        kind: The same, `unknown` where it is none of them: what it looks like.
        note: What is missing of a stalled or lost run, before `since`.
        since: Since when.
    """

    name: str
    kind: str
    note: str = ""
    since: Moment | None = None


@dataclass(frozen=True)
class RunLink:
    """A run as others name it.

    Attributes:
        run_id: Its id, as it is.
        short: The beginning of its id.
        name: What people call it; the beginning of its id where nobody gave it a name.
        named: Whether somebody did.
        missing: Whether the store lacks it.
        episode: Of the checkpoint that was taken of it, where it is a parent.
    """

    run_id: str
    short: str
    name: str
    named: bool = False
    missing: bool = False
    episode: str = ""


@dataclass(frozen=True)
class SweepLink:
    """The sweep that a run is a trial of.

    Attributes:
        sweep_id: Its id.
        query: The query of the list that shows its trials alone.
    """

    sweep_id: str
    query: str


def sweep_link(sweep_id: Any) -> SweepLink | None:
    """Return the link to a sweep, or None for a run that is no trial."""
    if not isinstance(sweep_id, str) or not sweep_id:
        return None
    return SweepLink(sweep_id, f"?{urlencode({'sweep': sweep_id}, errors='replace')}")


@dataclass(frozen=True)
class Progress:
    """How far a run is: in environment steps; `percent` is None where there is no target."""

    done: str
    target: str
    percent: int | None


@dataclass(frozen=True)
class Span:
    """How long a run took: `taken`, or since when it has been running."""

    taken: str
    since: Moment | None


def run_link(run: Mapping[str, Any]) -> RunLink:
    """Return how a run is named."""
    run_id, name = str(run.get("run_id")), formats.string(run.get("name"))
    short = formats.short_id(run_id)
    return RunLink(run_id, short, formats.text(name) or short, name is not None, bool(run.get("missing")))


def parent_link(run: Mapping[str, Any]) -> RunLink | None:
    """Return the run and the episode that a run was resumed from."""
    parent = mapping(run.get("parent"))
    run_id = formats.string(parent.get("run_id"))
    if run_id is None:
        return None
    short = formats.short_id(run_id)
    return RunLink(run_id, short, short, episode=formats.count(parent.get("episode")))


def algo_name(value: Any) -> str:
    """Return an algorithm as it is written: PPO for ppo."""
    found = formats.text(value)
    return found.upper() if found.isascii() and found.isalnum() and found.islower() else found


def status_of(run: Mapping[str, Any]) -> Status:
    """Return a run's status with what is missing of it."""
    name = formats.text(run.get("status")) or "unknown"
    if name == "stalled":
        return Status(name, name, "No step", formats.moment(run.get("last_step_at")))
    if name == "lost":
        return Status(name, name, "No heartbeat", formats.moment(run.get("heartbeat_at")))
    return Status(name, name if name in STATUSES else "unknown")


def is_live(status: Status) -> bool:
    """Return whether something of a run may change soon."""
    return status.kind in ("running", "stalled")


def progress_of(progress: Mapping[str, Any]) -> Progress:
    """Return how far a run is."""
    done, target = formats.whole(progress.get("num_timesteps")), formats.whole(progress.get("total_timesteps"))
    percent = None
    if done is not None and target is not None and target > 0:
        percent = max(0, min(100, done * 100 // target))
    return Progress(formats.count(done), formats.count(target), percent)


def span_of(run: Mapping[str, Any]) -> Span:
    """Return how long a run took, or since when it runs: a lost one until its last heartbeat."""
    started = run.get("started_at")
    if run.get("status") in TERMINAL_STATUSES:
        return Span(formats.between(started, run.get("ended_at") or run.get("heartbeat_at")), None)
    if run.get("status") == "lost":
        return Span(formats.between(started, run.get("heartbeat_at")), None)
    return Span("", formats.moment(started))


def mirror_state(run: Mapping[str, Any], glance: Glance) -> tuple[str, str]:
    """Return in words whether a run's checkpoints are in MLflow, and which kind of state that is."""
    mirrors = run.get("mirrors")
    if not isinstance(mirrors, list) or "MLflow" not in mirrors or not glance.checkpoints:
        return "", "none"
    if glance.waiting:
        return f"{glance.waiting} waiting", "waiting"
    return "mirrored", "all"
