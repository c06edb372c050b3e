"""Owns what one trial came to: as its record here tells it, or MLflow where another machine trained it last."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.layout import RunFolder, model_episode
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.runs.folder import read_run
from sb3_mlflow_ckpt.scale.trial import TrialPlan
from sb3_mlflow_ckpt.verification import read_metadata

logger = logging.getLogger(__name__)

_COLUMNS = {"mean_reward": "ep_rew_mean", "mean_length": "ep_len_mean"}


@dataclass(frozen=True)
class TrialRow:
    """One trial, as its run's record tells it.

    Attributes:
        run_id: Its run.
        record: The record, with its checkpoints.
        score: The metric of its newest checkpoint.
        best: The checkpoint with the best metric, and that metric.
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

    @property
    def best_checkpoint(self) -> str | None:
        """Where the best checkpoint lies: its path, or its URI where it is not on this machine."""
        if self.best is None:
            return None
        found = self.best[0].get("path") or self.best[0].get("uri")
        return str(found) if found else None


def trial_row(plan: TrialPlan, run_id: str) -> TrialRow | None:
    """Return what a trial came to; None where neither its folder here nor MLflow tells."""
    folder = plan.folder_of_run(run_id)
    try:
        row = _row_here(folder, plan)
    except CheckpointError:
        row = None
    if plan.one_machine or plan.tracking_uri is None:
        return row
    try:
        return _row_in_mlflow(plan, run_id, row) or row
    except Exception as error:
        # mlflow raises its own, requests' and OS errors alike.
        logger.warning("What the trial %s came to elsewhere is not known: %s", run_id, redact(str(error)))
        return row


def _row_here(folder: RunFolder, plan: TrialPlan) -> TrialRow:
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
    best = _better(plan)(rated, key=lambda pair: pair[1], default=None)
    points = json_lines.read_lines(folder.metrics)[0]
    column = _COLUMNS[metric]
    curve = _forward(
        (int(p["num_timesteps"]), float(p[column])) for p in points if isinstance(p.get(column), (int, float))
    )
    return TrialRow(folder.run_id, record, rated[-1][1] if rated else None, best, tuple(curve))


def _forward(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a curve without what a clone, or a resume from further back, has left behind."""
    curve: list[tuple[int, float]] = []
    for step, value in points:
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, value))
    return curve


def _better(plan: TrialPlan) -> Any:
    return max if plan.sweep.goal == "max" else min


def _row_in_mlflow(plan: TrialPlan, run_id: str, here: TrialRow | None) -> TrialRow | None:
    """Return a trial's row where MLflow holds a later attempt than this machine, or all that there is of it."""
    from sb3_mlflow_ckpt.mirrors.artifacts import complete_checkpoints, metadata_of
    from sb3_mlflow_ckpt.mirrors.tracked_run import TrackedRun, run_of

    client = TrackedRun(plan.tracking_uri, None, None).client
    run = run_of(client, run_id)
    if run is None:
        return None
    if here is not None and (naming.attempt_of(run.data.tags) or 0) <= int(here.record.get("attempt") or 1):
        return None
    uris = complete_checkpoints(run.info.run_id, plan.tracking_uri)
    if not uris:
        return None
    newest = metadata_of(uris[-1], plan.tracking_uri)
    record = {
        "run_id": run_id,
        "agent_id": newest.agent_id,
        "status": next((ours for ours, theirs in naming.STATUS.items() if theirs == run.info.status), None),
        "config": newest.config,
        "sweep": newest.extra_state.get("sweep"),
        "progress": {"num_timesteps": newest.num_timesteps, "episode": newest.episode},
        "mlflow": {"run_id": run.info.run_id, "tracking_uri": plan.tracking_uri},
    }
    curve = _history(client, run.info.run_id, naming.METRIC_NAMES[_COLUMNS[plan.sweep.metric]])
    likely = _likely_best(plan, uris, curve, _history(client, run.info.run_id, naming.EPISODES_METRIC))
    metadata = metadata_of(likely, plan.tracking_uri)
    value = metadata.metrics.get(plan.sweep.metric)
    item = {"uri": likely, "episode": metadata.episode, "num_timesteps": metadata.num_timesteps}
    score = newest.metrics.get(plan.sweep.metric)
    return TrialRow(run_id, record, score, (item, float(value)) if value is not None else None, tuple(_forward(curve)))


def _likely_best(
    plan: TrialPlan, uris: Sequence[str], curve: Sequence[tuple[int, float]], episodes: Sequence[tuple[int, float]]
) -> str:
    """Return the checkpoint that the curve says is the best: reading the metadata of thousands would take minutes."""
    rewards = dict(curve)
    known = sorted((int(episode), rewards[step]) for step, episode in episodes if step in rewards)
    rated: list[tuple[str, float]] = []
    for uri in uris:
        at = bisect.bisect_right(known, model_episode(uri.rpartition("/")[2]) or 0, key=lambda pair: pair[0])
        if at:
            rated.append((uri, known[at - 1][1]))
    found: tuple[str, float] | None = _better(plan)(rated, key=lambda pair: pair[1], default=None)
    return found[0] if found is not None else uris[-1]


def _history(client: Any, mlflow_run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(mlflow_run_id, name)]
