"""Owns the write protocol of a checkpoint: capture in memory, commit to disk, remove.

Commit: new chunks of a replay buffer, then the zip are staged, synced and renamed, then the metadata the same way;
the metadata's presence is the commit. Removal goes the other way round. So a reader sees a whole checkpoint or none,
whatever dies when.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointSaveError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, ParentReference, timestamp_now
from sb3_mlflow_ckpt.runs.document import finite
from sb3_mlflow_ckpt.verification import read_metadata

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from sb3_mlflow_ckpt.state.exact import ExactCapture
    from sb3_mlflow_ckpt.state.model import ModelCapture
    from sb3_mlflow_ckpt.state.replay.buffer import ReplayCapture

_DISK_FULL = (
    "Reduce keep_last_n_checkpoints, increase checkpoint_interval_episodes, clean up old checkpoints, "
    "or use a different checkpoint_dir with more space"
)
_WEIGHTS_ONLY = "it holds parameters and counters: random states, environments and replay buffers begin anew"
_UNUSABLE = "Check that checkpoint_dir is a writable folder"


class CheckpointCapture(NamedTuple):
    """A checkpoint in memory: what the training thread hands to the writer."""

    model: ModelCapture
    metadata: CheckpointMetadata
    replay: ReplayCapture | None = None


def capture_checkpoint(
    model: BaseAlgorithm,
    *,
    agent_id: str,
    run_id: str,
    episode: int,
    finished_episodes: int | None = None,
    config: Mapping[str, Any] | None = None,
    extra_state: Mapping[str, Any] | None = None,
    trigger: str = "manual",
    parent: ParentReference | None = None,
    root_run_id: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    exact: ExactCapture | None = None,
    not_exact: str | None = None,
    replay: ReplayCapture | None = None,
) -> CheckpointCapture:
    """Copy a model and what is known of it; nothing of the copy changes when training goes on.

    Args:
        model: Any SB3 algorithm.
        agent_id: The agent's id.
        run_id: The run's id.
        episode: Finished episodes of the whole training, as in the file's name.
        finished_episodes: Their exact number, where that is greater.
        config: The training configuration, as plain JSON.
        extra_state: Anything else to keep, as plain JSON.
        trigger: Why it is saved.
        parent: The checkpoint that the run was resumed from.
        root_run_id: The first run of the chain of resumes.
        attributes: Values to record in place of the model's own (see `state.model.capture_model`).
        exact: What makes a resume exact; None saves weights and counters.
        not_exact: Why that is None, where it is not by choice.
        replay: The replay buffer at this moment.
    """
    from sb3_mlflow_ckpt.algorithms import algorithm_name
    from sb3_mlflow_ckpt.environments import describe_space
    from sb3_mlflow_ckpt.provenance import versions
    from sb3_mlflow_ckpt.state.model import capture_model

    captured = replace(capture_model(model, attributes), exact=exact.state if exact is not None else None)
    metadata = CheckpointMetadata(
        episode=episode,
        run_id=run_id,
        config=dict(config or {}),
        timestamp=timestamp_now(),
        extra_state=dict(extra_state or {}),
        agent_id=agent_id,
        algo=algorithm_name(type(model)),
        num_timesteps=int(model.num_timesteps),
        finished_episodes=episode if finished_episodes is None else finished_episodes,
        n_updates=int(getattr(model, "_n_updates", 0)),
        trigger=trigger,
        versions=versions(),
        spaces={
            "observation": describe_space(model.observation_space),
            "action": describe_space(model.action_space),
        },
        parent=parent,
        root_run_id=root_run_id or run_id,
        resume_state={
            "restored": [
                *("parameters", "optimizers", "counters"),
                *(["vec_normalize"] if captured.arrays else []),
                *(["random states", "environments"] if exact is not None else []),
                *(["replay buffer"] if replay is not None else []),
            ],
            "exact": exact is not None and exact.reason is None,
            "reason": (not_exact or _WEIGHTS_ONLY) if exact is None else exact.reason,
        },
        metrics=_last_episodes(captured.state),
    )
    return CheckpointCapture(captured, metadata, replay)


def prepare_folder(folder: Path) -> None:
    """Make a folder for checkpoints, and see that files can be made in it.

    Raises:
        CheckpointSaveError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointSaveError(folder, error, _UNUSABLE) from error


def commit_checkpoint(folder: RunFolder, capture: CheckpointCapture) -> CheckpointMetadata:
    """Write a captured checkpoint; when this returns it survives a power cut.

    A checkpoint of the same episode is replaced. Two files cannot be renamed at once, so while that happens the
    metadata describes both contents of the zip, the old one and the new (`replacement`).

    Returns:
        The metadata as written, with the files' hashes.

    Raises:
        CheckpointSaveError: The disk is full, read-only or broken; what was there before is untouched.
    """
    try:
        return _commit(folder, capture)
    finally:
        if capture.replay is not None:
            # Training waits for the rows that a capture reads, whatever became of it.
            capture.replay.release()


def _commit(folder: RunFolder, capture: CheckpointCapture) -> CheckpointMetadata:
    from sb3_mlflow_ckpt.state.archive import write_archive

    episode = capture.metadata.episode
    path, metadata_file = folder.model(episode), folder.metadata(episode)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        model, chunks = capture.model, []
        if capture.replay is not None:
            chunks = capture.replay.write(folder)
            model = replace(model, state={**model.state, "replay": capture.replay.state})
        with atomic.staged(path) as (file, temporary):
            write_archive(file, model, capture.metadata)
        entry = FileEntry(name=path.name, bytes=temporary.stat().st_size, sha256=atomic.sha256(temporary))
        metadata = capture.metadata.model_copy(update={"files": [entry, *chunks]})
        try:
            if metadata_file.exists():
                _announce_replacement(path, metadata_file, metadata)
            atomic.commit(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        atomic.write_bytes(metadata_file, atomic.dump_json(metadata.to_json()))
    except OSError as error:
        raise save_error(path, error) from error
    except (ValueError, TypeError) as error:
        raise CheckpointSaveError(path, error, "config and extra_state must be plain JSON") from error
    return metadata


def save_error(path: Path, error: OSError) -> CheckpointSaveError:
    """Return what a disk's error means for the checkpoint that was to lie at `path`, with the remedies."""
    if isinstance(error, CheckpointSaveError):
        return error
    return CheckpointSaveError(path, error, _DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else _UNUSABLE)


def remove_checkpoint(folder: RunFolder, episode: int) -> None:
    """Remove one checkpoint: first its metadata, which withdraws the commit, then the zip."""
    folder.metadata(episode).unlink(missing_ok=True)
    atomic.fsync_dir(folder.path)
    folder.model(episode).unlink(missing_ok=True)


def _announce_replacement(path: Path, metadata_file: Path, metadata: CheckpointMetadata) -> None:
    try:
        before = read_metadata(path).to_json()
    except CheckpointError:
        return  # There is nothing whole to preserve.
    before.pop("replacement", None)
    atomic.write_bytes(metadata_file, atomic.dump_json({**before, "replacement": metadata.to_json()}))


def _last_episodes(state: Mapping[str, Any]) -> dict[str, float | None]:
    infos = state["info_buffers"]["ep_info_buffer"]
    if not infos:
        return {"mean_reward": None, "mean_length": None}
    return {
        "mean_reward": finite(sum(info["r"] for info in infos) / len(infos)),
        "mean_length": finite(sum(info["l"] for info in infos) / len(infos)),
    }
