"""Owns the public functions on checkpoints: save, list, latest, verify, load, prune. Importing it imports no torch."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt.commit import capture_checkpoint, commit_checkpoint, remove_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointError, InvalidIdError
from sb3_mlflow_ckpt.journal import committed_episodes, read_record
from sb3_mlflow_ckpt.layout import RunFolder, check_id, id_spellings
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, ParentReference
from sb3_mlflow_ckpt.policies import KeepLastN
from sb3_mlflow_ckpt.replay_sweep import sweep_chunks
from sb3_mlflow_ckpt.runs.folder import read_ledger
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv

__all__ = [
    "LoadedCheckpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
    "verify_checkpoint",
]

logger = logging.getLogger(__name__)

# Where a loaded model came from, so that a callback goes on counting from there.
_origins: weakref.WeakKeyDictionary[Any, Origin] = weakref.WeakKeyDictionary()


class Origin(NamedTuple):
    """The checkpoint that a model came from.

    Attributes:
        source: Its path or URI.
        metadata: Its metadata.
        path: Its zip on this machine; None where there is none.
        lacking: Arguments of the model that it did not say and that nobody gave again.
    """

    source: str
    metadata: CheckpointMetadata
    path: Path | None = None
    lacking: tuple[str, ...] = ()

    @property
    def reference(self) -> ParentReference:
        """How a resumed run names it."""
        files = self.metadata.files
        return ParentReference(
            run_id=self.metadata.run_id,
            checkpoint=self.source,
            episode=self.metadata.episode,
            sha256=files[0].sha256 if files else None,
            timestamp=self.metadata.timestamp,
        )


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
    for agent in sorted(_folders(root)) if agent_id is None else [agent_id]:
        for run in sorted(_folders(root / agent)) if wanted is None else wanted:
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
    return [folder.model(episode) for folder in folders for episode in committed_episodes(folder)]


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
    found: list[tuple[str, int, Path]] = []
    for path in list_checkpoints(checkpoint_dir, run_id, agent_id):
        try:
            metadata = read_metadata(path)
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
            continue
        if accept(metadata):
            found.append((metadata.timestamp, metadata.episode, path))
    for _, _, path in sorted(found, reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
            continue
        return path
    return None


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

    model, metadata, zip_path, lacking = load(
        path, env, device=device, algo=algo, policy=policy, hyperparameters=hyperparameters, trusted=trusted
    )
    note_origin(model, str(zip_path.absolute()), metadata, zip_path.absolute(), lacking)
    return LoadedCheckpoint(model, dict(metadata.config), dict(metadata.extra_state))


def note_origin(
    model: BaseAlgorithm,
    source: str,
    metadata: CheckpointMetadata,
    path: Path | None = None,
    lacking: Sequence[str] = (),
) -> None:
    """Remember which checkpoint (path or URI, and where its zip lies) a model came from."""
    _origins[model] = Origin(source, metadata, path, tuple(lacking))


def origin(model: BaseAlgorithm) -> Origin | None:
    """Return the checkpoint that a model was loaded from, or None."""
    return _origins.get(model)


def prune_checkpoints(
    checkpoint_dir: str | Path = "checkpoints",
    run_id: str | None = None,
    agent_id: str | None = None,
    *,
    keep_last_n: int = 3,
    dry_run: bool = False,
) -> list[Path]:
    """Remove all but the newest checkpoints of each run.

    Never the newest one that verifies, nor one that a run tracked in MLflow has not sent there yet.

    Args:
        checkpoint_dir: The folder that holds agents' folders.
        run_id: Only this run.
        agent_id: Only this agent.
        keep_last_n: How many to keep of each run; 0 keeps all.
        dry_run: Remove nothing.

    Returns:
        The zips that were removed, or would be.
    """
    removed: list[Path] = []
    for folder in run_folders(checkpoint_dir, run_id, agent_id):
        episodes = committed_episodes(folder)
        protected = _newest_verified(folder, episodes) | _not_mirrored(folder)
        ordered = [episode for episode in read_ledger(folder).saved if episode in episodes]
        for episode in KeepLastN(keep_last_n).removable(ordered, protected):
            if not dry_run:
                remove_checkpoint(folder, episode)
            removed.append(folder.model(episode))
        if not dry_run:
            sweep_chunks(folder)
    return removed


def _newest_verified(folder: RunFolder, episodes: Collection[int]) -> set[int]:
    for episode in sorted(episodes, reverse=True):
        try:
            verify_checkpoint(folder.model(episode))
        except CheckpointError as error:
            logger.warning("Passed over: %s", error)
            continue
        return {episode}
    return set()


def _not_mirrored(folder: RunFolder) -> set[int]:
    try:
        tracked = "MLflow" in read_record(folder).get("mirrors", ())
    except CheckpointError:
        return set()
    return read_ledger(folder).waiting if tracked else set()


def _folders(parent: Path) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
