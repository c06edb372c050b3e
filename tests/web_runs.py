"""Owns a checkpoint folder with a run of every kind that the Training History shows, written without training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from journals import add_point, commit, mirror, prune, save, start_run

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.pins import pin_checkpoint

FIRST = "11111111111111111111111111111111"
SECOND = "22222222222222222222222222222222"
FAILED = "33333333333333333333333333333333"
EDITED = "44444444444444444444444444444444"
LOST = "55555555555555555555555555555555"
ORPHAN = "66666666666666666666666666666666"
UNREADABLE = "77777777777777777777777777777777"
HOSTILE_NAME = "<script>alert(1)</script> \u202e\x1b[31m \udc80 ☃"

READABLE = (FIRST, SECOND, FAILED, EDITED, LOST, ORPHAN)


def write_runs(checkpoint_dir: Path) -> list[RunJournal]:
    """Write them, and return the journals of those that can be read, closed."""
    journals = [
        _first(checkpoint_dir),
        _second(checkpoint_dir),
        _failed(checkpoint_dir),
        _edited(checkpoint_dir),
        _lost(checkpoint_dir),
        start_run(checkpoint_dir, ORPHAN, parent=_parent("9" * 32), status="interrupted", ended_at=_time(50)),
    ]
    for journal in journals:
        journal.close()
    os.utime(journals[4].folder.record, (0, 0))
    unreadable = RunFolder(checkpoint_dir, "ppo_agent", UNREADABLE)
    unreadable.path.mkdir()
    unreadable.record.write_text("{")
    return journals


def _time(minute: int) -> str:
    return f"2026-01-01T00:{minute:02d}:00.000Z"


def _parent(run_id: str) -> dict[str, Any]:
    return {"run_id": run_id, "checkpoint": f"{run_id}/ep000100.zip", "episode": 100, "sha256": "0" * 64}


def _first(checkpoint_dir: Path) -> RunJournal:
    config = {"seed": 2**70, "learning_rate": 3e-4, "hyperparameters": {"n_steps": 32}}
    journal = start_run(checkpoint_dir, FIRST, config=config, name="the first", started_at=_time(1))
    for episode in (50, 100, 150, 1_000_000):
        save(journal, episode)
    mirror(journal, 50, f"runs:/{FIRST}/checkpoints/ep000050.zip")
    mirror(journal, 100, f"runs:/{FIRST}/checkpoints/ep000100.zip")
    prune(journal, 100)
    prune(journal, 150)
    pin_checkpoint(journal.folder.model(50))
    for step in range(10, 2000, 10):
        add_point(journal, step, ep_rew_mean=step / 3, **{"train/loss": None})
    mlflow = {"tracking_uri": "http://***@mlflow.example:5000/", "experiment_id": "1", "run_id": FIRST}
    journal.update(status="completed", ended_at=_time(30), mlflow=mlflow, mirrors=["MLflow"])
    journal.update(progress={"num_timesteps": 1990, "total_timesteps": 2000, "episode": 199, "mean_reward": 663.3})
    return journal


def _second(checkpoint_dir: Path) -> RunJournal:
    journal = start_run(
        checkpoint_dir, SECOND, config={"seed": 1, "learning_rate": 1e-4}, started_at=_time(31),
        parent=_parent(FIRST), root_run_id=FIRST, overrides={"learning_rate": {"from": 3e-4, "to": 1e-4}},
    )  # fmt: skip
    save(journal, 150)
    for step in range(1010, 1500, 10):
        add_point(journal, step, ep_rew_mean=step / 2)
    return journal


def _failed(checkpoint_dir: Path) -> RunJournal:
    error = {"type": "ValueError", "message": "no </pre>", "traceback": "Traceback: <b>"}
    return start_run(
        checkpoint_dir, FAILED, agent_id="sac_agent", algo="SAC", env_id="Pendulum-v1", name=HOSTILE_NAME,
        status="failed", started_at=_time(40), ended_at=_time(41), error=error,
    )  # fmt: skip


def _edited(checkpoint_dir: Path) -> RunJournal:
    """A run whose record somebody edited: as far as it can be read, it is shown."""
    journal = start_run(checkpoint_dir, EDITED, agent_id="edited agent é")
    commit(journal.folder, 7)
    record = json.loads(journal.folder.record.read_bytes())
    record |= {
        "name": 5, "algo": None, "env_id": ["x"], "started_at": [1], "heartbeat_at": {}, "heartbeat_seconds": "often",
        "ended_at": True, "status": "running", "progress": {"num_timesteps": "many", "episode": None, "mean_reward": []},
        "parent": {"run_id": 7, "episode": "x"}, "error": {"message": 3}, "mlflow": {"tracking_uri": 1, "run_id": []},
        "config": {"seed": {"a.b": [1e308]}, "": None}, "overrides": {"lr": 3}, "attempt": 10**299, "host": None,
        "mirrors": [], "resume": {}, "versions": "all", "root_run_id": None,
    }  # fmt: skip
    journal.folder.record.write_text(json.dumps(record))
    return journal


def _lost(checkpoint_dir: Path) -> RunJournal:
    journal = start_run(checkpoint_dir, LOST, agent_id="sac_agent", algo="SAC", name="zzz", started_at=_time(45))
    journal.update(heartbeat_at="2020-01-01T00:00:00.000Z")
    return journal
