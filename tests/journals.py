"""Owns runs that tests write without training: a journal, fake zips, metadata that fits them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry
from sb3_mlflow_ckpt.runs.document import new_record


def start_run(
    checkpoint_dir: Path,
    run_id: str,
    *,
    agent_id: str = "ppo_agent",
    config: dict[str, Any] | None = None,
    **fields: Any,
) -> RunJournal:
    """Start a run in a folder; `fields` change its record."""
    journal = RunJournal(RunFolder(checkpoint_dir, agent_id, run_id))
    journal.start({**new_run(run_id, agent_id, config), **fields})
    return journal


def new_run(run_id: str, agent_id: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the record of a run that starts."""
    return new_record(
        run_id=run_id,
        agent_id=agent_id,
        name=None,
        algo="PPO",
        env_id="CartPole-v1",
        config=config or {},
        total_timesteps=1000,
        parent=None,
        root_run_id=None,
        heartbeat_seconds=10.0,
        environment={"host": "here", "pid": 1, "versions": {"python": "3.11"}},
    )


def commit(folder: RunFolder, episode: int, content: bytes = b"a zip") -> CheckpointMetadata:
    """Commit a checkpoint whose zip is no zip, without a line in the journal."""
    path = folder.model(episode)
    metadata = CheckpointMetadata(
        episode=episode,
        run_id=folder.run_id,
        config={},
        timestamp=f"2026-01-01T00:00:{episode % 60:02d}.000Z",
        agent_id=folder.agent_id,
        algo="PPO",
        num_timesteps=10 * episode,
        files=[FileEntry(name=path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())],
        metrics={"mean_reward": episode / 2},
    )
    atomic.write_bytes(path, content)
    atomic.write_bytes(folder.metadata(episode), atomic.dump_json(metadata.to_json()))
    return metadata


def save(journal: RunJournal, episode: int, content: bytes = b"a zip") -> None:
    """Commit a checkpoint and note it."""
    journal.add_saved(commit(journal.folder, episode, content))


def mirror(journal: RunJournal, episode: int, uri: str) -> None:
    """Note that a checkpoint lies in the mirror as it is on disk."""
    journal.add_mirrored(episode, uri, journal.ledger.saved[episode]["sha256"])


def unmirror(journal: RunJournal, episode: int) -> None:
    """Note that the mirror's retention removed its copy of a checkpoint as it is on disk."""
    journal.add_unmirrored(episode, journal.ledger.saved[episode]["sha256"])


def prune(journal: RunJournal, episode: int) -> None:
    """Remove a checkpoint's files and note it."""
    journal.folder.metadata(episode).unlink()
    journal.folder.model(episode).unlink()
    journal.add_pruned(episode)


def add_point(journal: RunJournal, num_timesteps: int, **values: Any) -> None:
    """Append a point of the learning curve; its time follows from its steps."""
    seconds = num_timesteps // 10
    time = f"2026-01-01T{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.000Z"
    journal.add_metrics({"num_timesteps": num_timesteps, "episode": num_timesteps // 10, "time": time, **values})
