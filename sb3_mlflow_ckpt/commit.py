"""Owns the write protocol of a checkpoint: capture in memory, commit to disk, remove.

Commit: new chunks of a replay buffer are staged, synced and renamed; then the zip and the metadata are staged and
synced, and renamed in this order; the metadata's presence is the commit. Removal goes the other way round: the
metadata takes a temporary name, the zip goes, then the temporary. So a reader sees a whole checkpoint or none,
whatever dies when, and metadata under a temporary name tells the next process that its zip is nobody's.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sb3_mlflow_ckpt import atomic, strict_json
from sb3_mlflow_ckpt.errors import CheckpointError, CheckpointSaveError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, ParentReference, timestamp_now
from sb3_mlflow_ckpt.redaction import redact_all
from sb3_mlflow_ckpt.runs.document import finite
from sb3_mlflow_ckpt.verification import read_metadata

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

    from sb3_mlflow_ckpt.state.exact import ExactCapture
    from sb3_mlflow_ckpt.state.model import ModelCapture, ModelRecorder
    from sb3_mlflow_ckpt.state.replay.buffer import ReplayCapture

_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = "The disk reports errors: look at the system's log, and use another checkpoint_dir until it is mended"
_TOO_MANY_FILES = "Raise the limit of open files (ulimit -n), or make fewer environments"
_DISK_FULL = (
    "Reduce keep_last_n_checkpoints, increase checkpoint_interval_episodes, clean up old checkpoints, "
    "or use a different checkpoint_dir with more space"
)
_WEIGHTS_ONLY = "it holds parameters and counters: random states, environments and replay buffers begin anew"
_NO_MEMORY = "Use a machine with more memory, or a smaller replay buffer or rollout"
_UNWRITABLE = "A part of the model cannot be written, which model.save() would not either: take it out of its state"
_UNUSABLE = "Check that checkpoint_dir is a writable folder"


class CheckpointCapture(NamedTuple):
    """A checkpoint in memory: what the training thread hands to the writer."""

    model: ModelCapture
    metadata: CheckpointMetadata
    replay: ReplayCapture | None = None

    def release(self) -> None:
        """Let training go on with the memory and the rows that the capture reads."""
        self.model.release()
        if self.replay is not None:
            self.replay.release()


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
    recorder: ModelRecorder | None = None,
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
        attributes: Values to record in place of the model's own (see `state.model.ModelRecorder`).
        exact: What makes a resume exact; None saves weights and counters.
        not_exact: Why that is None, where it is not by choice.
        replay: The replay buffer at this moment.
        recorder: The model's, where it is captured again and again.
    """
    from sb3_mlflow_ckpt.algorithms import algorithm_name
    from sb3_mlflow_ckpt.environments import describe_space
    from sb3_mlflow_ckpt.provenance import versions
    from sb3_mlflow_ckpt.state.model import ModelRecorder

    captured = (recorder or ModelRecorder(model)).capture(attributes)
    try:
        captured = replace(captured, exact=exact.state if exact is not None else None)
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
    except BaseException:
        captured.release()
        raise
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
        raise CheckpointSaveError(folder, error, remedy(error)) from error


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
        # Training waits for what a capture holds, whatever became of it.
        capture.release()


def _commit(folder: RunFolder, capture: CheckpointCapture) -> CheckpointMetadata:
    from sb3_mlflow_ckpt.state.archive import write_archive

    episode = capture.metadata.episode
    path, metadata_file = folder.model(episode), folder.metadata(episode)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            metadata = _settled(capture.metadata)
        except (ValueError, TypeError) as error:
            raise CheckpointSaveError(path, error, "config and extra_state must be plain JSON") from error
        model, chunks = capture.model, []
        if capture.replay is not None:
            chunks = capture.replay.write(folder)
            model = replace(model, state={**model.state, "replay": capture.replay.state})
        with atomic.staged(path) as (file, temporary):
            hashed = atomic.HashedFile(file)
            write_archive(hashed, model, metadata)
            hashed.flush()
        try:
            entry = FileEntry(name=path.name, bytes=hashed.bytes, sha256=hashed.sha256)
            metadata = metadata.model_copy(update={"files": [entry, *chunks]})
            # Before anything is renamed: a disk that is full for the metadata must leave no zip without it.
            with atomic.staged(metadata_file) as (file, staged_metadata):
                file.write(metadata.to_bytes())
        except BaseException:
            atomic.discard(temporary)
            raise
        _rename(folder, metadata, temporary, staged_metadata)
    except OSError as error:
        raise save_error(path, error) from error
    except Exception as error:
        # A part of a user's own that cannot be written, memory that is used up: a checkpoint that failed, like others.
        hint = _NO_MEMORY if isinstance(error, MemoryError) else _UNWRITABLE
        raise CheckpointSaveError(path, f"{type(error).__name__}: {error}", hint) from error
    return metadata


def _rename(folder: RunFolder, metadata: CheckpointMetadata, zip_file: Path, metadata_file: Path) -> None:
    """Give the two staged files of a checkpoint their names."""
    path, committed = folder.model(metadata.episode), folder.metadata(metadata.episode)
    is_new = not path.exists()
    try:
        if committed.exists():
            _announce_replacement(path, committed, metadata)
        atomic.commit(zip_file, path)
    except BaseException:
        atomic.discard(zip_file)
        _withdraw(path, committed, is_new)
        atomic.discard(metadata_file)
        raise
    try:
        atomic.commit(metadata_file, committed)
    except BaseException:
        _withdraw(path, committed, is_new)
        raise


def _withdraw(path: Path, committed: Path, is_new: bool) -> None:
    """Remove the zip of a commit that failed, unless its metadata stands all the same or it was there before."""
    if is_new and not committed.exists():
        atomic.discard(path)


def remedy(error: OSError) -> str:
    """Return what to do about an error of the disk."""
    if error.errno in _FULL:
        return _DISK_FULL
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _TOO_MANY_FILES
    return _BROKEN if error.errno == errno.EIO else _UNUSABLE


def save_error(path: Path, error: OSError) -> CheckpointSaveError:
    """Return what a disk's error means for the checkpoint that was to lie at `path`, with the remedies."""
    if isinstance(error, CheckpointSaveError):
        return error
    return CheckpointSaveError(path, error, remedy(error))


def _settled(metadata: CheckpointMetadata) -> CheckpointMetadata:
    """Return metadata as it is written: without credentials.

    Raises:
        ValueError: It can be written, and would be refused when it is read: the checkpoint would be lost.
        TypeError: It is no JSON.
    """
    if metadata.extra_state:
        _check_readable(atomic.dump_json(metadata.extra_state, indent=None).decode("utf-8", "backslashreplace"))
    try:
        text = json.dumps(metadata.config)
    except TypeError:
        text = json.dumps(metadata.to_json()["config"])
    # Known by its text: all checkpoints of a run have one configuration.
    return metadata.model_copy(update={"config": _settled_config(text)})


@functools.lru_cache(maxsize=4)
def _settled_config(text: str) -> dict[str, Any]:
    # The writer makes None of what JSON lacks.
    config: dict[str, Any] = redact_all(json.loads(text, parse_constant=lambda name: None))
    _check_readable(atomic.dump_json(config, indent=None).decode("utf-8", "backslashreplace"))
    return config


def _check_readable(text: str) -> None:
    if len(text) > atomic.LARGEST_DOCUMENT // 4:
        raise ValueError(f"config and extra_state have {len(text)} bytes as JSON")
    # Within the zip, and while an episode is replaced, the document stands deeper.
    strict_json.loads(f'{{"replacement": {{"metadata": {{"config": {text}}}}}}}')


def remove_checkpoint(folder: RunFolder, episode: int) -> None:
    """Remove one checkpoint: first its metadata, which withdraws the commit, then the zip.

    The metadata goes by a temporary name, which tells whoever sweeps after a crash that the zip was to go, too.
    """
    metadata_file = folder.metadata(episode)
    withdrawn = atomic.temporary_sibling(metadata_file)
    with atomic.named(folder.model(episode)):
        # It is missing where an earlier attempt came so far.
        with suppress(FileNotFoundError):
            os.replace(metadata_file, withdrawn)
        atomic.fsync_dir(folder.path)
        folder.model(episode).unlink(missing_ok=True)
        withdrawn.unlink(missing_ok=True)


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
        "mean_reward": finite(float(sum(info["r"] for info in infos)) / len(infos)),
        "mean_length": finite(float(sum(info["l"] for info in infos)) / len(infos)),
    }
