"""Owns what `--resume-from-checkpoint` may name: a path, a run folder, a `runs:/` URI, `latest`, `auto`."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sb3_mlflow_ckpt.checkpoints import lease_latest, run_folders
from sb3_mlflow_ckpt.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    IncompatibleCheckpointError,
    InvalidIdError,
    MirrorUnavailableError,
)
from sb3_mlflow_ckpt.layout import RunFolder, model_path
from sb3_mlflow_ckpt.leases import Lease, lease_checkpoint
from sb3_mlflow_ckpt.leaving import remove_when_leaving
from sb3_mlflow_ckpt.loading import read_source
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.verification import verify_checkpoint

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeSource:
    """A verified checkpoint on this machine's disk.

    Attributes:
        path: Its zip.
        uri: How a record names it: the absolute path, or the `runs:/` URI that it came from.
        metadata: Its metadata.
        lease: Holds it until the run that goes on from it has a checkpoint of its own.
    """

    path: Path
    uri: str
    metadata: CheckpointMetadata
    lease: Lease | None = field(default=None, repr=False, compare=False)
    # Removes a download when the source is no longer used.
    _download: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)


def resolve_checkpoint(
    reference: str,
    *,
    checkpoint_dir: str,
    agent_id: str,
    tracking_uri: str | None = None,
    accept: Callable[[CheckpointMetadata], bool] = lambda metadata: True,
    algo: str | None = None,
) -> ResumeSource | None:
    """Return the checkpoint that a reference names, verified.

    Args:
        reference: A zip, its metadata file, a run folder, `runs:/<id>[/checkpoints/ep000100.zip]`, `latest`
            (the agent's newest that verifies), or `auto` (`latest` if there is one).
        checkpoint_dir: Where `latest` and `auto` look.
        agent_id: Whose checkpoints they look at.
        tracking_uri: Where `runs:/` URIs are resolved; MLflow's own setting where it is None.
        accept: Tells by its metadata whether `latest` and `auto` consider a checkpoint.
        algo: The algorithm of a zip that SB3's own `save` wrote.

    Returns:
        The checkpoint; None for `auto` where there is none.

    Raises:
        CheckpointNotFoundError: It does not exist.
        CheckpointCorruptError: It does not verify.
        MirrorUnavailableError: MLflow does not answer.
    """
    if reference.startswith("runs:/"):
        return _from_mlflow(reference, tracking_uri)
    if reference in ("latest", "auto"):
        path, lease = lease_latest(checkpoint_dir, agent_id=agent_id, accept=accept)
        if path is None:
            if reference == "auto":
                return None
            raise CheckpointNotFoundError(
                f"{reference} of {agent_id}",
                f"{checkpoint_dir} holds none of this agent that verifies{_other_agents(checkpoint_dir)}; "
                "auto starts a new training",
            )
        return _from_path(path, lease=lease)
    try:
        path = Path(reference).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointNotFoundError(reference, f"It is no path here: {getattr(error, 'strerror', error)}") from error
    if is_folder:
        newest, lease = _newest_in(path)
        if newest is None:
            raise CheckpointNotFoundError(reference, "The folder is not a run folder with a checkpoint that verifies")
        return _from_path(newest, lease=lease)
    if not path.exists() and (hint := _meant(reference)):
        raise CheckpointNotFoundError(reference, hint)
    return _from_path(path, algo)


def _meant(reference: str) -> str | None:
    """Return what a reference that is no path was meant to be, as a sentence."""
    if reference.startswith(("run:/", "runs:")):
        return "A checkpoint in MLflow is written runs:/<run id>, or runs:/<run id>/checkpoints/ep000100.zip"
    close = difflib.get_close_matches(reference, ("latest", "auto"), n=1)
    return f"Did you mean {close[0]}?" if close else None


def newest_of_run(
    run_id: str,
    *,
    checkpoint_dir: str,
    tracked: bool,
    tracking_uri: str | None = None,
    offline: bool = False,
    mlflow_run_id: str | None = None,
) -> ResumeSource | None:
    """Return the newest checkpoint of one run, verified: from its folder, or from MLflow where that has a later one.

    A run whose machine was lost may go on at another one, and come back to the first.

    Args:
        run_id: The run.
        checkpoint_dir: The folder that holds agents' folders.
        tracked: Whether MLflow is asked.
        tracking_uri: Where; MLflow's own setting where it is None.
        offline: Whether what is here will do if MLflow does not answer.
        mlflow_run_id: What MLflow calls the run, where that is not its id.

    Returns:
        The checkpoint; None where the run has none yet.

    Raises:
        CheckpointNotFoundError: MLflow holds some, and none of them verifies.
        MirrorUnavailableError: MLflow does not answer: it may hold a later one.
    """
    path, lease = lease_latest(checkpoint_dir, run_id)
    here = _from_path(path, lease=lease) if path is not None else None
    if not tracked:
        return here
    from sb3_mlflow_ckpt.mirrors.artifacts import newest_metadata

    try:
        mlflow_run_id = mlflow_run_id or run_id
        there = newest_metadata(mlflow_run_id, tracking_uri)
        if there is None or (here is not None and here.metadata.timestamp >= there.timestamp):
            return here
        source = _from_mlflow(f"runs:/{mlflow_run_id}", tracking_uri)
    except MirrorUnavailableError as error:
        if here is None or not offline:
            raise
        logger.warning("%s. The run goes on from what is here", error)
        return here
    if here is not None and here.lease is not None:
        here.lease.release()
    return source


def check_spaces(source: ResumeSource, env: VecEnv) -> None:
    """Raise an IncompatibleCheckpointError, with both sides named, where a checkpoint's spaces are not env's."""
    from sb3_mlflow_ckpt.environments import describe_space

    for kind, space in (("observation", env.observation_space), ("action", env.action_space)):
        saved, here = source.metadata.spaces.get(kind), describe_space(space)
        if saved is not None and saved != here:
            raise IncompatibleCheckpointError(
                source.uri,
                f"its {kind} space is {json.dumps(saved)}, the environment's is {json.dumps(here)}",
                "Resume with the environment that it was trained in",
            )


def _from_path(path: Path, algo: str | None = None, lease: Lease | None = None) -> ResumeSource:
    # Before it is verified: from here on nobody removes it.
    lease = lease or lease_checkpoint(path)
    try:
        metadata = read_source(path, algo)
    except IncompatibleCheckpointError:
        raise
    except CheckpointCorruptError as error:
        whole, other = _newest_in(path.absolute().parent)
        if other is not None:
            other.release()
        hint = f"The newest beside it that verifies is {whole}" if whole else "None beside it verifies"
        raise CheckpointCorruptError(error.path, error.cause, hint) from error
    zip_path = model_path(path).absolute()
    return ResumeSource(zip_path, str(zip_path), metadata, lease)


def _newest_in(path: Path) -> tuple[Path | None, Lease | None]:
    try:
        folder = RunFolder.at(path)
    except InvalidIdError:
        return None, None  # Not a folder of ours: its name could not be an id.
    return lease_latest(folder.checkpoint_dir, folder.run_id, folder.agent_id)


def _other_agents(checkpoint_dir: str) -> str:
    agents = sorted({folder.agent_id for folder in run_folders(checkpoint_dir)})
    return f" (--agent-id: there is {', '.join(agents[:5])})" if agents else ""


def _from_mlflow(uri: str, tracking_uri: str | None) -> ResumeSource:
    from sb3_mlflow_ckpt.mirrors.artifacts import download_checkpoint

    folder = tempfile.TemporaryDirectory(prefix="sb3_mlflow_ckpt-")
    remove_when_leaving(Path(folder.name))
    download = download_checkpoint(uri, Path(folder.name), tracking_uri)
    return ResumeSource(download.path, download.uri, verify_checkpoint(download.path), None, folder)
