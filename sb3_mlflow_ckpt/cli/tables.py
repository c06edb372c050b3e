"""Owns how run records and checks look in a terminal: as much as its width takes, and everything in a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_mlflow_ckpt.cli import cells
from sb3_mlflow_ckpt.cli.cells import NOTHING, mapping, text
from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.resume_commands import given_again, resume_command
from sb3_mlflow_ckpt.runs.comparison import MISSING, changes_from_parent, config_differences
from sb3_mlflow_ckpt.runs.lineage import Lineage
from sb3_mlflow_ckpt.runs.reader import Glance

# A pipe has no width: nothing is to be cut or wrapped there.
_WIDTH_WITHOUT_TERMINAL = 10_000
_WIDE = 110
_MOST_CHECKPOINTS = 20
_SHORTEST_NAME = 8
_FLEXIBLE = {"name": None, "agent": None}.keys()
_NUMBERS = frozenset({"reward", "done", "last", "best", "saved", "age", "episode", "checkpoints"})


def print_runs(
    runs: Sequence[Mapping[str, Any]], glances: Mapping[str, Glance], *, total: int, ids: Iterable[str] = ()
) -> None:
    """Print one line a run.

    Args:
        runs: Their summaries.
        glances: What is to be shown beside them, by the run's id.
        total: How many runs there are in all.
        ids: The ids of all runs of the store, from which a shortened one must differ.
    """
    console = _console()
    if not runs:
        console.print("No runs")
        return
    short = cells.short_ids(ids)
    row = _full_row if not console.is_terminal else _wide_row if console.width >= _WIDE else _narrow_row
    rows = [row(run, glances.get(run["run_id"], Glance()), short, console) for run in runs]
    console.print(_fitted(rows, console.width))
    if len(runs) < total:
        Console(stderr=True, highlight=False).print(f"{len(runs)} of {total:,} runs; --limit shows more")


def _narrow_row(run: Mapping[str, Any], glance: Glance, short: Mapping[str, str], console: Console) -> dict[str, str]:
    progress, latest = mapping(run.get("progress")), mapping(glance.latest)
    return {
        "run": text(short.get(run["run_id"], run["run_id"])),
        "status": cells.status(run),
        "name": cells.title(run),
        "curve": cells.sparkline(glance.rewards, 8, ascii_only=console.options.ascii_only),
        "reward": cells.reward(_rewards(run, glance)[0]),
        "done": cells.percent(progress),
        "checkpoint": f"{text(latest.get('episode'))} ({cells.age(latest.get('timestamp'))})" if latest else NOTHING,
        "age": cells.age(run.get("started_at")),
    }


def _wide_row(run: Mapping[str, Any], glance: Glance, short: Mapping[str, str], console: Console) -> dict[str, str]:
    last, best = _rewards(run, glance)
    narrow = _narrow_row(run, glance, short, console)
    return {
        **{key: narrow[key] for key in ("run", "status", "name")},
        "agent": text(run.get("agent_id")),
        "curve": cells.sparkline(glance.rewards, 16, ascii_only=console.options.ascii_only),
        "last": cells.reward(last),
        "best": cells.reward(best),
        "done": narrow["done"],
        "checkpoint": narrow["checkpoint"],
        "saved": text(glance.checkpoints),
        "age": narrow["age"],
    }


def _full_row(run: Mapping[str, Any], glance: Glance, short: Mapping[str, str], console: Console) -> dict[str, str]:
    progress, latest, (last, best) = mapping(run.get("progress")), mapping(glance.latest), _rewards(run, glance)
    return {
        "run": text(run["run_id"]),
        "agent": text(run.get("agent_id")),
        "status": cells.status(run),
        "name": cells.title(run),
        "algorithm": text(run.get("algo")),
        "environment": text(run.get("env_id")),
        "episode": text(progress.get("episode")),
        "timesteps": cells.steps(progress),
        "last": cells.reward(last),
        "best": cells.reward(best),
        "curve": cells.sparkline(glance.rewards, 16, ascii_only=console.options.ascii_only),
        "checkpoints": text(glance.checkpoints),
        "checkpoint": text(_where(latest)) if latest else NOTHING,
        "started": text(run.get("started_at")),
        "ended": text(run.get("ended_at")),
    }


def print_run(run: Mapping[str, Any], glance: Glance, line: Lineage | None) -> None:
    """Print one run: what a person asks first, where it stands among its kin, its checkpoints, how to go on."""
    console = _console()
    _print_facts(console, _facts(run))
    if traceback := mapping(run.get("error")).get("traceback"):
        console.print(text(str(traceback).rstrip()), style="dim", soft_wrap=True)
    if changes := changes_from_parent(run):
        table = Table("setting", "parent", "this run", box=None)
        for change in changes:
            table.add_row(text(change.key), *(_setting(value) for value in change.values))
        _print_part(console, "Changed from the parent", table)
    if line is not None and (line.ancestors or line.children):
        _print_part(console, "Lineage", _lineage_table(run, line, whole=not console.is_terminal))
    items = [item for item in run.get("checkpoint_paths") or () if isinstance(item, Mapping)]
    if items:
        shown = items[-_MOST_CHECKPOINTS:] if console.is_terminal else items
        earlier = f" ({len(items) - len(shown):,} earlier ones: --json)" if len(shown) < len(items) else ""
        _print_part(console, f"Checkpoints{earlier}", _checkpoints_table(shown, whole=not console.is_terminal))
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


def print_comparison(runs: Sequence[Mapping[str, Any]], glances: Mapping[str, Glance]) -> None:
    """Print runs side by side: their facts, their curves on one scale, and in what their configurations differ."""
    console = _console()
    short = cells.short_ids(run["run_id"] for run in runs)
    table = Table("", *(text(short[run["run_id"]]) for run in runs), box=None, pad_edge=False)
    columns = [_compared(run, glances.get(run["run_id"], Glance())) for run in runs]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    width = max(8, min(40, (console.width if console.is_terminal else 120) // (len(runs) + 1) - 2))
    curves = [glances.get(run["run_id"], Glance()).rewards for run in runs]
    every = [value for curve in curves for _, value in curve]
    if every:
        bounds, ends = (min(every), max(every)), [step for curve in curves for step, _ in curve]
        plain, reach = console.options.ascii_only, (min(ends), max(ends))
        lines = [cells.sparkline(c, width, bounds=bounds, reach=reach, ascii_only=plain) for c in curves]
        table.add_row("curve", *lines)
    console.print(table)
    differences = config_differences({run["run_id"]: run.get("config") for run in runs})
    if not differences:
        console.print("\nThe configurations do not differ")
        return
    table = Table("setting", *(text(short[run["run_id"]]) for run in runs), box=None)
    for difference in differences:
        table.add_row(text(difference.key), *(_setting(value) for value in difference.values))
    _print_part(console, "Different settings", table)


def print_env_reports(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print one line an environment: whether a resume is exact in it, and what its state costs."""
    table = Table("environment", "how", "exact", "points", "bytes", "capture ms", "restore ms", box=None)
    for report in reports:
        table.add_row(
            text(str(report["env_id"])),
            text(report["how"]),
            "[green]yes[/]" if report["exact"] else f"[red]no[/]: {text(str(report['reason']))}",
            f"{report['exact_points']} of {report['points']}",
            *(text(report[key]) for key in ("state_bytes", "capture_ms", "restore_ms")),
        )
    _console().print(table)


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


def _compared(run: Mapping[str, Any], glance: Glance) -> dict[str, str]:
    progress, (last, best) = mapping(run.get("progress")), _rewards(run, glance)
    started, ended = cells.moment_of(run.get("started_at")), cells.moment_of(run.get("ended_at"))
    latest = mapping(glance.latest)
    return {
        "status": cells.status(run),
        "name": text(run.get("name")),
        "algorithm": text(run.get("algo")),
        "environment": text(run.get("env_id")),
        "timesteps": cells.steps(progress),
        "last reward": cells.reward(last),
        "best reward": cells.reward(best),
        "started": f"{cells.age(run.get('started_at'))} ago" if started else NOTHING,
        "took": cells.span((ended - started).total_seconds()) if started and ended else NOTHING,
        "checkpoints": text(glance.checkpoints),
        "last checkpoint": f"episode {text(latest.get('episode'))}" if latest else NOTHING,
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
        where = _where(item)
        table.add_row(
            text(where if whole else str(item.get("path")).rpartition("/")[2]),
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


def _where(item: Mapping[str, Any]) -> str:
    # What can be typed after --resume-from-checkpoint: the copy in MLflow where the disk has it no more.
    return str(item.get("path") if item.get("on_disk") else item.get("uri") or item.get("path"))


def _rewards(run: Mapping[str, Any], glance: Glance) -> tuple[Any, Any]:
    """Return the last and the best mean reward; of an old record, the best of the curve."""
    progress, values = mapping(run.get("progress")), [value for _, value in glance.rewards]
    last = progress.get("mean_reward")
    best = progress.get("best_mean_reward")
    return (values[-1] if last is None and values else last), (max(values) if best is None and values else best)


def _setting(value: Any) -> str:
    if value is MISSING or value is None:
        return "not set"
    # As it is typed: 0.0003, not 0.00.
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _exactly(resume: Any) -> str:
    if not isinstance(resume, Mapping):
        return NOTHING
    return "yes" if resume.get("exact") else text(f"no: {resume.get('reason')}")


def _fitted(rows: Sequence[Mapping[str, str]], width: int) -> Table:
    """Return a table that is no wider than the terminal: names give way, what is to be typed or read off does not."""
    needed = {name: max(len(name), *(Text.from_markup(row[name]).cell_len for row in rows)) for name in rows[0]}
    for name in _FLEXIBLE:
        over = sum(needed.values()) + len(needed) - 1 - width
        if name in needed and over > 0:
            needed[name] = max(min(needed[name], _SHORTEST_NAME), needed[name] - over)
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in needed:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for row in rows:
        cells_of_row = {name: Text.from_markup(cell) for name, cell in row.items()}
        for name in _FLEXIBLE & row.keys():
            cells_of_row[name].truncate(needed[name], overflow="ellipsis")
        table.add_row(*cells_of_row.values())
    return table


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value != NOTHING:
            table.add_row(name, value)
    console.print(table)


def _print_part(console: Console, heading: str, table: Table) -> None:
    console.print(f"\n[bold]{heading}[/]")
    table.pad_edge = False
    console.print(table)


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
