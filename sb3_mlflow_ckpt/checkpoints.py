"""Owns the public functions on checkpoints: save, list, latest, verify, load, pin, prune. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt.commit import capture_checkpoint, commit_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointNotFoundError, InvalidIdError
from sb3_mlflow_ckpt.layout import RunFolder, check_id, id_spellings, metadata_path
from sb3_mlflow_ckpt.leases import Lease, lease_checkpoint, saving
from sb3_mlflow_ckpt.ledger import committed_episodes
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.origins import note_origin
from sb3_mlflow_ckpt.pins import pin_checkpoint, unpin_checkpoint
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.pruning import prune_runs
from sb3_mlflow_ckpt.runs.folder_index import subfolders
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

__all__ = [
    "LoadedCheckpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "pin_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
    "unpin_checkpoint",
    "verify_checkpoint",
]

logger = logging.getLogger(__name__)

# How often `latest` lists anew where all that it found was removed meanwhile.
_LISTINGS = 5


class LoadedCheckpoint(NamedTuple):
    """What `load_checkpoint` returns.

    Attributes:
        model: The algorithm, ready for `learn(..., reset_num_timesteps=False)`.
        config: The training configuration of the run that saved it.
        extra_state: What the caller of `save_checkpoint` added.
    """

    model: BaseAlgorithm
    config: dict[str, Any]
    extra_state: dict[str, Any]


def save_checkpoint(
    model: BaseAlgorithm,
    checkpoint_dir: str | Path = "checkpoints",
    *,
    agent_id: str,
    run_id: str,
    episode: int,
    config: Mapping[str, Any] | None = None,
    extra_state: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model as a committed checkpoint and return its zip's path.

    Args:
        model: Any SB3 algorithm.
        checkpoint_dir: The folder that holds agents' folders.
        agent_id: The agent's id.
        run_id: The run's id.
        episode: The number in the file's name.
        config: The training configuration, as plain JSON.
        extra_state: Anything else to keep, as plain JSON; `load_checkpoint` gives it back.

    Raises:
        InvalidIdError: An id could leave the folder.
        CheckpointSaveError: It cannot be written.
    """
    folder = RunFolder(Path(checkpoint_dir), agent_id, run_id)
    capture = capture_checkpoint(
        model, agent_id=agent_id, run_id=run_id, episode=episode, config=config, extra_state=extra_state
    )
    with saving(folder):
        commit_checkpoint(folder, capture)
    return folder.model(episode)


def run_folders(
    checkpoint_dir: str | Path = "checkpoints", run_id: str | None = None, agent_id: str | None = None
) -> Iterator[RunFolder]:
    """Yield the run folders below a checkpoint folder, by agent and run, narrowed by ids where given.

    A UUID is found with and without its dashes.
    """
    root = Path(checkpoint_dir)
    for value, what in ((agent_id, "agent_id"), (run_id, "run_id")):
        if value is not None:
            check_id(value, what)
    wanted = None if run_id is None else id_spellings(run_id)
    for agent in subfolders(root) if agent_id is None else [agent_id]:
        for run in subfolders(root / agent) if wanted is None else wanted:
            try:
                folder = RunFolder(root, agent, run)
            except InvalidIdError:
                continue  # Somebody else's folder.
            if folder.path.is_dir():
                yield folder


def list_checkpoints(
    checkpoint_dir: str | Path = "checkpoints", run_id: str | None = None, agent_id: str | None = None
) -> list[Path]:
    """Return the zips of committed checkpoints, by episode within a run.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run; a UUID with or without dashes.
        agent_id: Only this agent.

    Raises:
        InvalidIdError: An id could leave the folder.
    """
    folders = run_folders(checkpoint_dir, run_id, agent_id)
    return [folder.model(episode) for folder in folders for episode in _episodes(folder)]


def latest_checkpoint(
    checkpoint_dir: str | Path = "checkpoints",
    run_id: str | None = None,
    agent_id: str | None = None,
    *,
    accept: Callable[[CheckpointMetadata], bool] = lambda metadata: True,
) -> Path | None:
    """Return the newest checkpoint that verifies, or None where there is none.

    Newest is the latest timestamp over all runs that the ids admit. One that does not verify is named in the log.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run.
        agent_id: Only this agent.
        accept: Tells by its metadata whether a checkpoint is considered.
    """
    path, lease = lease_latest(checkpoint_dir, run_id, agent_id, accept=accept)
    if lease is not None:
        lease.release()
    return path


def lease_latest(
    checkpoint_dir: str | Path = "checkpoints",
    run_id: str | None = None,
    agent_id: str | None = None,
    *,
    accept: Callable[[CheckpointMetadata], bool] = lambda metadata: True,
) -> tuple[Path | None, Lease | None]:
    """Return what `latest_checkpoint` does, and the lease that was taken before it was verified."""
    for _ in range(_LISTINGS):
        listed = list_checkpoints(checkpoint_dir, run_id, agent_id)
        for path in _newest_first(listed, accept):
            lease = lease_checkpoint(path)
            try:
                verify_checkpoint(path)
                if not metadata_path(path).exists():
                    # Somebody is removing it: a zip alone would verify, and be gone in a moment.
                    raise CheckpointNotFoundError(path, "It was removed meanwhile")
            except (CheckpointError, OSError) as error:
                if lease is not None:
                    lease.release()
                logger.warning("Passed over: %s", error)
                continue
            return path, lease
        if all(metadata_path(path).exists() for path in listed):
            break
        # Some that there were went while they were looked at: newer ones came.
    return None, None


def _newest_first(paths: Iterable[Path], accept: Callable[[CheckpointMetadata], bool]) -> list[Path]:
    found: list[tuple[str, int, Path]] = []
    for path in paths:
        try:
            metadata = read_metadata(path)
        except (CheckpointError, OSError) as error:
            logger.warning("Passed over: %s", error)
            continue
        if accept(metadata):
            found.append((metadata.timestamp, metadata.episode, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def load_checkpoint(
    path: str | Path,
    env: VecEnv | Any = None,
    *,
    device: str = "auto",
    algo: str | None = None,
    policy: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> LoadedCheckpoint:
    """Load a checkpoint after verifying it, with VecNormalize's statistics put back, and run nothing of it.

    The model is built anew from the settings in the checkpoint, which are checked, and filled with its tensors and
    counters. A callback that trains the model goes on from the checkpoint's episode; call `learn` with
    `reset_num_timesteps=False`. A zip that SB3's own `save` wrote gives its weights: name its algorithm.

    Args:
        path: The zip, or its metadata file.
        env: Where the model is to act: any environment, or a VecEnv; None to predict only.
        device: PyTorch device.
        algo: The algorithm, which a zip of SB3's own does not name.
        policy: The policy, where the checkpoint does not say it in a plain form.
        hyperparameters: Arguments of the constructor, where the checkpoint does not say them in a plain form.
        trusted: Load as SB3's own `load` does, which runs whatever is pickled in the file.

    Raises:
        CheckpointNotFoundError: There is no such file.
        UntrustedCheckpointError: It asks for something that could run code, and `trusted` is not given.
        CheckpointLoadError: It is corrupt, or does not fit the environment or this machine's versions.
    """
    from sb3_mlflow_ckpt.loading import load

    # Before it is verified: what was verified must still be there when it is read, and when training begins.
    lease = lease_checkpoint(Path(path))
    try:
        model, metadata, zip_path, lacking = load(
            path, env, device=device, algo=algo, policy=policy, hyperparameters=hyperparameters, trusted=trusted
        )
    except BaseException:
        _release(lease)
        raise
    if env is None:
        # It predicts: nothing more is read of the checkpoint.
        _release(lease)
        lease = None
    note_origin(model, str(zip_path.absolute()), metadata, zip_path.absolute(), lacking, lease)
    return LoadedCheckpoint(model, dict(metadata.config), dict(metadata.extra_state))


def _release(lease: Lease | None) -> None:
    if lease is not None:
        lease.release()


def prune_checkpoints(
    checkpoint_dir: str | Path = "checkpoints",
    run_id: str | None = None,
    agent_id: str | None = None,
    *,
    keep_last_n: int = 3,
    keep_best_n: int = 0,
    keep_every_n_episodes: int = 0,
    dry_run: bool = False,
) -> list[Path]:
    """Remove all but the newest checkpoints of each run, its best and its milestones.

    Never the newest one that verifies, a pinned one, one that somebody resumes from, nor one that a run tracked in
    MLflow has not sent there yet. A run that is training now is left to its own process.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run.
        agent_id: Only this agent.
        keep_last_n: How many to keep of each run; 0 keeps all.
        keep_best_n: How many of the highest mean reward to keep beside them.
        keep_every_n_episodes: Keep the first checkpoint at or after each multiple of it as well; 0 is none.
        dry_run: Remove nothing.

    Returns:
        The zips that were removed, or would be.
    """
    retention = Retention(keep_last_n, keep_best_n, keep_every_n_episodes)
    pruned = prune_runs(run_folders(checkpoint_dir, run_id, agent_id), retention, dry_run=dry_run)
    for pruning in pruned:
        if pruning.problem:
            logger.warning("%s: %s", pruning.folder.path, pruning.problem)
    return [path for pruning in pruned for path in pruning.removed]


def _episodes(folder: RunFolder) -> list[int]:
    try:
        return committed_episodes(folder)
    except OSError as error:
        logger.warning("A run is passed over: %s", error)
        return []
