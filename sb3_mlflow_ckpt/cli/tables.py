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
from sb3_mlflow_ckpt.runs.comparison import MISSING, config_differences
from sb3_mlflow_ckpt.runs.reader import Glance

# A pipe has no width: nothing is to be cut or wrapped there.
_WIDTH_WITHOUT_TERMINAL = 10_000
_WIDE = 110
_SHORTEST_NAME = 8
_FLEXIBLE = ("name", "agent")
_NUMBERS = frozenset({"reward", "done", "last", "best", "saved", "age", "episode", "checkpoints"})


def print_runs(
    runs: Sequence[Mapping[str, Any]],
    glances: Mapping[str, Glance],
    *,
    total: int,
    ids: Iterable[str] = (),
    otherwise: str = "No runs",
) -> None:
    """Print one line a run.

    Args:
        runs: Their summaries.
        glances: What is to be shown beside them, by the run's id.
        total: How many runs there are in all.
        ids: The ids of all runs of the store, from which a shortened one must differ.
        otherwise: What is printed where there are none.
    """
    console = open_console()
    if not runs:
        console.print(text(otherwise), soft_wrap=True)
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
        "checkpoint": text(where(latest)) if latest else NOTHING,
        "started": text(run.get("started_at")),
        "ended": text(run.get("ended_at")),
    }


def print_comparison(runs: Sequence[Mapping[str, Any]], glances: Mapping[str, Glance]) -> None:
    """Print runs side by side: their facts, their curves on one scale, and in what their configurations differ."""
    console = open_console()
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
        table.add_row(text(difference.key), *(setting(value) for value in difference.values))
    print_part(console, "Different settings", table)


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
    open_console().print(table)


def print_sweep(trials: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Print one line a trial of a sweep."""
    console = open_console()
    if not trials:
        console.print("No trials")
        return
    varied = list(dict.fromkeys(key for trial in trials for key in mapping(trial.get("hyperparameters"))))
    cloned = any(trial.get("generation") for trial in trials)
    lineage = ["generation", "donor"] if cloned else []
    table = Table("run", "status", *varied, *lineage, "timesteps", "episode", metric.replace("_", " "), box=None)
    for trial in trials:
        values, progress = mapping(trial.get("hyperparameters")), mapping(trial.get("progress"))
        donor = mapping(trial.get("donor"))
        came_from = f"trial {text(donor.get('trial'))}, episode {text(donor.get('episode'))}" if donor else NOTHING
        table.add_row(
            text(trial["run_id"]),
            cells.status(trial),
            *(setting(_rounded(values.get(key))) for key in varied),
            *([text(trial.get("generation")), came_from] if cloned else []),
            text(progress.get("num_timesteps")),
            text(progress.get("episode")),
            cells.reward(trial.get(metric)),
        )
    console.print(table)


def _rounded(value: Any) -> Any:
    """Return a drawn number with as many digits as a person compares."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


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


def where(item: Mapping[str, Any]) -> str:
    """Return what can be typed after `--resume-from-checkpoint`: the copy in MLflow where the disk has it no more."""
    return str(item.get("path") if item.get("on_disk") else item.get("uri") or item.get("path"))


def _rewards(run: Mapping[str, Any], glance: Glance) -> tuple[Any, Any]:
    """Return the last and the best mean reward; of an old record, the best of the curve."""
    progress, values = mapping(run.get("progress")), [value for _, value in glance.rewards]
    last = progress.get("mean_reward")
    best = progress.get("best_mean_reward")
    return (values[-1] if last is None and values else last), (max(values) if best is None and values else best)


def setting(value: Any) -> str:
    """Return a setting as it is typed: 0.0003, not 0.00."""
    if value is MISSING or value is None:
        return "not set"
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


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
        for name in [name for name in _FLEXIBLE if name in row]:
            cells_of_row[name].truncate(needed[name], overflow="ellipsis")
        table.add_row(*cells_of_row.values())
    return table


def print_part(console: Console, heading: str, table: Table) -> None:
    """Print a table below its heading."""
    console.print(f"\n[bold]{heading}[/]")
    table.pad_edge = False
    console.print(table)


def open_console() -> Console:
    """Return a console as wide as the terminal, or as anything that a pipe may be given."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
