"""Owns what a run's page and a comparison show: documents of a store turned into texts, links and flags. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sb3_mlflow_ckpt.resume_commands import Program, Source, given_again, resume_command
from sb3_mlflow_ckpt.runs.comparison import Difference, changes_from_parent, config_differences, flat_config
from sb3_mlflow_ckpt.runs.lineage import Lineage, Segment
from sb3_mlflow_ckpt.runs.reader import Document, Glance
from sb3_mlflow_ckpt.web.charts import Series, comparison_chart, reward_chart
from sb3_mlflow_ckpt.web.checkpoint_files import Check
from sb3_mlflow_ckpt.web.formats import Moment, count, lines, moment, reward, setting, short_id, size, text
from sb3_mlflow_ckpt.web.views import (
    Life,
    Links,
    Progress,
    RunRow,
    lasted,
    life_of,
    mapping,
    parent_of,
    progress_of,
    run_row,
)

FORMS: tuple[tuple[str, Program, Source], ...] = (
    ("trainer-path", "trainer", "path"),
    ("trainer-uri", "trainer", "uri"),
    ("mlflow-path", "mlflow", "path"),
    ("mlflow-uri", "mlflow", "uri"),
)
"""The forms of a resume command: key, program and source."""
_POINTS_IN_TABLE = 50


@dataclass(frozen=True)
class Command:
    """A resume command in one form.

    Attributes:
        form: Which: a key of `FORMS`.
        words: The command; None where it is not possible.
        missing: Why it is not possible.
    """

    form: str
    words: str | None
    missing: str


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint in the list of a run's page."""

    episode: int
    shown_episode: str
    anchor: str
    trigger: str
    reward: str
    steps: str
    size: str
    saved: Moment | None
    state: str
    pinned: bool
    check: str
    problem: str | None
    path: str
    uri: str | None
    commands: Sequence[Command]
    download: str | None

    @property
    def resumable(self) -> bool:
        """Whether there is a command that resumes it, and nothing is known against it."""
        return self.check != "corrupt" and any(command.words for command in self.commands)


def checkpoint_row(run: Document, item: Document, check: Check | None, links: Links) -> CheckpointRow:
    """Return a checkpoint as a run's page shows it.

    Args:
        run: The run's record.
        item: The item of `checkpoint_paths`.
        check: What is known of its file on this machine; None where nothing is known yet.
        links: Where the pages are.
    """
    episode = item["episode"]
    here = check is None or check.state != "absent"
    return CheckpointRow(
        episode=episode,
        shown_episode=count(episode),
        anchor=f"ep-{episode}",
        trigger=text(item.get("trigger")),
        reward=reward(item.get("mean_reward")),
        steps=count(item.get("num_timesteps")),
        size=size(item.get("bytes")),
        saved=moment(item.get("timestamp")),
        state=str(item.get("state")),
        pinned=item.get("pinned") is True,
        check=_check_state(item, check),
        problem=text(check.problem) if check is not None and check.problem else None,
        path=text(item.get("path")),
        uri=text(item["uri"]) if item.get("uri") else None,
        commands=[_command(run, item, *form) for form in FORMS],
        download=links.download(run["run_id"], episode) if item.get("on_disk") and here else None,
    )


def _check_state(item: Document, check: Check | None) -> str:
    if item.get("state") == "pruned":
        return "pruned"
    if not item.get("on_disk"):
        return "elsewhere"
    return "unchecked" if check is None else check.state


def _command(run: Document, item: Document, form: str, program: Program, source: Source) -> Command:
    words = resume_command(run, item, program=program, source=source)
    if source == "uri":
        missing = "No copy in MLflow"
    else:
        missing = "Not on disk any more" if not item.get("on_disk") else "The environment is not recorded"
    return Command(form, words, missing)


@dataclass(frozen=True)
class Kin:
    """A run in the lineage of another."""

    words: str
    url: str | None
    life: Life | None
    is_this: bool
    resumed: str | None
    steps: str
    depth: int


def kin_of(line: Lineage, links: Links) -> list[Kin]:
    """Return a run's family as a tree in reading order, each below what it was resumed from."""
    by_parent: dict[str | None, list[Document]] = {}
    known = {run["run_id"] for run in line.family}
    for run in line.family:
        parent = mapping(run.get("parent")).get("run_id")
        by_parent.setdefault(parent if parent in known and parent != run["run_id"] else None, []).append(run)
    missing = [run for run in line.ancestors if run.get("missing")]
    tree = [Kin(f"{short_id(run['run_id'])} (not in this store)", None, None, False, None, "", 0) for run in missing]
    met: set[str] = set()

    def add(run: Document, depth: int) -> None:
        if run["run_id"] in met:
            return
        met.add(run["run_id"])
        episode = mapping(run.get("parent")).get("episode")
        resumed = f"from episode {count(episode)}" if isinstance(episode, int) else None
        name = f"{text(run['name'])} · {short_id(run['run_id'])}" if run.get("name") else short_id(run["run_id"])
        is_this = run["run_id"] == line.run_id
        tree.append(Kin(name, links.run(run["run_id"]), life_of(run), is_this, resumed, progress_of(run).steps, depth))
        for child in by_parent.get(run["run_id"], ()):
            add(child, min(depth + 1, 8))

    for run in (*by_parent.get(None, ()), *line.family):
        add(run, 1 if missing else 0)
    return tree


@dataclass(frozen=True)
class RunView:
    """A run's page."""

    row: RunRow
    title: str
    run_id: str
    life: Life
    progress: Progress
    lasted: str | None
    started: Moment | None
    facts: Sequence[tuple[str, str]]
    parent: tuple[str, str] | None
    resume: tuple[bool, str] | None
    mlflow_url: str | None
    error: tuple[str, str, str] | None
    latest: CheckpointRow | None
    given_again: Sequence[str]
    chart: Markup
    points: Sequence[Sequence[str]]
    checkpoints: Sequence[CheckpointRow]
    older_url: str | None
    newest_url: str | None
    total: int
    kin: Sequence[Kin]
    changes: Sequence[Difference]
    config: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]
    command: str | None


@dataclass(frozen=True)
class RunParts:
    """What a run's page is made of.

    Attributes:
        run: The record.
        glance: Its checkpoints and curve at a glance.
        items: The checkpoints to show, ascending.
        before: Below which episode they lie; None for the newest.
        older: Whether there are older ones.
        segments: The curve behind those of the ancestors.
        line: The lineage.
    """

    run: Document
    glance: Glance
    items: Sequence[Document]
    before: int | None
    older: bool
    segments: Sequence[Segment]
    line: Lineage


def run_view(
    parts: RunParts, check: Callable[[Document], Check | None], links: Links, mlflow_url: str | None
) -> RunView:
    """Return what a run's page shows.

    Args:
        parts: What it is made of.
        check: Returns what is known of a checkpoint's file.
        links: Where the pages are.
        mlflow_url: Where MLflow shows the run.
    """
    run = parts.run
    rows = [checkpoint_row(run, item, check(item), links) for item in reversed(parts.items)]
    error = mapping(run.get("error"))
    row = run_row(run, parts.glance, links)
    return RunView(
        row=row,
        title=row.name or row.short_id,
        run_id=str(run["run_id"]),
        life=life_of(run),
        progress=progress_of(run),
        lasted=lasted(run),
        started=moment(run.get("started_at")),
        facts=_facts(run),
        parent=parent_of(run, links),
        resume=_resume(run),
        mlflow_url=mlflow_url,
        error=(text(error.get("type")), text(error.get("message")), lines(error.get("traceback"))) if error else None,
        latest=_latest(run, parts, rows, check, links),
        given_again=given_again(run),
        chart=reward_chart(parts.segments, parts.items),
        points=_points(parts.segments),
        checkpoints=rows,
        older_url=links.checkpoints(run["run_id"], parts.items[0]["episode"]) if parts.older and parts.items else None,
        newest_url=links.run(run["run_id"], "checkpoints") if parts.before is not None else None,
        total=parts.glance.checkpoints,
        kin=kin_of(parts.line, links),
        changes=changes_from_parent(run),
        config=[(text(key), setting(value)) for key, value in flat_config(run.get("config")).items()],
        versions=[(text(key), text(value)) for key, value in sorted(mapping(run.get("versions")).items())],
        command=_command_line(run.get("command")),
    )


def _latest(
    run: Document,
    parts: RunParts,
    rows: Sequence[CheckpointRow],
    check: Callable[[Document], Check | None],
    links: Links,
) -> CheckpointRow | None:
    """Return the newest checkpoint that can be resumed and of which nothing bad is known."""
    newest = parts.glance.latest
    if newest is not None:
        row = checkpoint_row(run, newest, check(newest), links)
        if row.resumable:
            return row
    return next((row for row in rows if row.resumable), None)


def _command_line(value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        return text(" ".join(map(str, value)))
    return text(value) if value else None


def _facts(run: Document) -> list[tuple[str, str]]:
    git, config = mapping(run.get("git")), mapping(run.get("config"))
    commit = git.get("commit")
    facts = {
        "Agent": text(run.get("agent_id")),
        "Algorithm": text(run.get("algo")),
        "Environment": text(run.get("env_id")),
        "Seed": setting(config["seed"]) if config.get("seed") is not None else None,
        "Host": f"{text(run.get('host'))} (pid {text(run.get('pid'))})" if run.get("host") else None,
        "Git commit": text(commit)[:12] + (" and local changes" if git.get("dirty") else "") if commit else None,
        "Steps per second": reward(mapping(run.get("progress")).get("steps_per_second")),
        "Episodes": count(mapping(run.get("progress")).get("episode")),
    }
    return [(name, value) for name, value in facts.items() if value and value != text(None)]


def _resume(run: Document) -> tuple[bool, str] | None:
    resume = mapping(run.get("resume"))
    if not resume:
        return None
    exact = resume.get("exact") is True
    return exact, "everything was restored" if exact else text(resume.get("reason"))


def _points(segments: Sequence[Segment]) -> list[list[str]]:
    points = [point for segment in segments for point in segment.points]
    stride = max(1, -(-len(points) // _POINTS_IN_TABLE))
    chosen = [*points[: len(points) - 1 : stride], *points[-1:]]
    return [
        [
            count(p.get("num_timesteps")),
            count(p.get("episode")),
            reward(p.get("ep_rew_mean")),
            reward(p.get("ep_len_mean")),
        ]
        for p in chosen
    ]


@dataclass(frozen=True)
class ComparisonView:
    """A comparison of runs."""

    rows: Sequence[RunRow]
    chart: Markup
    differences: Sequence[Difference]
    same: Sequence[tuple[str, str]]


def comparison_view(
    records: Sequence[Document], glances: Mapping[str, Glance], curves: Sequence[Sequence[Document]], links: Links
) -> ComparisonView:
    """Return what a comparison shows: the runs in the order in which they were named.

    Args:
        records: The runs' records.
        glances: What the list shows of them.
        curves: The curve of each.
        links: Where the pages are.
    """
    rows = [run_row(run, glances.get(run["run_id"], Glance()), links) for run in records]
    series = [
        Series(row.run_id, f"{row.name} · {row.short_id}" if row.name else row.short_id, curve)
        for row, curve in zip(rows, curves, strict=True)
    ]
    differences = config_differences({run["run_id"]: run.get("config") for run in records})
    differing = {row.key for row in differences}
    same = [(text(k), setting(v)) for k, v in flat_config(records[0].get("config")).items() if k not in differing]
    return ComparisonView(rows, comparison_chart(series), differences, same)
