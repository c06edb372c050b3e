"""Owns what a run's page shows of its checkpoints: what is known of each, and which command resumes it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sb3_mlflow_ckpt.resume_commands import Program, Source, given_again, resume_command
from sb3_mlflow_ckpt.runs.reader import Document
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.checkpoint_files import Check
from sb3_mlflow_ckpt.web.formats import Moment
from sb3_mlflow_ckpt.web.scales import number

PROGRAMS: Mapping[Program, str] = {"trainer": "Trainer", "mlflow": "mlflow run"}
SOURCES: Mapping[Source, str] = {"path": "Local path", "uri": "runs:/ URI"}
_OTHER: Mapping[Source, Source] = {"path": "uri", "uri": "path"}
_INSTEAD: Mapping[Source, str] = {"path": "only in MLflow", "uri": "not in MLflow"}
_SAID = {
    "verified": "verified",
    "corrupt": "damaged",
    "unreadable": "not readable",
    "absent": "not on this host",
    "gone": "not on disk",
    "unknown": "not checked yet",
}


@dataclass(frozen=True)
class Command:
    """A command that resumes a checkpoint.

    Attributes:
        program: Which program it calls.
        source: Which copy was chosen.
        command: The line.
        note: Why it names the other copy, where the chosen one is not there.
    """

    program: Program
    source: Source
    command: str
    note: str = ""


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint."""

    episode: int
    trigger: str
    reward: str
    timesteps: str
    saved: Moment | None
    size: str
    path: str
    raw_path: str
    uri: str
    sha256: str
    check: str
    check_kind: str
    problem: str
    pruned: bool
    mirrored: bool
    pinned: bool
    best: bool
    here: bool
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class CheckpointList:
    """A page of a run's checkpoints, the newest first.

    Attributes:
        rows: The checkpoints.
        total: How many the run has committed.
        older: Below which episode the next page begins, or None.
        newest_shown: Whether this is the first page.
        primary: The newest that can be resumed.
        given_again: What a resume needs beside the command.
    """

    rows: tuple[CheckpointRow, ...]
    total: int
    older: int | None
    newest_shown: bool
    primary: CheckpointRow | None
    given_again: tuple[str, ...]

    @property
    def pruned(self) -> bool:
        """Return whether nobody has some of them any more."""
        return any(row.pruned for row in self.rows)


def checkpoint_list(
    record: Document,
    items: Sequence[Document],
    checks: Mapping[int, Check],
    *,
    total: int,
    older: int | None,
    newest: Sequence[Document],
) -> CheckpointList:
    """Return what is shown of some checkpoints of a run.

    Args:
        record: The run's record.
        items: The checkpoints of this page, ascending by episode.
        checks: What is known of their contents; nothing yet of one that is missing.
        total: How many the run has.
        older: Below which episode there are more.
        newest: The run's newest ones, ascending: the primary command is the newest of them that can be resumed.
    """
    is_whole = older is None and newest is items
    best = best_episode(items) if is_whole else None
    rows = tuple(_row(record, item, checks, best) for item in reversed(items))
    candidates = rows if newest is items else tuple(_row(record, item, checks, None) for item in reversed(newest))
    return CheckpointList(
        rows=rows,
        total=total,
        older=older,
        newest_shown=newest is items,
        # The one that was saved last: a run that went back to an older one has lower numbers after higher ones.
        primary=max((row for row in candidates if row.commands), key=_saved, default=None),
        given_again=tuple(
            dict.fromkeys(formats.text(line) for p in PROGRAMS for line in given_again(record, program=p))
        ),
    )


def _saved(row: CheckpointRow) -> tuple[str, int]:
    return row.saved.iso if row.saved is not None else "", row.episode


def best_episode(items: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the checkpoint with the highest reward, the newest of equals; None where they do not differ."""
    rewards = [(found, item["episode"]) for item in items if (found := number(item.get("mean_reward"))) is not None]
    return max(rewards)[1] if rewards and min(rewards)[0] < max(rewards)[0] else None


def _row(record: Document, item: Document, checks: Mapping[int, Check], best: int | None) -> CheckpointRow:
    episode = item["episode"]
    pruned = item.get("state") == "pruned"
    check = checks.get(episode) or Check("unknown")
    if check.state == "absent" and item.get("on_disk") is not True:
        check = Check("gone")
    reward = number(item.get("mean_reward"))
    path = item.get("path") if isinstance(item.get("path"), str) else ""
    return CheckpointRow(
        episode=episode,
        trigger=formats.text(item.get("trigger")),
        reward=formats.reward(reward),
        timesteps=formats.count(item.get("num_timesteps")),
        saved=formats.moment(item.get("timestamp")),
        size=formats.size(item.get("bytes")),
        path=formats.text(path),
        raw_path=str(path),
        uri=formats.text(item.get("uri")),
        sha256=formats.text(item.get("sha256")),
        check="pruned" if pruned else _SAID.get(check.state, check.state),
        check_kind="pruned" if pruned else check.state,
        problem="" if pruned else formats.text(check.problem),
        pruned=pruned,
        mirrored=bool(item.get("uri")) and not pruned,
        pinned=item.get("pinned") is True,
        best=episode == best,
        here=not pruned and item.get("on_disk") is True and check.state not in ("absent", "gone", "corrupt"),
        commands=_commands(record, item, check),
    )


def _commands(record: Document, item: Document, check: Check) -> tuple[Command, ...]:
    """Return a command for each program and copy: of the other copy where one is gone or damaged."""
    found = []
    for program in PROGRAMS:
        lines: dict[Source, str | None] = {
            source: resume_command(record, item, program=program, source=source) for source in SOURCES
        }
        if check.state == "corrupt":
            lines["path"] = None
        for source in SOURCES:
            line, other = lines[source], lines[_OTHER[source]]
            if line is not None:
                found.append(Command(program, source, line))
            elif other is not None:
                damaged = source == "path" and check.state == "corrupt"
                note = "the file is damaged: this is the copy in MLflow" if damaged else _INSTEAD[source]
                found.append(Command(program, source, other, note))
    return tuple(found)


def wanted_check(items: Sequence[Mapping[str, Any]], checks: Mapping[int, Check]) -> int | None:
    """Return the checkpoint whose content should be looked at next, or None where enough is known.

    That is the one on disk that was saved last, an older one where it is damaged: what a page offers first.

    Args:
        items: The newest checkpoints.
        checks: What is known.
    """
    on_disk = [item for item in items if item.get("state") != "pruned" and item.get("on_disk") is True]
    for item in sorted(on_disk, key=lambda item: (str(item.get("timestamp")), item["episode"]), reverse=True):
        known = checks.get(item["episode"])
        if known is None:
            return int(item["episode"])
        if known.state == "verified":
            return None
    return None
