"""Owns how run records and checks look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sb3_mlflow_ckpt.printable import printable

_WIDTH_WITHOUT_TERMINAL = 200
_COLOURS = {"running": "green", "completed": "cyan", "failed": "red", "interrupted": "yellow", "lost": "red"}


def print_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print one line a run."""
    table = Table("run", "agent", "status", "episode", "timesteps", "reward", "started", box=None)
    for run in runs:
        progress = _mapping(run.get("progress"))
        table.add_row(
            _text(str(run.get("run_id"))),
            _text(str(run.get("agent_id"))),
            _status(run),
            _text(progress.get("episode")),
            f"{_text(progress.get('num_timesteps'))} / {_text(progress.get('total_timesteps'))}",
            _text(progress.get("mean_reward")),
            _text(run.get("started_at")),
        )
    _console().print(table if runs else "No runs")


def print_run(run: Mapping[str, Any]) -> None:
    """Print one run: what a person asks first, then its checkpoints."""
    console = _console()
    facts = Table(box=None, show_header=False)
    for name, value in _facts(run):
        facts.add_row(name, value)
    console.print(facts)
    checkpoints = run.get("checkpoint_paths") or ()
    if checkpoints:
        table = Table("checkpoint", "episode", "timesteps", "reward", "trigger", "state", "pinned", box=None)
        for item in checkpoints:
            cells = (item.get(key) for key in ("episode", "num_timesteps", "mean_reward", "trigger", "state"))
            pinned = "yes" if item.get("pinned") else None
            # What can be typed after --resume-from-checkpoint: the copy in MLflow where the disk has it no more.
            where = item.get("path") if item.get("on_disk") else item.get("uri") or item.get("path")
            table.add_row(_text(str(where)), *(_text(cell) for cell in (*cells, pinned)))
        console.print(table)


def print_env_reports(reports: Sequence[Mapping[str, Any]]) -> None:
    """Print one line an environment: whether a resume is exact in it, and what its state costs."""
    table = Table("environment", "how", "exact", "points", "bytes", "capture ms", "restore ms", box=None)
    for report in reports:
        table.add_row(
            escape(str(report["env_id"])),
            _text(report["how"]),
            "[green]yes[/]" if report["exact"] else f"[red]no[/]: {escape(str(report['reason']))}",
            f"{report['exact_points']} of {report['points']}",
            *(_text(report[key]) for key in ("state_bytes", "capture_ms", "restore_ms")),
        )
    _console().print(table)


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    progress, parent, error = (_mapping(run.get(key)) for key in ("progress", "parent", "error"))
    facts = {
        "run": _text(run.get("run_id")),
        "name": _text(run.get("name")),
        "agent": _text(run.get("agent_id")),
        "status": _status(run),
        "algorithm": _text(run.get("algo")),
        "environment": _text(run.get("env_id")),
        "progress": f"episode {_text(progress.get('episode'))}, {_text(progress.get('num_timesteps'))} of "
        f"{_text(progress.get('total_timesteps'))} timesteps, mean reward {_text(progress.get('mean_reward'))}",
        "started": _text(run.get("started_at")),
        "ended": _text(run.get("ended_at")),
        "resumed from": _text(parent.get("checkpoint")),
        "resumed exactly": _exactly(run.get("resume")),
        "error": _text(f"{error.get('type')}: {error.get('message')}") if error else "-",
    }
    return [(name, value) for name, value in facts.items() if value != "-"]


def _exactly(resume: Any) -> str:
    if not isinstance(resume, Mapping):
        return "-"
    return "yes" if resume.get("exact") else _text(f"no: {resume.get('reason')}")


def _status(run: Mapping[str, Any]) -> str:
    status = str(run.get("status"))
    colour = _COLOURS.get(status)
    return f"[{colour}]{_text(status)}[/]" if colour else _text(status)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return escape(printable(str(value), keep="\n"))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _mapping(value: Any) -> Mapping[str, Any]:
    # A record that somebody edited is shown as far as it can be understood.
    return value if isinstance(value, Mapping) else {}


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe has no width: at rich's 80 columns ids would be cut.
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
