"""Owns how one run looks in a terminal: what a person asks first, its kin, its checkpoints, how to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sb3_mlflow_ckpt.cli import cells
from sb3_mlflow_ckpt.cli.cells import NOTHING, mapping, text
from sb3_mlflow_ckpt.cli.tables import open_console, print_part, setting, where
from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.resume_commands import given_again, resume_command
from sb3_mlflow_ckpt.runs.comparison import changes_from_parent
from sb3_mlflow_ckpt.runs.lineage import Lineage
from sb3_mlflow_ckpt.runs.reader import Glance
from sb3_mlflow_ckpt.stalls import stall_text

_MOST_CHECKPOINTS = 20


def print_run(run: Mapping[str, Any], glance: Glance, line: Lineage | None) -> None:
    """Print one run: what a person asks first, where it stands among its kin, its checkpoints, how to go on."""
    console = open_console()
    _print_facts(console, _facts(run))
    if traceback := mapping(run.get("error")).get("traceback"):
        console.print(text(str(traceback).rstrip()), style="dim", soft_wrap=True)
    if changes := changes_from_parent(run):
        table = Table("setting", "parent", "this run", box=None)
        for change in changes:
            table.add_row(text(change.key), *(setting(value) for value in change.values))
        print_part(console, "Changed from the parent", table)
    if line is not None and (line.ancestors or line.children):
        print_part(console, "Lineage", _lineage_table(run, line, whole=not console.is_terminal))
    items = [item for item in run.get("checkpoint_paths") or () if isinstance(item, Mapping)]
    if items:
        shown = items[-_MOST_CHECKPOINTS:] if console.is_terminal else items
        earlier = f" ({len(items) - len(shown):,} earlier ones: --json)" if len(shown) < len(items) else ""
        print_part(console, f"Checkpoints{earlier}", _checkpoints_table(shown, whole=not console.is_terminal))
    _print_resume(console, run, glance)


def _print_resume(console: Console, run: Mapping[str, Any], glance: Glance) -> None:
    latest = mapping(glance.latest)
    command = resume_command(run, latest, program="trainer", source="path")
    command = command or resume_command(run, latest, program="trainer", source="uri")
    if command is None:
        return
    # A command must be copyable: no wrapping, no markup, no highlighting.
    console.print(f"\nResume with: {printable(command)}", soft_wrap=True, markup=False, highlight=False)
    for sentence in given_again(run):
        console.print(f"  {printable(sentence)}", soft_wrap=True, markup=False, highlight=False)


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    progress, parent, error, mlflow = (mapping(run.get(key)) for key in ("progress", "parent", "error", "mlflow"))
    items = run.get("checkpoint_paths") or ()
    path = str(mapping(items[-1]).get("path") or "") if isinstance(items, Sequence) and items else ""
    return {
        "run": text(run.get("run_id")),
        "name": text(run.get("name")),
        "agent": text(run.get("agent_id")),
        "status": cells.status(run),
        "algorithm": text(run.get("algo")),
        "environment": text(run.get("env_id")),
        "progress": f"episode {text(progress.get('episode'))}, {text(progress.get('num_timesteps'))} of "
        f"{text(progress.get('total_timesteps'))} timesteps",
        "reward": f"mean {cells.reward(progress.get('mean_reward'))}, best "
        f"{cells.reward(progress.get('best_mean_reward'))}",
        "checkpoint stalls": stall_text(progress) or NOTHING,
        "started": cells.when(run.get("started_at")),
        "heartbeat": cells.when(run.get("heartbeat_at")) if run.get("ended_at") is None else NOTHING,
        "ended": cells.when(run.get("ended_at")),
        "host": text(run.get("host")),
        "git commit": text(mapping(run.get("git")).get("commit")),
        "MLflow run": text(mlflow.get("run_id") and f"{mlflow.get('run_id')} at {mlflow.get('tracking_uri')}"),
        "folder": text(path.rpartition("/")[0] or None),
        "resumed from": text(parent.get("checkpoint")),
        "resumed exactly": _exactly(run.get("resume")),
        "error": text(f"{error.get('type')}: {error.get('message')}") if error else NOTHING,
    }


def _lineage_table(run: Mapping[str, Any], line: Lineage, *, whole: bool) -> Table:
    table = Table("", "run", "from episode", "status", "timesteps", box=None)
    parts: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    parts = (("ancestor", line.ancestors), ("this run", (run,)), ("child", line.children))
    short = {} if whole else cells.short_ids(member["run_id"] for _, members in parts for member in members)
    for kind, members in parts:
        for member in members:
            name = text(short.get(member["run_id"], member["run_id"]))
            start = text(mapping(member.get("parent")).get("episode"))
            if member.get("missing"):
                table.add_row(kind, name, NOTHING, "not in this store", NOTHING)
            else:
                told = cells.steps(mapping(member.get("progress")))
                table.add_row(kind, name, start, cells.status(member), told)
    return table


def _checkpoints_table(items: Sequence[Mapping[str, Any]], *, whole: bool) -> Table:
    table = Table(box=None, padding=(0, 1), collapse_padding=True)
    table.add_column("checkpoint" if whole else "file", no_wrap=True)
    for name in ("episode", "timesteps", "reward"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("saved by", "state"):
        table.add_column(name)
    for name in ("size", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in items:
        place = where(item)
        table.add_row(
            text(place if whole else str(item.get("path")).rpartition("/")[2]),
            text(item.get("episode")),
            text(item.get("num_timesteps")),
            cells.reward(item.get("mean_reward")),
            text(item.get("trigger")),
            _state(item),
            cells.size(item.get("bytes")),
            cells.age(item.get("timestamp")),
        )
    return table


def _state(item: Mapping[str, Any]) -> str:
    more = ["disk"] if item.get("on_disk") and item.get("state") != "local" else []
    return text(", ".join([str(item.get("state")), *more, *(["pinned"] if item.get("pinned") else [])]))


def _exactly(resume: Any) -> str:
    if not isinstance(resume, Mapping):
        return NOTHING
    return "yes" if resume.get("exact") else text(f"no: {resume.get('reason')}")


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value != NOTHING:
            table.add_row(name, value)
    console.print(table)
