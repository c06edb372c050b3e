"""Owns what a sweep came to: a row a trial, the best checkpoint, the curves with their mean and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.resume_commands import resume_command
from sb3_mlflow_ckpt.runs.folder import read_run
from sb3_mlflow_ckpt.scale.trial import TrialPlan
from sb3_mlflow_ckpt.verification import read_metadata

if TYPE_CHECKING:
    import numpy as np

_GRID = 100
_CONFIDENCE = 0.95
_METRICS = {"mean_reward": "ep_rew_mean", "mean_length": "ep_len_mean"}


@dataclass(frozen=True)
class TrialRow:
    """One trial, as its run's record tells it.

    Attributes:
        run_id: Its run.
        record: The record, with its checkpoints.
        score: The metric of its newest checkpoint.
        best: The checkpoint on disk with the best metric, and that metric.
        curve: Environment steps and metric, in their order.
    """

    run_id: str
    record: Mapping[str, Any]
    score: float | None
    best: tuple[Mapping[str, Any], float] | None
    curve: tuple[tuple[int, float], ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the record says of the trial's place in the sweep."""
        return self.record.get("sweep") or {}

    @property
    def setting(self) -> tuple[tuple[str, Any], ...]:
        """What it was trained with, but for the seed: trials of one setting are compared over seeds."""
        return tuple((key, value) for key, value in self.facts.get("hyperparameters", {}).items() if key != "seed")


@dataclass(frozen=True)
class SweepReport:
    """What a sweep came to.

    Attributes:
        plan: The sweep.
        rows: Its trials; one whose record is not on this machine is left out.
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
        return resume_command(row.record, row.best[0], program="trainer", source="path")

    def to_json(self) -> list[dict[str, Any]]:
        """Return a row a trial, as plain JSON."""
        return [
            {
                "run_id": row.run_id,
                "status": row.record.get("status"),
                **{key: row.facts.get(key) for key in ("trial", "generation", "donor", "hyperparameters", "lineage")},
                "progress": row.record.get("progress"),
                self.plan.sweep.metric: row.score,
                "best_checkpoint": row.best[0].get("path") if row.best is not None else None,
            }
            for row in self.rows
        ]


def sweep_report(plan: TrialPlan, run_ids: Sequence[str]) -> SweepReport:
    """Return what the trials of a sweep came to."""
    agent = plan.sweep.trial_config({}).agent
    rows = []
    for run_id in run_ids:
        folder = RunFolder(Path(plan.checkpoint_dir), agent, run_id)
        try:
            rows.append(_row(folder, plan))
        except CheckpointError:
            continue
    return SweepReport(plan, tuple(rows))


def _row(folder: RunFolder, plan: TrialPlan) -> TrialRow:
    record = read_run(folder)
    metric = plan.sweep.metric
    rated = []
    # By the time of the save: after a clone the highest episode is not the newest.
    for item in sorted(record["checkpoint_paths"], key=lambda item: str(item.get("timestamp"))):
        if not item.get("on_disk"):
            continue
        try:
            value = read_metadata(folder.model(item["episode"])).metrics.get(metric)
        except CheckpointError:
            continue
        if value is not None:
            rated.append((item, float(value)))
    best = (max if plan.sweep.goal == "max" else min)(rated, key=lambda pair: pair[1], default=None)
    points = json_lines.read_lines(folder.metrics)[0]
    column = _METRICS[metric]
    curve = [(int(p["num_timesteps"]), float(p[column])) for p in points if isinstance(p.get(column), (int, float))]
    return TrialRow(folder.run_id, record, rated[-1][1] if rated else None, best, tuple(curve))


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
    titles = {
        str(row.setting): ", ".join(f"{key} {_short(value)}" for key, value in row.setting) for row in report.rows
    }
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


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
