"""Owns the shape of a run record: what `run.json` and the collection `training_runs` hold. Pure.

Checkpoints and the learning curve are kept beside the record (`checkpoints.jsonl`, `metrics.jsonl`;
`training_checkpoints`, `training_metrics`), so that a record's size does not grow with the run's length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from sb3_mlflow_ckpt.metadata import timestamp_now
from sb3_mlflow_ckpt.redaction import redact as redact
from sb3_mlflow_ckpt.redaction import redact_all as redact_all

SCHEMA_VERSION = 1

TERMINAL_STATUSES: tuple[str, ...] = ("completed", "failed", "interrupted")
STATUSES: tuple[str, ...] = ("running", "stalled", "lost", *TERMINAL_STATUSES)
"""What readers show; `stalled` and `lost` are derived and never stored."""

# What the code relies on where it reads a record that somebody may have edited.
_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("run_id", "agent_id", "status", "root_run_id"), str),
    **dict.fromkeys(("config", "progress", "parent", "overrides", "error", "mlflow", "mongo", "resume", "sweep"), dict),
    "attempt": int,
    "mirrors": list,
}


def plain(value: Any) -> Any:
    """Return a configuration as plain JSON that reads back as the same settings.

    Infinities, which JSON lacks, become the texts that `TrainingConfig` takes for them; numpy's values become
    Python's; a class becomes `module:Name`; anything else its text.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    # numpy's scalars and arrays, without importing numpy.
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinities."""
    return None if value is None or not math.isfinite(value) else float(value)


def new_record(
    *,
    run_id: str,
    agent_id: str,
    name: str | None,
    algo: str,
    env_id: str | None,
    config: Mapping[str, Any],
    total_timesteps: int | None,
    parent: Mapping[str, Any] | None,
    root_run_id: str | None,
    heartbeat_seconds: float,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record of a run that starts now.

    Args:
        run_id: The run's id.
        agent_id: The agent's id.
        name: What a person calls the run.
        algo: Name of the algorithm.
        env_id: Name of the environment, if it is known.
        config: The training configuration, as plain JSON; credentials are removed here.
        total_timesteps: The target of the whole training.
        parent: `{run_id, checkpoint, episode, sha256}` of the checkpoint that it resumes.
        root_run_id: The first run of the chain; this one where it is None.
        heartbeat_seconds: How often `heartbeat_at` is renewed.
        environment: `host`, `pid`, `command`, `git`, `versions`.
    """
    now = timestamp_now()
    record: dict[str, Any] = redact_all(
        {
            "run_id": run_id,
            "schema_version": SCHEMA_VERSION,
            "agent_id": agent_id,
            "name": name,
            "algo": algo,
            "env_id": env_id,
            "status": "running",
            "attempt": 1,
            "config": dict(config),
            "overrides": {},
            "resume": None,
            "parent": dict(parent) if parent else None,
            "root_run_id": root_run_id or run_id,
            "progress": {
                "num_timesteps": 0,
                "total_timesteps": total_timesteps,
                "episode": 0,
                "steps_per_second": None,
                "mean_reward": None,
                "best_mean_reward": None,
            },
            "started_at": now,
            "heartbeat_at": now,
            "heartbeat_seconds": heartbeat_seconds,
            "last_step_at": None,
            "ended_at": None,
            "error": None,
            "mlflow": None,
            "mongo": None,
            **dict(environment),
        }
    )
    return record


def wrong_field(record: Mapping[str, Any]) -> str | None:
    """Return the first field of a record that is of another kind than the code relies on, or None."""
    for key, kind in _KINDS.items():
        value = record.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            return key
    mirrors = record.get("mirrors") or []
    return None if all(isinstance(name, str) for name in mirrors) else "mirrors"


def derived_status(record: Mapping[str, Any], now: datetime | None = None, seen: datetime | None = None) -> str:
    """Return a record's status as a reader shows it.

    A running run is `lost` where its heartbeat is stale, and `stalled` where its process lives but its last
    environment step is stale by the clock of that process. Stale is older than max(120 s, 8 heartbeats). A late
    heartbeat or step makes the run running again, so neither is ever written.

    Args:
        record: The record.
        now: The present; this host's where it is None.
        seen: When the store saw the last heartbeat, by the clock that `now` is of; `heartbeat_at`, which is by the
            clock of the run's own host, where it is None.
    """
    status = str(record.get("status"))
    if status != "running":
        return status
    try:
        heartbeat = seen or heartbeat_time(record)
        age = ((now or datetime.now(timezone.utc)) - heartbeat).total_seconds()
        if age > _stale_after(record):
            return "lost"
        if record.get("last_step_at") is None:
            return status
        idle = (heartbeat_time(record) - _time(record["last_step_at"])).total_seconds()
        return "stalled" if idle > _stale_after(record) else status
    except (ValueError, TypeError):
        return status  # Somebody edited the record: what it says of its heart cannot be judged.


def last_sign_of_life(record: Mapping[str, Any], written: datetime, now: datetime | None = None) -> datetime:
    """Return when a run that is kept in a file lived last, by two clocks of which one may be wrong.

    Args:
        record: The record.
        written: When the file was written, as its file system tells.
        now: The present; this host's where it is None.

    Returns:
        The newer of `written` and `heartbeat_at`; a heartbeat that is still to come tells of a wrong clock alone.
    """
    try:
        heartbeat = heartbeat_time(record)
        ahead = (heartbeat - (now or datetime.now(timezone.utc))).total_seconds()
        return written if ahead > _stale_after(record) else max(written, heartbeat)
    except (ValueError, TypeError):
        return written


def heartbeat_time(record: Mapping[str, Any]) -> datetime:
    """Return `heartbeat_at`; raises ValueError or TypeError where it is no time."""
    return _time(record.get("heartbeat_at"))


def _time(value: Any) -> datetime:
    return datetime.fromisoformat(str(value).replace("Z", "+00:00"))


def _stale_after(record: Mapping[str, Any]) -> float:
    return max(120.0, 8 * float(record.get("heartbeat_seconds") or 0))


def checkpoint_entry(
    saved: Mapping[str, Any], *, path: str, uri: str | None, on_disk: bool, pinned: bool = False
) -> dict[str, Any]:
    """Return one item of `checkpoint_paths`.

    Args:
        saved: The facts of the commit: `episode`, `num_timesteps`, `timestamp`, `bytes`, `sha256`,
            `mean_reward`, `trigger`.
        path: Where its zip lies or lay.
        uri: Its address in the MLflow mirror, if it is there.
        on_disk: Whether the zip is still in the run folder.
        pinned: Whether it is marked to stay there.

    Returns:
        The item; `state` is `mirrored` (a mirror holds it), `local` (only the disk does) or `pruned` (nobody).
    """
    return {
        "episode": saved["episode"],
        "path": path,
        "uri": uri,
        "num_timesteps": saved.get("num_timesteps"),
        "timestamp": saved.get("timestamp"),
        "bytes": saved.get("bytes"),
        "sha256": saved.get("sha256"),
        "mean_reward": saved.get("mean_reward"),
        "trigger": saved.get("trigger"),
        "state": "mirrored" if uri else "local" if on_disk else "pruned",
        "on_disk": on_disk,
        "pinned": pinned and on_disk,
    }
