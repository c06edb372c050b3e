"""Owns catching up: what mirrors missed of the runs on disk is sent from their folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.checkpoints import run_folders
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.errors import CheckpointError, ConfigError, RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.runs.document import redact

_HIDDEN = "***"
_DATABASE = str(TrainingConfig.model_fields["mongo_db"].default)


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
    mongo_db: str | None = None,
) -> list[SyncResult]:
    """Send what MLflow and MongoDB lack of the runs below a checkpoint folder. Doing it twice changes nothing.

    A run is sent to the mirrors that it had, and to those that are named here. A run that is training now is left
    to its own process.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run.
        agent_id: Only this agent.
        tracking_uri: MLflow's tracking URI; the run's own where it is None.
        mongo_uri: The MongoDB; the run's own where it is None.
        mongo_db: The database's name; the run's own where it is None.

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
            try:
                mirrors = mirrors_of(journal.record, tracking_uri, mongo_uri, mongo_db)
            except ConfigError as error:
                results.append(SyncResult(folder.path, "", str(error)))
                continue
            results += [send(folder, journal, mirror) for mirror in mirrors]
            if not mirrors:
                results.append(SyncResult(folder.path, "no mirror", None))
        finally:
            journal.close()
    return results


def send(folder: RunFolder, journal: RunJournal, mirror: Mirror) -> SyncResult:
    """Send what one mirror lacks of a run, and close it."""
    try:
        mirror.replicate(journal)
    except Exception as error:
        # Each client raises errors of its own; one run's failure must not keep the others from being sent.
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]
        return SyncResult(folder.path, mirror.name, reason[:300])
    finally:
        mirror.close()
    return SyncResult(folder.path, mirror.name, None)


def mirrors_of(
    record: Mapping[str, Any], tracking_uri: str | None, mongo_uri: str | None, mongo_db: str | None
) -> list[Mirror]:
    """Return the mirrors of a run: those that its record names, at the addresses given or else at its own.

    Raises:
        ConfigError: The record's address lacks the password that it had.
    """
    mirrors: list[Mirror] = []
    names = record.get("mirrors", ())
    if tracking_uri is not None or "MLflow" in names:
        from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror

        known = record.get("mlflow") or {}
        config = record.get("config") or {}
        address = tracking_uri or _tracking_uri(known.get("tracking_uri"))
        mirrors.append(
            MLflowMirror(
                address,
                known.get("experiment_name"),
                keep_last_n=config.get("mlflow_keep_last_n_checkpoints", 0),
                keep_best_n=config.get("keep_best_n", 0),
                keep_every_n_episodes=config.get("keep_every_n_episodes", 0),
            )
        )
    if mongo_uri is not None or "MongoDB" in names:
        from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

        known = record.get("mongo") or {}
        address = mongo_uri or known.get("uri")
        if not address or _HIDDEN in address:
            raise ConfigError("mongo_uri", f"is needed: the record knows it without its password ({address})")
        mirrors.append(MongoMirror(address, mongo_db or known.get("database") or _DATABASE))
    return mirrors


def _tracking_uri(known: str | None) -> str | None:
    if not known or _HIDDEN not in known:
        return known or None
    import mlflow

    # Its password is not in the record; MLflow's own setting may have it.
    if redact(mlflow.get_tracking_uri()) == known:
        return None
    raise ConfigError("tracking_uri", f"is needed: the record knows it without its password ({known})")
