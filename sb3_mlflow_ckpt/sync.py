"""Owns catching up: what mirrors missed of the runs on disk, lost or have otherwise is sent from their folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sb3_mlflow_ckpt.checkpoints import run_folders
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.errors import CheckpointError, ConfigError, MirrorUnavailableError, RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal, read_record
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
        changes: What was sent or healed, a line each.
        outage: Whether the mirror did not answer at all.
    """

    folder: Path
    mirror: str
    error: str | None
    changes: tuple[str, ...] = ()
    outage: bool = False


@dataclass(frozen=True)
class MirrorAddresses:
    """Where mirrors are, as far as somebody names them: the run's own address is taken where one is None.

    Attributes:
        tracking_uri: MLflow's tracking URI.
        mongo_uri: The MongoDB.
        mongo_db: The database's name.
    """

    tracking_uri: str | None = None
    mongo_uri: str | None = None
    mongo_db: str | None = None


THE_RUNS_OWN = MirrorAddresses()


class Healing(Mirror, Protocol):
    """A mirror that can be compared with the folder, whatever the ledger says that it has."""

    @property
    def address(self) -> str:
        """Where it is, without credentials."""
        ...

    def heal(self, journal: RunJournal, *, verify: bool) -> Iterable[str]:
        """Make the mirror what the folder says; give what was changed, a line each."""
        ...


def sync_runs(
    checkpoint_dir: str | Path = "checkpoints",
    addresses: MirrorAddresses = THE_RUNS_OWN,
    *,
    run_id: str | None = None,
    agent_id: str | None = None,
    verify: bool = False,
) -> list[SyncResult]:
    """Make MLflow and MongoDB what the runs below a checkpoint folder say. Doing it twice changes nothing.

    What is missing there is sent, whether it never was, was deleted or was edited.

    A run is sent to the mirrors that it had, and to those that are named here. A run that is training now is left
    to its own process.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        addresses: Where the mirrors are.
        run_id: Only this run.
        agent_id: Only this agent.
        verify: Whether to download and hash the checkpoints in MLflow; names, sizes and metadata are compared always.

    Raises:
        InvalidIdError: An id could leave the folder.
    """
    # The oldest first: a run that is made anew in MLflow must be there before those below it.
    folders = sorted(run_folders(checkpoint_dir, run_id, agent_id), key=_started_at)
    # What did not answer is not asked again for each of many runs.
    down: dict[str, str] = {}
    return [
        result
        for folder in folders
        if folder.record.exists()
        for result in _sync_folder(folder, addresses, verify, down)
    ]


def _sync_folder(folder: RunFolder, addresses: MirrorAddresses, verify: bool, down: dict[str, str]) -> list[SyncResult]:
    try:
        journal = RunJournal(folder)
    except RunFolderBusyError:
        return [SyncResult(folder.path, "", "it is training now; its own process sends it")]
    except (CheckpointError, OSError) as error:
        return [SyncResult(folder.path, "", str(error))]
    try:
        results = []
        for mirror in mirrors_of(journal.record, addresses):
            if mirror.address in down:
                results.append(SyncResult(folder.path, mirror.name, down[mirror.address]))
                continue
            results.append(send(folder, journal, mirror, verify=verify))
            if results[-1].outage:
                down[mirror.address] = str(results[-1].error)
        return results or [SyncResult(folder.path, "no mirror", None)]
    except ConfigError as error:
        return [SyncResult(folder.path, "", str(error))]
    finally:
        journal.close()


def _started_at(folder: RunFolder) -> tuple[str, str, str]:
    try:
        started = str(read_record(folder).get("started_at") or "")
    except (CheckpointError, OSError):
        started = ""
    return started, folder.agent_id, folder.run_id


def send(folder: RunFolder, journal: RunJournal, mirror: Healing, *, verify: bool = False) -> SyncResult:
    """Send what one mirror lacks of a run, or has otherwise, and close it."""
    changes: list[str] = []
    try:
        for change in mirror.heal(journal, verify=verify):
            changes.append(change)
    except MirrorUnavailableError as error:
        return SyncResult(folder.path, mirror.name, str(error), tuple(changes), outage=not error.refused)
    except Exception as error:
        # Each client raises errors of its own; one run's failure must not keep the others from being sent.
        reason = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0]
        return SyncResult(folder.path, mirror.name, reason[:300], tuple(changes))
    finally:
        mirror.close()
    return SyncResult(folder.path, mirror.name, None, tuple(changes))


def mirrors_of(record: Mapping[str, Any], addresses: MirrorAddresses) -> list[Healing]:
    """Return the mirrors of a run: those that its record names, at the addresses given or else at its own.

    Raises:
        ConfigError: The record's address lacks the password that it had.
    """
    mirrors: list[Healing] = []
    names = record.get("mirrors", ())
    if addresses.tracking_uri is not None or "MLflow" in names:
        from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror

        known = record.get("mlflow") or {}
        config = record.get("config") or {}
        address = addresses.tracking_uri or _tracking_uri(known.get("tracking_uri"))
        mirrors.append(
            MLflowMirror(
                address,
                known.get("experiment_name"),
                keep_last_n=config.get("mlflow_keep_last_n_checkpoints", 0),
                keep_best_n=config.get("keep_best_n", 0),
                keep_every_n_episodes=config.get("keep_every_n_episodes", 0),
            )
        )
    if addresses.mongo_uri is not None or "MongoDB" in names:
        from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror

        known = record.get("mongo") or {}
        address = addresses.mongo_uri or known.get("uri")
        if not address or _HIDDEN in address:
            raise ConfigError("mongo_uri", f"is needed: the record knows it without its password ({address})")
        mirrors.append(MongoMirror(address, addresses.mongo_db or known.get("database") or _DATABASE))
    return mirrors


def _tracking_uri(known: str | None) -> str | None:
    if not known or _HIDDEN not in known:
        return known or None
    import mlflow

    # Its password is not in the record; MLflow's own setting may have it.
    if redact(mlflow.get_tracking_uri()) == known:
        return None
    raise ConfigError("tracking_uri", f"is needed: the record knows it without its password ({known})")
