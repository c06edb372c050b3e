"""Owns one training run while it runs: its folder, journal, writer, heartbeat and mirrors, from start to finish.

Knows nothing of stable-baselines3: it is handed captures and numbers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.commit import CheckpointCapture, commit_checkpoint, save_error
from sb3_mlflow_ckpt.dead_writers import sweep_dead_writers
from sb3_mlflow_ckpt.errors import CheckpointError, RunFolderTakenError, RunTakenOverError, describe
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.leases import Lease, sweep_leases
from sb3_mlflow_ckpt.ledger import CheckpointLedger, committed_episodes
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, timestamp, timestamp_now
from sb3_mlflow_ckpt.mirror_process import DEFAULT_AFTER_SECONDS, MirrorPlace
from sb3_mlflow_ckpt.ownership import TIDYING_SECONDS
from sb3_mlflow_ckpt.pins import sweep_pins
from sb3_mlflow_ckpt.policies import MirrorBacklog, Retention
from sb3_mlflow_ckpt.pruning import NOT_MIRRORED, evict, saved_checkpoints
from sb3_mlflow_ckpt.replay_sweep import ChunkSweeper
from sb3_mlflow_ckpt.replication import Mirror, Replicator, close_all
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, redact_all
from sb3_mlflow_ckpt.writer import BackgroundWriter

logger = logging.getLogger(__name__)

# An hour of a disk that takes nothing.
_MOST_UNWRITTEN_POINTS = 3600
_LAST_ROUND_SECONDS = 1.0
# Of the grace period, or of what is left of it: what the mirrors may take to catch up.
_COPYING = 1 / 3


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept.

    Attributes:
        retention: Which checkpoints stay on disk.
        backlog: How many may wait for a mirror.
        heartbeat_seconds: How often the record says that the run lives.
        sync_timeout_seconds: How long the end waits for a mirror that is behind.
        grace_seconds: How long an end that a signal asks for may take.
        mirror_process_seconds: When each mirror gets a process of its own.
    """

    retention: Retention = field(default_factory=Retention)
    backlog: MirrorBacklog = field(default_factory=MirrorBacklog)
    heartbeat_seconds: float = 10.0
    sync_timeout_seconds: float = 60.0
    grace_seconds: float = 30.0
    mirror_process_seconds: float = DEFAULT_AFTER_SECONDS


class LiveRun:
    """A run that is training now, in this process.

    Args:
        folder: Where it is kept.
        record: Its record.
        mirrors: Where it is copied to.
        options: How it is kept.
        fresh: Whether the training begins at its beginning; then the folder must not hold checkpoints of another.
        lease: Holds the checkpoint that the run goes on from, until the run has one of its own or ends.

    Raises:
        RunFolderBusyError: The folder is in use.
        RunFolderTakenError: The folder holds checkpoints of another training.
        CheckpointSaveError: The disk refuses the folder or the record.
    """

    def __init__(
        self,
        folder: RunFolder,
        record: Mapping[str, Any],
        mirrors: Sequence[Mirror],
        options: RunOptions,
        *,
        fresh: bool = True,
        lease: Lease | None = None,
    ) -> None:
        self.folder = folder
        self.latest: Path | None = None
        self.latest_metadata: CheckpointMetadata | None = None
        self._options = options
        self._gave_up: set[int] = set()
        self._next_complaint = 1
        self._taken_over = False
        self._refused: set[str] = set()
        self._points: deque[Mapping[str, Any]] = deque(maxlen=_MOST_UNWRITTEN_POINTS)
        self._mirrored = any(mirror.stores_checkpoints for mirror in mirrors)
        self._progress: dict[str, Any] = dict(record["progress"])
        self._last_step: float | None = None
        self._journal = _start(folder, {**record, "mirrors": [mirror.name for mirror in mirrors]}, fresh=fresh)
        self._chunks = self._swept(folder)
        self._lease = lease
        self._writer = BackgroundWriter()
        self._replicators = [
            Replicator(mirror, self._journal, MirrorPlace(mirror, self._journal, options.mirror_process_seconds))
            for mirror in mirrors
        ]
        for replicator in self._replicators:
            replicator.start()
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def _swept(self, folder: RunFolder) -> ChunkSweeper:
        try:
            chunks = ChunkSweeper(folder)
            chunks.sweep()
            sweep_pins(folder)
            sweep_leases(folder)
            return chunks
        except BaseException as error:
            self._journal.close()
            if isinstance(error, OSError) and not isinstance(error, CheckpointError):
                raise save_error(folder.path, error) from error
            raise

    @property
    def record(self) -> dict[str, Any]:
        """The record as it stands."""
        return self._journal.record

    @property
    def mirror_processes(self) -> dict[str, int | None]:
        """The id of the process in which each mirror works, by its name; None where that is this one."""
        return {replicator.mirror.name: replicator.process_id for replicator in self._replicators}

    def save(self, capture: CheckpointCapture) -> float:
        """Queue a checkpoint for the background writer; return the seconds that the caller waited for room."""
        # Whoever takes it out releases it: the writer, or this thread if it is interrupted before the writer has it.
        waiting = deque([capture])
        try:
            return self._writer.submit(lambda: self._commit(waiting.pop()) if waiting else None)
        except BaseException:
            if waiting:
                waiting.pop().release()
            raise

    @property
    def has_failed(self) -> bool:
        """Whether `failures` would yield one."""
        return self._writer.has_failed

    def failures(self) -> Iterator[BaseException]:
        """Yield why checkpoints could not be written, each failure once."""
        while (failure := self._writer.failure()) is not None:
            yield failure

    def flush(self) -> None:
        """Wait until every checkpoint that was queued is on disk or has failed."""
        self._writer.drain()

    def report(self, **progress: Any) -> None:
        """Note how far training is; the next heartbeat records it."""
        self._progress.update(progress)
        rewards = [self._progress.get(key) for key in ("best_mean_reward", "mean_reward")]
        self._progress["best_mean_reward"] = max((reward for reward in rewards if reward is not None), default=None)

    def stepped(self, num_timesteps: int, episode: int) -> None:
        """Note that the environments were stepped: at every step, so it does nothing else."""
        self._last_step = time.time()
        self._progress["num_timesteps"] = num_timesteps
        self._progress["episode"] = episode

    def note_resume(self, report: Mapping[str, Any]) -> None:
        """Record whether the run goes on exactly from its parent; a disk that refuses it does not stop training."""
        with self._tolerating("How the run was resumed was not recorded"):
            self._journal.update(resume=dict(report))

    def add_metrics(self, point: Mapping[str, Any]) -> None:
        """Append a point of the learning curve; one that the disk refuses is written with the next."""
        self._points.append(point)
        self._write_points()

    def _write_points(self) -> None:
        with self._tolerating("A point of the learning curve is not written yet"):
            while self._points:
                self._journal.add_metrics(self._points[0])
                self._points.popleft()

    def finish(
        self, status: str, error: BaseException | None = None, hurry: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """End the run: drain the writer, record the end, let the mirrors catch up, release the folder.

        Args:
            status: completed, failed or interrupted.
            error: Why it failed.
            hurry: Asked while mirrors catch up: whether to stop waiting for them.

        Returns:
            The names of mirrors that still miss something.
        """
        try:
            self._writer.close()
            self._ended.set()
            self._heartbeat.join()
            self._write_points()
            self._record_end(status, error)
            if self._taken_over:
                # What happens in that folder is told by its new owner.
                self._replicators.clear()
            timeout = self._sync_timeout(status)
            deadline = time.monotonic() + timeout
            behind = close_all(self._storing(True), timeout, hurry)
            # What waited for its copy may go now, and that is a fact the others are still to be told.
            self._prune()
            # One limit for all, but for a moment: a mirror that answers must not miss the end for one that hangs.
            left = max(deadline - time.monotonic(), min(timeout, _LAST_ROUND_SECONDS))
            behind += close_all(self._storing(False), left, hurry)
            for name in behind:
                logger.warning(
                    "%s misses a part of this run; send it with: sb3-mlflow-ckpt checkpoints sync --checkpoint-dir %s",
                    name,
                    self.folder.checkpoint_dir.absolute(),
                )
        finally:
            # Ctrl-C in the middle of the above must not leave the folder locked in a living process.
            self._ended.set()
            self._journal.close()
            self._release_parent()
        return behind

    def end_beside(self, status: str) -> None:
        """Record the end from a thread beside the training's, which does not come back; the process is to end.

        Takes as long as a checkpoint that is being written.

        Args:
            status: How it ended, unless an end is recorded already.
        """
        self._ended.set()
        if self._journal.record.get("status") not in TERMINAL_STATUSES:
            self._record_end(status, None)
        self._writer.drain()

    def leave_mirrors(self, seconds: float) -> None:
        """Give the mirrors the last seconds of the process, after `end_beside`."""
        if not self._taken_over:
            # A part of it to catch up: one that does not is still to hear of the end.
            close_all(self._replicators, max(0.0, _COPYING * seconds))

    def _storing(self, stores_checkpoints: bool) -> list[Replicator]:
        return [r for r in self._replicators if r.mirror.stores_checkpoints == stores_checkpoints]

    def _sync_timeout(self, status: str) -> float:
        timeout = self._options.sync_timeout_seconds
        # Whoever sends a signal kills soon after it.
        return min(timeout, _COPYING * self._options.grace_seconds) if status == "interrupted" else timeout

    def _record_end(self, status: str, error: BaseException | None) -> None:
        with self._tolerating("The end of the run was not recorded"):
            self._journal.update(
                status=status,
                ended_at=timestamp_now(),
                error=redact_all(describe(error)) if error is not None else None,
                **self._vital_signs(),
            )

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """Go on without a line that the disk refuses; a folder that another process has taken over ends the run."""
        try:
            yield
        except RunTakenOverError as error:
            if not self._taken_over:
                self._taken_over = True
                for replicator in self._replicators:
                    replicator.abandon()
                self._writer.report(error)
        except OSError as error:
            # Once for each spell: a disk that takes nothing for an hour is no news every second.
            logger.log(logging.DEBUG if what in self._refused else logging.WARNING, "%s: %s", what, error)
            self._refused.add(what)
        else:
            self._refused.discard(what)

    def _commit(self, capture: CheckpointCapture) -> None:
        try:
            self._journal.make_sure()
            timestamp = self._journal.stamp(capture.metadata.timestamp)
            metadata = capture.metadata.model_copy(update={"timestamp": timestamp})
            metadata = commit_checkpoint(self.folder, capture._replace(metadata=metadata))
            self._chunks.add(metadata)
            self._journal.add_saved(metadata)
        except OSError as error:
            # It may stand all the same, where the disk failed at the very end: then it is kept like any other.
            with self._tolerating("What stands of the checkpoint was not noted"):
                self._chunks.look_at(capture.metadata.episode)
                if not isinstance(error, RunTakenOverError):
                    self._journal.reconcile()
            raise save_error(self.folder.model(capture.metadata.episode), error) from error
        finally:
            # Training waits for what a capture holds, whatever became of it.
            capture.release()
        self.latest, self.latest_metadata = self.folder.model(metadata.episode), metadata
        # What the run needed of its parent is in its own folder now.
        self._release_parent()
        self._prune()

    def _release_parent(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _prune(self) -> None:
        if self._taken_over:
            return
        # The checkpoint before it is committed: what went wrong here is made good at the next one.
        with self._tolerating("Old checkpoints were not removed"):
            self._prune_now()

    def _prune_now(self) -> None:
        for episode in self._removable():
            try:
                if evict(self.folder, episode) is not None:
                    continue  # A resume reads it, or it is pinned: its turn may come again.
                self._chunks.discard(episode)
                self._journal.add_pruned(episode)
            except OSError as error:
                logger.warning("An old checkpoint could not be removed: %s", error)
        # Also what a checkpoint that was saved again, or one that failed, leaves behind.
        self._chunks.sweep()

    def _removable(self) -> list[int]:
        if self._options.retention.keeps_all:
            return []
        # Those that went long ago are not looked at: one more checkpoint costs the same after ten thousand.
        ledger = self._journal.on_disk()
        saved = saved_checkpoints(ledger, ledger.on_disk)
        return self._options.retention.removable(saved, {NOT_MIRRORED: self._waiting_for_mirror(ledger)})

    def _waiting_for_mirror(self, ledger: CheckpointLedger) -> set[int]:
        if not self._mirrored:
            return set()
        protected, given_up = self._options.backlog.split([e for e in ledger.on_disk if e in ledger.waiting])
        new = given_up - self._gave_up
        if new:
            self._gave_up |= new
            # Of a mirror that stays too slow it is said again when there are twice as many.
            if len(self._gave_up) >= self._next_complaint:
                self._next_complaint = 2 * len(self._gave_up)
                logger.error(
                    "%d checkpoints wait for MLflow, more than max_unmirrored_checkpoints allows: "
                    "the oldest are removed from disk without a copy (%d so far)",
                    len(given_up) + len(protected),
                    len(self._gave_up),
                )
        return protected

    def _beat(self) -> None:
        while not self._ended.wait(self._options.heartbeat_seconds):
            with self._tolerating("The heartbeat was not written"):
                self._journal.update(**self._vital_signs())

    def _vital_signs(self) -> dict[str, Any]:
        return {
            "heartbeat_at": timestamp_now(),
            "progress": dict(self._progress),
            "last_step_at": None if self._last_step is None else timestamp(self._last_step),
        }


def _start(folder: RunFolder, record: Mapping[str, Any], *, fresh: bool) -> RunJournal:
    """Take a run folder and write the record of a run that starts in it."""
    try:
        journal = RunJournal(folder, TIDYING_SECONDS)
        try:
            if fresh and committed_episodes(folder):
                raise RunFolderTakenError(folder.path)
            sweep_dead_writers(folder.path.parent, besides=folder.path)
            journal.start(record)
        except BaseException:
            journal.close()
            raise
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise save_error(folder.path, error) from error
    return journal
