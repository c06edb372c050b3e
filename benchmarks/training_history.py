"""Measures the Training History over many runs: from run folders, and from a MongoDB-compatible server.

    python benchmarks/training_history.py --runs 10000 --checkpoints 5000 --points 1000000

makes that many runs, and one run of that many checkpoints on disk and points of its curve, and prints how long a server
takes to answer, its memory and the weight of its pages. `--mongo-uri` names a database to fill and to measure as well.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.atomic import dump_json
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry
from sb3_mlflow_ckpt.runs.document import new_record

AGENTS = ("ppo_agent", "dqn_agent", "sac_agent", "a2c_agent")
ENVIRONMENTS = ("CartPole-v1", "LunarLander-v3", "Pendulum-v1", "Ant-v5")
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
BIG = "f" * 32


def stamp(seconds: float) -> str:
    """Return a time after `START` as records hold it."""
    return (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def record_of(number: int, run_id: str, chance: random.Random) -> dict[str, Any]:
    """Return a record as a training of a day leaves it."""
    agent = AGENTS[number % len(AGENTS)]
    status = chance.choices(("completed", "failed", "interrupted", "running"), (80, 8, 10, 2))[0]
    record = new_record(
        run_id=run_id,
        agent_id=agent,
        name=f"sweep {number // 10} trial {number % 10}",
        algo=agent.split("_")[0].upper(),
        env_id=chance.choice(ENVIRONMENTS),
        config={"seed": number, "hyperparameters": {f"setting_{n}": chance.random() for n in range(20)}},
        total_timesteps=1_000_000,
        parent=None,
        root_run_id=None,
        heartbeat_seconds=10.0,
        environment={"host": f"node-{number % 16}", "pid": number, "command": "train " * 20, "versions": {"python": "3.11"}},
    )
    ended = None if status == "running" else stamp(600 * number + 86_400)
    progress = {**record["progress"], "num_timesteps": 1_000_000, "episode": 5000, "mean_reward": chance.gauss(100, 50)}
    times = {"started_at": stamp(600 * number), "heartbeat_at": stamp(600 * number + 86_000), "ended_at": ended}
    return {**record, "status": status, "progress": progress, **times, "mirrors": ["MLflow"]}


def points_of(count: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the points of a curve, one a second."""
    for number in range(count):
        reward = 100 * number / count + chance.gauss(0, 5)
        extra = {"train/loss": chance.random(), "train/entropy_loss": -chance.random(), "ep_len_mean": 200.0}
        row = {"num_timesteps": 400 * number, "episode": 2 * number, "time": stamp(number), "ep_rew_mean": reward}
        yield {**row, **extra, "steps_per_second": 400.0}


def write_run(folder: RunFolder, record: dict[str, Any], points: Iterator[dict[str, Any]], checkpoints: int) -> None:
    """Write a run folder as a training leaves it, without its waits for the disk."""
    folder.path.mkdir(parents=True)
    folder.record.write_bytes(dump_json(record))
    with folder.metrics.open("wb") as file:
        for point in points:
            file.write(dump_json(point, indent=None))
    with folder.events.open("wb") as file:
        for episode in range(1, checkpoints + 1):
            content = f"{folder.run_id} {episode}".encode()
            path = folder.model(episode)
            entry = FileEntry(name=path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            metadata = CheckpointMetadata(
                episode=episode,
                run_id=folder.run_id,
                config=record["config"],
                timestamp=stamp(100 * episode),
                agent_id=folder.agent_id,
                algo=record["algo"],
                num_timesteps=200 * episode,
                files=[entry],
                metrics={"mean_reward": float(episode)},
            )
            path.write_bytes(content)
            folder.metadata(episode).write_bytes(dump_json(metadata.to_json()))
            facts = {"episode": episode, "num_timesteps": 200 * episode, "timestamp": stamp(100 * episode)}
            saved = {**facts, "bytes": entry.bytes, "sha256": entry.sha256, "mean_reward": float(episode), "trigger": "interval"}
            file.write(dump_json({"event": "saved", **saved}, indent=None))


def write_runs(checkpoint_dir: Path, runs: int, checkpoints: int, points: int) -> None:
    """Write all runs."""
    chance = random.Random(0)
    for number in range(runs):
        run_id = f"{number:032x}"
        record = record_of(number, run_id, chance)
        write_run(RunFolder(checkpoint_dir, record["agent_id"], run_id), record, points_of(50, chance), 3)
    record = {**record_of(0, BIG, chance), "started_at": stamp(600 * runs + 600), "status": "completed"}
    write_run(RunFolder(checkpoint_dir, record["agent_id"], BIG), record, points_of(points, chance), checkpoints)
