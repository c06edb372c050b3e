"""Owns what a trial tells Ray Tune, from inside `learn`: after so many steps, a checkpoint and how it does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_mlflow_ckpt.callback import EpisodeCheckpointCallback
from sb3_mlflow_ckpt.errors import CheckpointNotFoundError, TrainingStopped
from sb3_mlflow_ckpt.layout import chunk_path, metadata_path
from sb3_mlflow_ckpt.leases import lease_checkpoint
from sb3_mlflow_ckpt.leaving import temporary_folder
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.replay_sweep import needed_chunks
from sb3_mlflow_ckpt.trainer import ResolvedTraining
from sb3_mlflow_ckpt.verification import read_metadata


class TuneReporter:
    """Reports a training to Ray Tune.

    Args:
        interval: Environment steps between two reports.
        facts: What the record says of the trial's place in the sweep.
        stopped: Tells whether the sweep is stopped: the trial saves then, and ends.
    """

    def __init__(self, interval: int, facts: Mapping[str, Any], stopped: Callable[[], bool]) -> None:
        self._interval = interval
        self._facts = facts
        self._stopped = stopped

    def starting(self, resolved: ResolvedTraining) -> None:
        """Do nothing: the driver shows the trials."""

    def callback(self, resolved: ResolvedTraining, checkpoints: EpisodeCheckpointCallback) -> BaseCallback:
        """Return the callback that reports."""
        return _ReportCallback(checkpoints, self._interval, self._facts, self._stopped)


class _ReportCallback(BaseCallback):
    """Asks for a checkpoint after each interval, and reports it when it is on disk.

    A training that goes on from a checkpoint is at once where its donor was: nothing is chopped, `learn` runs on.
    """

    def __init__(
        self,
        checkpoints: EpisodeCheckpointCallback,
        interval: int,
        facts: Mapping[str, Any],
        stopped: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._stopped = stopped
        self._last: int | None = None
        self._checkpoints = checkpoints
        self._interval = interval
        self._facts = facts
        self._asked = False
        self._next = 0
        self._reported: str | None = None

    def _on_training_start(self) -> None:
        self._plan(self.num_timesteps)

    def _plan(self, num_timesteps: int) -> None:
        self._next = (num_timesteps // self._interval + 1) * self._interval
        self._asked = False

    def _on_rollout_start(self) -> None:
        # Into the curve, and so into MLflow's metrics: a parameter of a run cannot be changed there.
        for key, value in self._facts["hyperparameters"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.logger.record(f"sweep/{key}", value)
        self.logger.record("sweep/generation", self._facts["generation"])

    def _on_step(self) -> bool:
        if self._stopped():
            self._leave()
            return True
        if self.num_timesteps < self._next:
            return True
        if self.num_timesteps >= self._next + self._interval:
            self._plan(self.num_timesteps)  # The disk refused it.
        elif not self._asked:
            self._checkpoints.save_soon()
            self._asked = True
        newest, path = self._checkpoints.latest_metadata, self._checkpoints.latest_checkpoint
        if newest is not None and path is not None and newest.num_timesteps >= self._next:
            self._plan(newest.num_timesteps)
            # Before the first episode has ended there is nothing to compare it by.
            if newest.metrics.get("mean_reward") is not None:
                self._report(path)
        return True

    def _leave(self) -> None:
        """Ask for a checkpoint, and raise TrainingStopped once it is on disk."""
        if self._last is None:
            self._last = self.num_timesteps
            self._checkpoints.save_soon()
        newest = self._checkpoints.latest_metadata
        if newest is not None and newest.num_timesteps >= self._last:
            raise TrainingStopped

    def _on_training_end(self) -> None:
        path = self._checkpoints.latest_checkpoint
        # The run has ended: it is on disk whole, and nothing is removed any more.
        if path is not None and read_metadata(path).timestamp != self._reported:
            self._report(path, last=True)

    def _report(self, path: Path, *, last: bool = False) -> None:
        try:
            self._reported = report_checkpoint(path, self._facts).timestamp
        except CheckpointNotFoundError:
            return  # A newer one took its place meanwhile; it is reported next.
        except SystemExit as stop:
            # How Tune ends a function: the trial is paused, cloned over or stopped.
            if last:
                raise
            raise TrainingStopped from stop


def report_checkpoint(path: Path, facts: Mapping[str, Any]) -> CheckpointMetadata:
    """Give Ray Tune a checkpoint and its numbers; return its metadata.

    Tune keeps a copy of its own: what the run's retention removes later, a clone can still read.

    Raises:
        CheckpointNotFoundError: It was removed meanwhile.
        SystemExit: Tune ends the trial.
    """
    from ray import tune

    with staged(path) as (folder, metadata):
        tune.report(
            {
                "num_timesteps": metadata.num_timesteps,
                "episode": metadata.episode,
                **{key: value if value is not None else float("nan") for key, value in metadata.metrics.items()},
                "generation": facts["generation"],
                "run_id": metadata.run_id,
            },
            checkpoint=tune.Checkpoint.from_directory(str(folder)),
        )
    return metadata


@contextmanager
def staged(path: Path) -> Iterator[tuple[Path, CheckpointMetadata]]:
    """Lay a checkpoint out in a folder of its own: zip, metadata, and the replay chunks that it needs.

    Raises:
        CheckpointNotFoundError: It was removed meanwhile.
    """
    with temporary_folder() as folder:
        # Held while it is copied; retention passes it over.
        lease = lease_checkpoint(path)
        try:
            metadata = _lay_out(path, folder)
        except FileNotFoundError as error:
            if isinstance(error, CheckpointNotFoundError):
                raise
            raise CheckpointNotFoundError(path, "It was removed while it was copied") from error
        finally:
            if lease is not None:
                lease.release()
        yield folder, metadata


def _lay_out(path: Path, folder: Path) -> CheckpointMetadata:
    """Lay out a checkpoint; one that is saved anew under the same episode meanwhile is begun again."""
    while True:
        metadata = read_metadata(path, settle=False)
        for name in needed_chunks(metadata):
            target = chunk_path(folder, name)
            target.parent.mkdir(exist_ok=True)
            _link(chunk_path(path.parent, name), target)
        for source in (path, metadata_path(path)):
            _link(source, folder / source.name)
        # The zip came between the two readings: where they agree, it is theirs.
        if read_metadata(folder / path.name, settle=False) == metadata:
            return read_metadata(folder / path.name)
        shutil.rmtree(folder)
        folder.mkdir()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name where the file system can; copy it elsewhere."""
    with suppress(OSError):
        target.hardlink_to(source)
        return
    shutil.copy2(source, target)
