"""Owns what a sweep came to: a row a trial, the best checkpoint, the curves with their mean and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.resume_commands import resume_command
from sb3_mlflow_ckpt.scale.search_space import short
from sb3_mlflow_ckpt.scale.trial import TrialPlan
from sb3_mlflow_ckpt.scale.trial_row import TrialRow, trial_row

if TYPE_CHECKING:
    import numpy as np

_GRID = 100
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class SweepReport:
    """What a sweep came to.

    Attributes:
        plan: The sweep.
        rows: Its trials.
    """

    plan: TrialPlan
    rows: tuple[TrialRow, ...]

    @property
    def best(self) -> TrialRow | None:
        """The trial that has the best checkpoint."""
        sign = 1 if self.plan.sweep.goal == "max" else -1
        rated = [(sign * row.best[1], row) for row in self.rows if row.best is not None]
        return max(rated, key=lambda pair: pair[0])[1] if rated else None

    @property
    def resume_command(self) -> str | None:
        """The shell command that goes on from the best checkpoint."""
        row = self.best
        if row is None or row.best is None:
            return None
        item = row.best[0]
        return resume_command(row.record, item, program="trainer", source="path" if item.get("path") else "uri")

    def to_json(self) -> list[dict[str, Any]]:
        """Return a row a trial, as plain JSON."""
        return [
            {
                "run_id": row.run_id,
                "status": row.record.get("status"),
                **{key: row.facts.get(key) for key in ("trial", "generation", "donor", "hyperparameters", "lineage")},
                "progress": row.record.get("progress"),
                self.plan.sweep.metric: row.score,
                "best_checkpoint": row.best_checkpoint,
            }
            for row in self.rows
        ]


def sweep_report(plan: TrialPlan, trials: Mapping[str, Mapping[str, Any]]) -> SweepReport:
    """Return what the trials of a sweep came to.

    Args:
        plan: The sweep.
        trials: Of each run, what is told where it has left no record: `status`, `hyperparameters`.
    """
    return SweepReport(plan, tuple(trial_row(plan, run_id) or _bare(run_id, known) for run_id, known in trials.items()))


def _bare(run_id: str, known: Mapping[str, Any]) -> TrialRow:
    """Return the row of a trial that ended before it had a record."""
    facts = {"trial": run_id.rpartition("-")[2], "hyperparameters": known["hyperparameters"]}
    return TrialRow(run_id, {"status": known["status"], "sweep": facts}, None, None, ())


def interval_over_seeds(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return steps, mean, and the lower and upper end of the mean's confidence interval over curves.

    Student's t over the seeds, up to where the shortest curve ends; of one curve the interval is the curve.
    """
    import numpy as np
    from scipy import stats

    start = max(curve[0][0] for curve in curves)
    end = max(start, min(curve[-1][0] for curve in curves))
    steps = np.linspace(start, end, _GRID)
    values = np.stack([np.interp(steps, [at for at, _ in curve], [value for _, value in curve]) for curve in curves])
    mean = values.mean(axis=0)
    if len(curves) == 1:
        return steps, mean, mean, mean
    half = stats.t.ppf((1 + _CONFIDENCE) / 2, len(curves) - 1) * stats.sem(values, axis=0)
    return steps, mean, mean - half, mean + half


def draw(report: SweepReport, path: Path) -> bool:
    """Draw the curves: of trials of one setting their mean and its interval, of a population each.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[Any, list[Sequence[tuple[int, float]]]] = {}
    for row in report.rows:
        if row.curve:
            # A population's settings change on the way: each member is its own.
            key = row.run_id if report.plan.sweep.scheduler == "pbt" else row.setting
            groups.setdefault(str(key), []).append(row.curve)
    if not groups:
        return False
    titles = {str(row.setting): ", ".join(f"{key} {short(value)}" for key, value in row.setting) for row in report.rows}
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for key, curves in groups.items():
        steps, mean, low, high = interval_over_seeds(curves)
        (line,) = axes.plot(steps, mean, label=f"{titles.get(key) or key} ({len(curves)})")
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="environment steps", ylabel=report.plan.sweep.metric, title=report.plan.sweep_id)
    axes.legend(fontsize="small", title="mean, 95 % interval (seeds)")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True
