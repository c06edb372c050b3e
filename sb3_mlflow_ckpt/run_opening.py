"""Owns how a run begins: which training it belongs to, its first record, and what its mirrors answer."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.algorithms import algorithm_name
from sb3_mlflow_ckpt.commit import prepare_folder
from sb3_mlflow_ckpt.errors import MirrorUnavailableError, TrainingInterrupted
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.leases import Lease
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.metadata import ParentReference
from sb3_mlflow_ckpt.origins import origin
from sb3_mlflow_ckpt.provenance import environment
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.resumption import ResumeState, Resumption
from sb3_mlflow_ckpt.runs.document import new_record

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger(__name__)

_START_OFFLINE = "with start_offline it trains at once and sends the records when it is back"


class Lineage:
    """Which training a run belongs to, and what it goes on from.

    Args:
        run_id: The id that the caller gave the run.

    Attributes:
        run_id: The run's id, as far as it is known.
        parent: The checkpoint that it goes on from.
        root_run_id: The first run of the chain of resumes.
        episode: Finished episodes when it begins.
        resumption: What brings the model to where its checkpoint was taken.
    """

    def __init__(self, run_id: str | None) -> None:
        self._given_run_id = run_id
        self.run_id = run_id
        self.parent: ParentReference | None = None
        self._parent_of_source: ParentReference | None = None
        self.root_run_id: str | None = None
        self.episode = 0
        self.resumption: Resumption | None = None

    def take_up(self, model: BaseAlgorithm, mode: ResumeState, overrides: Mapping[str, Any]) -> None:
        """Find out where a model stands that this callback has not trained so far."""
        self.run_id, self.parent, self.root_run_id = self._given_run_id, None, None
        self._parent_of_source = None
        self.episode, self.resumption = 0, None
        came_from = origin(model)
        if model.num_timesteps == 0 or came_from is None:
            return
        metadata = came_from.metadata
        self.parent, self.episode = came_from.reference, metadata.finished_episodes
        self._parent_of_source = metadata.parent
        self.root_run_id = metadata.root_run_id or metadata.run_id
        # Of a model that was trained further since, the checkpoint says nothing any more.
        if metadata.num_timesteps == model.num_timesteps:
            self.resumption = Resumption(model, came_from, mode, overrides)

    def name(self, run_id: str) -> None:
        """Take note of the run's id: one that goes on from its own checkpoint keeps the parent that it had."""
        self.run_id = run_id
        self.root_run_id = self.root_run_id or run_id
        if self.parent is not None and self.parent.run_id == run_id and self._parent_of_source is not None:
            self.parent = self._parent_of_source

    def go_on(self) -> None:
        """Begin a further `learn` of the same model: in the same run, with nothing to bring back."""
        self.resumption = None


def first_record(
    model: BaseAlgorithm,
    lineage: Lineage,
    *,
    agent_id: str,
    name: str | None,
    config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    heartbeat_seconds: float,
) -> dict[str, Any]:
    """Return the record of a run that begins, before its mirrors have named it."""
    total_timesteps = config.get("total_timesteps") or model._total_timesteps
    record = new_record(
        run_id=lineage.run_id or "",
        agent_id=agent_id,
        name=name,
        algo=algorithm_name(type(model)),
        env_id=config.get("env_id"),
        config=dict(config),
        total_timesteps=total_timesteps,
        parent=lineage.parent.model_dump() if lineage.parent is not None else None,
        root_run_id=lineage.root_run_id,
        heartbeat_seconds=heartbeat_seconds,
        environment=environment(),
    )
    return {**record, "overrides": dict(overrides)}


def open_run(
    record: Mapping[str, Any],
    lineage: Lineage,
    checkpoint_dir: Path,
    mirrors: Sequence[Mirror],
    options: RunOptions,
    *,
    start_offline: bool,
    fresh: bool,
    lease: Lease | None,
    check: Callable[[], None],
) -> LiveRun:
    """Begin a run: its folder, its mirrors, its record.

    Args:
        record: Its first record.
        lineage: Is told the ids that the run comes to.
        checkpoint_dir: The folder that holds agents' folders.
        mirrors: Where it is copied to.
        options: How it is kept.
        start_offline: Begin even if a mirror does not answer.
        fresh: Whether the training begins at its beginning.
        lease: Holds the checkpoint that it goes on from, until it has one of its own.
        check: Is called before the run is recorded; what it raises takes back what was made.

    Raises:
        CheckpointSaveError: The folder cannot be written to.
        MirrorUnavailableError: A mirror does not answer.
        RunFolderBusyError: The folder is in use.
        RunFolderTakenError: The folder holds checkpoints of another training.
    """
    # Before anything is made elsewhere: no run must be left behind in MLflow for a disk that refuses.
    prepare_folder(checkpoint_dir)
    try:
        try:
            run_id = _open_mirrors(record, mirrors, lineage.run_id, start_offline)
        finally:
            # Whoever asked it to stop is not told that a server does not answer.
            check()
        lineage.name(run_id)
        record = {**record, "run_id": run_id, "root_run_id": lineage.root_run_id}
        record["parent"] = lineage.parent.model_dump() if lineage.parent is not None else None
        for mirror in mirrors:
            record |= mirror.describe() | mirror.earlier()
        folder = RunFolder(checkpoint_dir, str(record["agent_id"]), run_id)
        return LiveRun(folder, record, mirrors, options, fresh=fresh, lease=lease)
    except BaseException as error:
        # No run may be left behind in MLflow that never trains.
        cancel(mirrors, "interrupted" if isinstance(error, TrainingInterrupted) else "failed")
        raise


def cancel(mirrors: Sequence[Mirror], status: str) -> None:
    """Have mirrors take back what they made for a run that never trains; what one raises hides nothing."""
    for mirror in mirrors:
        try:
            mirror.cancel(status)
        except Exception:
            logger.exception("%s was not told that the training does not start", mirror.name)


def _open_mirrors(record: Mapping[str, Any], mirrors: Sequence[Mirror], run_id: str | None, start_offline: bool) -> str:
    names = []
    for mirror in mirrors:
        try:
            names.append(mirror.open(record))
        except MirrorUnavailableError as error:
            if not start_offline:
                # Not chained: a client's own message may quote the address with its password.
                raise MirrorUnavailableError(
                    error.name, error.uri, error.cause, _START_OFFLINE, refused=error.refused
                ) from None
            logger.warning("%s", error)
    return run_id or next((name for name in names if name), None) or uuid.uuid4().hex
