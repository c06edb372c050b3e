"""Owns what things are called in MLflow: a record's parameters, tags and metrics. Sends nothing."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.config import TrainingConfig, flatten, inheritable_fields

if TYPE_CHECKING:
    from mlflow.entities import Metric

LATEST_TAG = "mlflow.latest_checkpoint_artifact"
PARENT_TAG = "mlflow.parentRunId"
TAG_PREFIX = "sb3_mlflow_ckpt."
RUN_ID_TAG = f"{TAG_PREFIX}run_id"
ATTEMPT_TAG = f"{TAG_PREFIX}attempt"
STARTED_TAG = f"{TAG_PREFIX}started_at"
ERROR_TAG = f"{TAG_PREFIX}error"
SWEEP_TAG = "sb3_mlflow_ckpt_sweep"
"""Not below the prefix of trainings' tags: this run has no folder, and none that is looked for."""
SWEEP_HOST_TAG = f"{SWEEP_TAG}.host"
SWEEP_PID_TAG = f"{SWEEP_TAG}.pid"
EPISODES_METRIC = "rollout/episodes"
METRIC_NAMES = {
    "ep_rew_mean": "rollout/ep_rew_mean",
    "ep_len_mean": "rollout/ep_len_mean",
    "episode": EPISODES_METRIC,
    "steps_per_second": "time/steps_per_second",
}
"""Columns of the learning curve, under the names that SB3's own logger gives them."""
STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""What MLflow calls the end of a run."""
_SWEEP_TAGS = ("id", "trial", "generation", "ended_by")
_LONGEST_VALUE = 6000
_LONGEST_NAME = 250
_LONGEST_ATTEMPT = 10


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what of a configuration is logged as parameters: what decides the training, not where it runs."""
    wanted = {"mode", *inheritable_fields()}
    chosen = {key: value for key, value in config.items() if key in wanted or key not in TrainingConfig.model_fields}
    return {
        _name(key): str(value)[:_LONGEST_VALUE]
        for key, value in flatten(chosen).items()
        if value is not None and value not in ({}, [])
    }


def _name(key: str) -> str:
    """Return a parameter's or metric's name as MLflow takes it: `loss[0]` -> `loss_0_`."""
    name = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:_LONGEST_NAME]
    # It also refuses names that are no path in its normal form.
    return name if posixpath.normpath(name) == name and not name.startswith(("/", ".")) else re.sub(r"[./]", "_", name)


def same(present: str, value: str) -> bool:
    """Return whether two texts of a parameter say the same: `7.0` is what `mlflow run` makes of 7."""
    if present == value:
        return True
    try:
        return float(present) == float(value)
    except ValueError:
        return False


def tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a record's tags: what it is, where it came from, and that in a sentence."""
    named = {
        RUN_ID_TAG: str(record["run_id"]),
        f"{TAG_PREFIX}agent_id": str(record["agent_id"]),
        f"{TAG_PREFIX}algo": str(record["algo"]),
        f"{TAG_PREFIX}status": str(record["status"]),
        f"{TAG_PREFIX}root_run_id": str(record.get("root_run_id")),
        ATTEMPT_TAG: str(record.get("attempt", 1)),
        STARTED_TAG: str(record.get("started_at")),
    }
    if record.get("env_id"):
        named[f"{TAG_PREFIX}env_id"] = str(record["env_id"])
    if record.get("error"):
        named[ERROR_TAG] = f"{record['error']['type']}: {record['error']['message']}"[:_LONGEST_VALUE]
    sweep = record.get("sweep")
    if sweep:
        named |= {f"{TAG_PREFIX}sweep.{key}": str(sweep[key]) for key in _SWEEP_TAGS if sweep.get(key) is not None}
    parent = record.get("parent")
    if parent:
        for key in ("run_id", "checkpoint", "episode", "sha256"):
            named[f"{TAG_PREFIX}parent.{key}"] = str(parent.get(key))
        changed = ", ".join(f"{key} {d['from']} -> {d['to']}" for key, d in (record.get("overrides") or {}).items())
        named["mlflow.note.content"] = (
            f"Resumed from episode {parent['episode']} of run {parent['run_id']} ({parent['checkpoint']})"
            + (f" with {changed}." if changed else ".")
        )[:_LONGEST_VALUE]
    return named


def attempt_of(tags: Mapping[str, str]) -> int | None:
    """Return the number of the attempt that has sent tags last; None where they tell of none: anybody can write one."""
    attempt = tags.get(ATTEMPT_TAG, "")
    return int(attempt) if attempt.isdecimal() and len(attempt) < _LONGEST_ATTEMPT else None


def is_later(attempt: int | None, record: Mapping[str, Any]) -> bool:
    """Return whether an attempt came after that of a record: what this one has is not to be sent any more."""
    # A record that was lost and rebuilt does not know how many there were.
    return (attempt or 0) > int(record.get("attempt", 1)) and not record.get("rebuilt")


def metrics(point: Mapping[str, Any]) -> Sequence[Metric]:
    """Return a point of the learning curve as metrics at its step and time; empty for one that lacks either."""
    from mlflow.entities import Metric

    timestamp, step = milliseconds(point.get("time")), point.get("num_timesteps")
    if timestamp is None or not isinstance(step, int):
        return []
    return [
        Metric(METRIC_NAMES.get(key) or _name(key), float(value), timestamp, step)
        for key, value in point.items()
        if key != "num_timesteps" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def milliseconds(timestamp: Any) -> int | None:
    """Return a record's time as MLflow counts it, or None for what is no time."""
    try:
        return int(datetime.fromisoformat(str(timestamp).replace("Z", "+00:00")).timestamp() * 1000)
    except ValueError:
        return None
