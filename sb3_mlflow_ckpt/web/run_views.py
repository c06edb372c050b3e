"""Owns what a run's own page shows: its record, curve, kin and configuration made into texts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sb3_mlflow_ckpt.runs.comparison import changes_from_parent, flat_config
from sb3_mlflow_ckpt.runs.lineage import Lineage, Segment
from sb3_mlflow_ckpt.runs.reader import Document
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.charts import reward_chart
from sb3_mlflow_ckpt.web.checkpoint_views import CheckpointList
from sb3_mlflow_ckpt.web.documents import mlflow_url
from sb3_mlflow_ckpt.web.formats import Moment, mapping
from sb3_mlflow_ckpt.web.run_facts import (
    Progress,
    RunLink,
    Span,
    Status,
    SweepLink,
    algo_name,
    is_live,
    parent_link,
    progress_of,
    run_link,
    span_of,
    status_of,
    sweep_link,
)
from sb3_mlflow_ckpt.web.scales import number, spread

_TABLE_ROWS = 60
_TOP_GROUP = "settings"


@dataclass(frozen=True)
class Fact:
    """A line about a run; `mono` where it is an id, a path or a command."""

    name: str
    value: str
    mono: bool = False


@dataclass(frozen=True)
class Kin:
    """A run in the tree of resumes: `from_episode` is the parent's checkpoint that it went on from."""

    run: RunLink
    status: Status | None
    from_episode: str
    is_this: bool = False


@dataclass(frozen=True)
class Change:
    """One setting that a run changed of its parent's."""

    key: str
    before: str
    after: str


@dataclass(frozen=True)
class Failure:
    """What ended a failed run."""

    type: str
    message: str
    traceback: str


@dataclass(frozen=True)
class CurveRow:
    """One point of the curve in numbers."""

    run: str
    timesteps: str
    episode: str
    reward: str


@dataclass(frozen=True)
class RunPage:
    """The page of one run."""

    run: RunLink
    title: str
    status: Status
    live: bool
    heartbeat: Moment | None
    started: Moment | None
    ended: Moment | None
    span: Span
    algo: str
    env: str
    agent: str
    sweep: SweepLink | None
    progress: Progress
    episodes: str
    speed: str
    last: str
    best: str
    parent: RunLink | None
    exactness: str
    mlflow: str | None
    facts: tuple[Fact, ...]
    chart: Markup
    curve: tuple[CurveRow, ...]
    checkpoints: CheckpointList
    kin: tuple[Kin, ...]
    changes: tuple[Change, ...]
    config: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    versions: tuple[tuple[str, str], ...]
    command: str
    error: Failure | None


def run_page(
    record: Document,
    checkpoints: CheckpointList,
    items: Sequence[Document],
    segments: Sequence[Segment],
    line: Lineage | None,
    mlflow_ui_url: str | None,
) -> RunPage:
    """Return the page of a run.

    Args:
        record: Its record.
        checkpoints: What is shown of its checkpoints.
        items: Those that are marked in the chart.
        segments: The curve, ancestors first.
        line: Its kin; None where they are not known.
        mlflow_ui_url: Where MLflow's pages are.
    """
    progress, run = mapping(record.get("progress")), run_link(record)
    algo, env = algo_name(record.get("algo")), formats.text(record.get("env_id"))
    status = status_of(record)
    rewards = [found for point in (segments[-1].points if segments else ()) if (found := _reward(point)) is not None]
    return RunPage(
        run=run,
        title=run.name if run.named else " on ".join(filter(None, (algo, env))) or run.short,
        status=status,
        live=is_live(status),
        heartbeat=formats.moment(record.get("heartbeat_at")) if is_live(status) else None,
        started=formats.moment(record.get("started_at")),
        ended=formats.moment(record.get("ended_at")),
        span=span_of(record),
        algo=algo,
        env=env,
        agent=formats.text(record.get("agent_id")),
        sweep=sweep_link(mapping(record.get("sweep")).get("id")),
        progress=progress_of(progress),
        episodes=formats.count(progress.get("episode")),
        speed=formats.count(progress.get("steps_per_second")),
        # A record is renewed less often than its curve, and older ones do not tell the best.
        last=formats.reward(progress.get("mean_reward")) or formats.reward(next(iter(rewards[-1:]), None)),
        best=formats.reward(progress.get("best_mean_reward")) or formats.reward(max(rewards, default=None)),
        parent=parent_link(record),
        exactness=exactness(record),
        mlflow=mlflow_url(record, mlflow_ui_url),
        facts=facts(record),
        chart=reward_chart(segments, items),
        curve=curve_rows(segments),
        checkpoints=checkpoints,
        kin=kin(line, record),
        changes=changes(record),
        config=config_groups(record.get("config")),
        versions=tuple((formats.text(key), formats.text(value)) for key, value in _pairs(record.get("versions"))),
        command=formats.text(record.get("command")),
        error=failure(record),
    )


def facts(record: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Return where and from what a run was started."""
    git, host, pid = mapping(record.get("git")), formats.text(record.get("host")), formats.text(record.get("pid"))
    commit = formats.text(git.get("commit"))[:12]
    attempt = formats.whole(record.get("attempt"))
    found = (
        Fact("Host", host, mono=True),
        Fact("Process", pid, mono=True),
        Fact("Commit", f"{commit} + changes" if commit and git.get("dirty") is True else commit, mono=True),
        Fact("Seed", formats.text(mapping(record.get("config")).get("seed")), mono=True),
        Fact("Attempt", formats.count(attempt) if attempt is not None and attempt > 1 else ""),
    )
    return tuple(fact for fact in found if fact.value)


def exactness(record: Mapping[str, Any]) -> str:
    """Return whether a resumed run continues its parent step by step, and if not, why."""
    resume = mapping(record.get("resume"))
    if resume.get("exact") is True:
        return "Exact continuation"
    if resume.get("exact") is False:
        reason = formats.text(resume.get("reason"))
        return f"Not an exact continuation: {reason}" if reason else "Not an exact continuation"
    return ""


def kin(line: Lineage | None, record: Mapping[str, Any]) -> tuple[Kin, ...]:
    """Return the chain from the first run over this one to those that went on from it; empty for a run alone."""
    if line is None or not (line.ancestors or line.children):
        return ()
    above = [_kin(run) for run in line.ancestors]
    return (*above, _kin(record, is_this=True), *(_kin(run) for run in line.children))


def _kin(run: Mapping[str, Any], *, is_this: bool = False) -> Kin:
    parent = parent_link(run)
    status = None if run.get("missing") else status_of(run)
    return Kin(run_link(run), status, parent.episode if parent else "", is_this)


def changes(record: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return what a run changed of its parent's configuration."""
    found = changes_from_parent(record)
    return tuple(Change(formats.text(row.key), *map(formats.setting, row.values)) for row in found)


def config_groups(config: Any) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return a configuration flat, in groups by the first part of nested keys, plain settings first."""
    groups: dict[str, list[tuple[str, str]]] = {_TOP_GROUP: []}
    try:
        flat = flat_config(config)
    except (TypeError, RecursionError):  # Keys that cannot be sorted: somebody edited the record.
        flat = dict(mapping(config))
    for key, value in flat.items():
        group, dot, rest = str(key).partition(".")
        groups.setdefault(formats.text(group) if dot else _TOP_GROUP, []).append(
            (formats.text(rest if dot else str(key)), formats.setting(value))
        )
    return tuple((name, tuple(rows)) for name, rows in groups.items() if rows)


def curve_rows(segments: Sequence[Segment]) -> tuple[CurveRow, ...]:
    """Return the curve in numbers, a few rows a run."""
    rows = []
    for segment in segments:
        rows += [
            CurveRow(
                formats.short_id(segment.run_id),
                formats.count(point.get("num_timesteps")),
                formats.count(point.get("episode")),
                formats.reward(point.get("ep_rew_mean")),
            )
            for point in spread(list(segment.points), _TABLE_ROWS)
        ]
    return tuple(rows)


def failure(record: Mapping[str, Any]) -> Failure | None:
    """Return what ended a run, if anything did."""
    error = mapping(record.get("error"))
    if not error:
        return None
    return Failure(
        formats.text(error.get("type")) or "Error",
        formats.block(error.get("message")),
        formats.block(error.get("traceback")),
    )


def _reward(point: Mapping[str, Any]) -> float | None:
    return number(point.get("ep_rew_mean"))


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []
