"""Owns catching up: what mirrors missed of the runs on disk is sent from their folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.checkpoints import run_folders
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.errors import CheckpointError, RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.runs.document import redact


@dataclass(frozen=True)
class SyncResult:
    """What became of one run and one mirror.

    Attributes:
        folder: The run folder.
        mirror: The mirror's name; "no mirror" where the run has none, empty where the folder could not be read.
        error: Why it did not succeed, or None.
    """

    folder: Path
    mirror: str
    error: str | None


def sync_runs(
    checkpoint_dir: str | Path = "checkpoints",
    *,
    run_id: str | None = None,
    agent_id: str | None = None,
    tracking_uri: str | None = None,
    mongo_uri: str | None = None,
    mongo_db: str = str(TrainingConfig.model_fields["mongo_db"].default),
) -> list[SyncResult]:
    """Send what MLflow and MongoDB lack of the runs below a checkpoint folder. Doing it twice changes nothing.

    A run that is tracked in MLflow is sent there, where `tracking_uri` is given also one that was not. A run that
    is training now is left to its own process.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run.
        agent_id: Only this agent.
        tracking_uri: MLflow's tracking URI; the run's own where it is None.
        mongo_uri: The database; none where it is None.
        mongo_db: The database's name.

    Raises:
        InvalidIdError: An id could leave the folder.
    """
    results: list[SyncResult] = []
    for folder in run_folders(checkpoint_dir, run_id, agent_id):
        if not folder.record.exists():
            continue
        try:
            journal = RunJournal(folder)
        except RunFolderBusyError:
            results.append(SyncResult(folder.path, "", "it is training now; its own process sends it"))
            continue
        except (CheckpointError, OSError) as error:
            results.append(SyncResult(folder.path, "", str(error)))
            continue
        try:
            mirrors = _mirrors(journal.record, tracking_uri, mongo_uri, mongo_db)
            results += [_send(folder, journal, mirror) for mirror in mirrors]
            if not mirrors:
                results.append(SyncResult(folder.path, "no mirror", None))
        finally:
            journal.close()
    return results


def _send(folder: RunFolder, journal: RunJournal, mirror: Mirror) -> SyncResult:
    try:
        mirror.replicate(journal)
    except Exception as error:
        # Each client raises errors of its own; one run's failure must not keep the others from being sent.
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]
        return SyncResult(folder.path, mirror.name, reason[:300])
    finally:
        mirror.close()
    return SyncResult(folder.path, mirror.name, None)


def _mirrors(record: Mapping[str, Any], tracking_uri: str | None, mongo_uri: str | None, mongo_db: str) -> list[Mirror]:
    mirrors: list[Mirror] = []
    if tracking_uri is not None or "MLflow" in record.get("mirrors", ()):
        from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror

        known = (record.get("mlflow") or {}).get("tracking_uri")
        keep = (record.get("config") or {}).get("mlflow_keep_last_n_checkpoints", 0)
        # A credential was removed from what the record says: then MLflow's own setting has to know the server.
        mirrors.append(
            MLflowMirror(tracking_uri or (known if known and "***" not in known else None), keep_last_n=keep)
        )
    if mongo_uri is not None:
        from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

        mirrors.append(MongoMirror(mongo_uri, mongo_db))
    return mirrors
