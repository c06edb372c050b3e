"""Owns making a run's record anew from what else its folder holds."""

from __future__ import annotations

from typing import Any

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.ledger import CheckpointLedger, committed_episodes
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.runs.document import new_record
from sb3_mlflow_ckpt.verification import read_metadata

_STATUS = {"end": "completed", "signal": "interrupted"}
RECORD_LOST = "RecordLost"


def rebuilt_record(folder: RunFolder, ledger: CheckpointLedger, *, damaged: bool) -> dict[str, Any] | None:
    """Return the record of a run whose own was lost; None where there is nothing to make it from, or no run.

    Args:
        folder: The run folder, which no process holds.
        ledger: What its `checkpoints.jsonl` tells.
        damaged: Whether there is a record that cannot be read: then there was a run.
    """
    newest = _newest(folder)
    if newest is None or not (damaged or folder.metrics.exists() or folder.events.exists()):
        return None
    points = json_lines.read_lines(folder.metrics)[0]
    last: dict[str, Any] = points[-1] if points else {}
    times = [newest.timestamp, *(time for time in [last.get("time")] if isinstance(time, str))]
    record = new_record(
        run_id=folder.run_id,
        agent_id=folder.agent_id,
        name=newest.config.get("run_name"),
        algo=newest.algo,
        env_id=newest.config.get("env_id"),
        config=newest.config,
        total_timesteps=newest.config.get("total_timesteps"),
        parent=newest.parent.model_dump() if newest.parent is not None else None,
        root_run_id=newest.root_run_id,
        heartbeat_seconds=10.0,
        environment={"host": None, "pid": None, "command": None, "git": None, "versions": dict(newest.versions)},
    )
    total = record["progress"]["total_timesteps"]
    reached = isinstance(total, int) and newest.num_timesteps >= total and newest.trigger != "exception"
    status = "completed" if reached else _STATUS.get(newest.trigger, "failed")
    message = "The run's record was lost; it was rebuilt from its checkpoints and its learning curve"
    return record | {
        "status": status,
        "error": {"type": RECORD_LOST, "message": message, "traceback": None} if status == "failed" else None,
        "progress": {
            **record["progress"],
            "num_timesteps": max(newest.num_timesteps, _count(last.get("num_timesteps"))),
            "episode": max(newest.finished_episodes, _count(last.get("episode"))),
            "mean_reward": last.get("ep_rew_mean", newest.metrics.get("mean_reward")),
        },
        "started_at": points[0]["time"] if points and isinstance(points[0].get("time"), str) else min(times),
        "heartbeat_at": max(times),
        "ended_at": max(times),
        "rebuilt": True,
        **_mirrors(newest.config, ledger),
    }


def _count(value: Any) -> int:
    # A line that somebody edited may hold anything.
    return value if type(value) is int and value >= 0 else 0


def _mirrors(config: dict[str, Any], ledger: CheckpointLedger) -> dict[str, Any]:
    """Return which mirrors the run had, as far as its configuration and its uploads tell."""
    uris = [uri for uri in ledger.uris.values() if uri.startswith("runs:/")]
    names = ["MLflow"] * bool(uris or config.get("mlflow"))
    known: dict[str, Any] = {}
    if names:
        run_id = uris[-1].split("/")[1] if uris else None
        known["mlflow"] = {
            "tracking_uri": config.get("tracking_uri"),
            "experiment_name": config.get("experiment_name"),
            "experiment_id": None,
            "run_id": run_id,
        }
    if config.get("mongo_uri"):
        names.append("MongoDB")
        known["mongo"] = {"uri": config["mongo_uri"], "database": config.get("mongo_db")}
    return {**known, "mirrors": names}


def _newest(folder: RunFolder) -> CheckpointMetadata | None:
    found = []
    for episode in committed_episodes(folder):
        try:
            found.append(read_metadata(folder.model(episode)))
        except (CheckpointError, OSError):
            continue
    return max(found, key=lambda metadata: (metadata.timestamp, metadata.episode), default=None)
