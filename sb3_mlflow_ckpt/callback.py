"""Owns `EpisodeCheckpointCallback`: checkpoints, a run record and mirrors for anybody's own `model.learn(...)`."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mlflow_ckpt.algorithms import algorithm_name, describe_model
from sb3_mlflow_ckpt.commit import capture_checkpoint
from sb3_mlflow_ckpt.curve import CurveSampler
from sb3_mlflow_ckpt.episodes import EndedEpisodes
from sb3_mlflow_ckpt.errors import (
    CheckpointSaveError,
    IncompatibleCheckpointError,
    RunTakenOverError,
    TrainingInterrupted,
    TrainingStopped,
)
from sb3_mlflow_ckpt.interruption import DEFAULT_GRACE_SECONDS, ExitGuard, SignalGuard
from sb3_mlflow_ckpt.layout import RunFolder, check_id
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.mirror_process import DEFAULT_AFTER_SECONDS
from sb3_mlflow_ckpt.origins import lease_of, note_origin
from sb3_mlflow_ckpt.policies import EveryNEpisodes, MirrorBacklog, Retention
from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.replication import Mirror
from sb3_mlflow_ckpt.resumption import ResumeState
from sb3_mlflow_ckpt.run_opening import Lineage, cancel, first_record, open_run
from sb3_mlflow_ckpt.runs.document import plain
from sb3_mlflow_ckpt.snapshots import SaveReplayBuffer, Snapshots
from sb3_mlflow_ckpt.stalls import Stalls
from sb3_mlflow_ckpt.state.callbacks import OWN_BOOKS, CallbackStates
from sb3_mlflow_ckpt.state.model import all_finite
from sb3_mlflow_ckpt.state.safe_point import SafePoint, is_writing

logger = logging.getLogger(__name__)


class EpisodeCheckpointCallback(BaseCallback):
    """Saves a checkpoint every N episodes, at the end, on an exception and on SIGTERM, SIGINT or SIGUSR1.

    Episodes are counted over all environments. The run's record and learning curve are kept beside the
    checkpoints and copied to the mirrors in the background. After a signal the training stops with
    `TrainingInterrupted`, a SystemExit of code 128 + the signal's number.

    A model from `load_checkpoint` goes on from its checkpoint's episode, in a run of its own that names its parent.

    Args:
        checkpoint_interval_episodes: Episodes between checkpoints; 0 saves only at the end.
        keep_last_n_checkpoints: Checkpoints kept on disk; 0 keeps all.
        keep_best_n: Checkpoints of the highest mean reward that are kept beside them.
        keep_every_n_episodes: The first checkpoint at or after each multiple of it is kept as well; 0 is none.
        checkpoint_dir: The folder that holds agents' folders.
        agent_id: The agent's id; `<algo>_agent` where it is None.
        run_id: The run's id; the MLflow run's where it is None, a fresh UUID without MLflow.
        run_name: What a person calls the run.
        config: The training configuration for the record; read off the model where it is None.
        overrides: What the run changed of its parent's configuration, as `{key: {"from": ..., "to": ...}}`.
        sweep: Which trial of which sweep it is, as plain JSON: a field of the record and of each checkpoint's
            `extra_state`.
        mirrors: Copies elsewhere: `MLflowMirror()`, `MongoMirror(uri)`.
        start_offline: Train even if a mirror does not answer at the start.
        on_save_failure: `stop` raises CheckpointSaveError on the training thread, `continue` logs it.
        resume_state: What checkpoints hold and a resume restores: `exact` everything that decides how training goes
            on, `auto` the same but for a replay buffer of over 2 GiB, `weights` only parameters and counters.
        save_replay_buffer: Whether checkpoints hold the replay buffer; `auto` up to a full capacity of 2 GiB.
        handle_signals: Whether SIGTERM, SIGINT and, unless it has a handler, SIGUSR1 are taken over while training
            (main thread only).
        grace_seconds: The longest time from a signal to the end of the training. Where no moment comes within half
            of it at which everything can be saved, it is saved from wherever training stands; where training does
            not come back at all, the process is ended.
        heartbeat_seconds: How often the record says that the run lives.
        sync_timeout_seconds: How long the end waits for a mirror that is behind.
        max_unmirrored_checkpoints: Checkpoints that an outage may keep on disk beyond keep_last_n_checkpoints.
        mirror_process_seconds: After how many seconds of training each mirror works in a process of its own, which
            takes less time from the training than a thread; infinity keeps it in a thread.
        verbose: 1 prints where the checkpoints are when training begins and ends, and whether a resume is exact.

    Raises:
        InvalidIdError: An id could leave its folder.
    """

    def __init__(
        self,
        checkpoint_interval_episodes: int = 50,
        keep_last_n_checkpoints: int = 3,
        checkpoint_dir: str | Path = "checkpoints",
        *,
        keep_best_n: int = 0,
        keep_every_n_episodes: int = 0,
        agent_id: str | None = None,
        run_id: str | None = None,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        sweep: Mapping[str, Any] | None = None,
        mirrors: Sequence[Mirror] = (),
        start_offline: bool = False,
        on_save_failure: Literal["stop", "continue"] = "stop",
        resume_state: ResumeState = "auto",
        save_replay_buffer: SaveReplayBuffer = "auto",
        handle_signals: bool = True,
        grace_seconds: float = DEFAULT_GRACE_SECONDS,
        heartbeat_seconds: float = 10.0,
        sync_timeout_seconds: float = 60.0,
        max_unmirrored_checkpoints: int = 50,
        mirror_process_seconds: float = DEFAULT_AFTER_SECONDS,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        before = set(vars(self))
        for value, what in ((agent_id, "agent_id"), (run_id, "run_id")):
            if value is not None:
                check_id(value, what)
        self.episode = 0
        self.agent_id = agent_id
        self.run_name = run_name
        self.behind: list[str] = []
        self._checkpoint_dir = Path(checkpoint_dir)
        self._given_config = config
        self._config: dict[str, Any] = {}
        self._overrides = dict(overrides or {})
        self._sweep = dict(sweep) if sweep is not None else None
        self._mirrors = tuple(mirrors)
        self._start_offline = start_offline
        self._on_save_failure = on_save_failure
        self._resume_state: ResumeState = resume_state
        self._save_replay_buffer = save_replay_buffer
        self._interval = EveryNEpisodes(checkpoint_interval_episodes)
        self._options = RunOptions(
            Retention(keep_last_n_checkpoints, keep_best_n, keep_every_n_episodes),
            MirrorBacklog(max_unmirrored_checkpoints),
            heartbeat_seconds,
            sync_timeout_seconds,
            grace_seconds,
            mirror_process_seconds,
        )
        self._signals = SignalGuard(grace_seconds, self._save_here, self._end_beside, enabled=handle_signals)
        self._held = self._signals.hold()
        self._interruption: TrainingInterrupted | None = None
        self._exit = ExitGuard(self.abort)
        self._live: LiveRun | None = None
        self._ending: LiveRun | None = None
        self._lineage = Lineage(run_id)
        self._saved_state: tuple[int, int, int] | None = None
        self._trained: weakref.ref[BaseAlgorithm] | None = None
        self._snapshots: Snapshots | None = None
        self._due: int | None = None
        self._curve = CurveSampler()
        self._stalls = Stalls()
        self._latest_of_ended: Path | None = None
        self._episodes = EndedEpisodes()
        self._own_books = frozenset({*vars(self), OWN_BOOKS} - before)

    @property
    def run_id(self) -> str | None:
        """The run's id, once training has begun or where it was given."""
        return self._lineage.run_id

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder, once training has begun."""
        if self.agent_id is None or self.run_id is None:
            return None
        return RunFolder(self._checkpoint_dir, self.agent_id, self.run_id)

    @property
    def resume_report(self) -> dict[str, Any] | None:
        """Whether a resumed training goes on exactly (`exact`), and the `reason` why not; None for a fresh one."""
        return self._lineage.resumption.report if self._lineage.resumption is not None else None

    @property
    def interrupted_by(self) -> int | None:
        """The signal that ended the training, if one did."""
        return self._signals.received

    @property
    def latest_metadata(self) -> CheckpointMetadata | None:
        """The metadata of the newest checkpoint that this run committed, while it trains."""
        return self._live.latest_metadata if self._live is not None else None

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint that this run committed."""
        return self._live.latest if self._live is not None else self._latest_of_ended

    def __enter__(self) -> EpisodeCheckpointCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Save and end the run if an error left `learn`: at once, not when the process ends."""
        if error is not None:
            self.abort(error)

    def save_soon(self) -> None:
        """Save a checkpoint at the next moment at which everything can be saved."""
        if self._live is not None and self._due is None:
            self._due = self.episode

    def abort(self, error: BaseException | None = None) -> None:
        """Save what can be saved and end the run as failed, or interrupted where a signal was the cause.

        Does nothing when no training is under way.

        Args:
            error: What ended the training.
        """
        if self._live is not None:
            with self._held:
                self._abort(self._live, error)

    def _abort(self, live: LiveRun, error: BaseException | None) -> None:
        if self._lineage.resumption is not None:
            self._lineage.resumption.close()
        # Nothing was trained where the checkpoint that it was to go on from was refused; whoever stops a training goes
        # on from the last one, which is exact.
        stopped = isinstance(error, TrainingStopped)
        unsaved = stopped or isinstance(error, (CheckpointSaveError, IncompatibleCheckpointError))
        signalled = self._signals.received is not None or isinstance(error, (KeyboardInterrupt, TrainingInterrupted))
        interrupted = stopped or (signalled and not unsaved)
        if not unsaved:
            try:
                if all_finite(self.model):
                    self._save(self.episode, "signal" if interrupted else "exception")
                    live.flush()
                else:
                    logger.error("No checkpoint of the failure: the policy holds values that are no numbers")
            except Exception:
                logger.exception("The state at the failure could not be saved")
        for failure in live.failures():
            if failure is not error:
                logger.error("%s", failure)
        self._finish("interrupted" if interrupted else "failed", None if interrupted else error)

    def _on_training_start(self) -> None:
        if self._live is not None:
            # In a notebook an error that left learn() ends neither the process nor a `with` block.
            self.abort(RuntimeError("An earlier learn() of this callback ended with an error"))
        self._interruption = None
        self._take_up()
        # Before there is anything that says that it runs.
        self._signals.install()
        with self._held:
            try:
                live = self._live = self._open()
            except BaseException:
                self._signals.remove()
                raise
            self._exit.install()
            self._prepare(live)
            self._say(f"Run {self.run_id}: checkpoints in {live.folder.path.absolute()}")

    def _prepare(self, live: LiveRun) -> None:
        self.logger.output_formats.append(self._curve)
        self._curve.start(self.num_timesteps)
        self._stalls = Stalls()
        watched = CallbackStates(self.locals.get("callback"))
        self._snapshots = Snapshots(self.model, watched, self._resume_state, self._save_replay_buffer, self._take)
        self._due, self._trained = None, weakref.ref(self.model)
        if self._lineage.resumption is not None:
            replay = self._lineage.resumption.training_start(watched, live.note_resume)
            if replay is not None:
                self._snapshots.continue_from(*replay)

    def _on_rollout_start(self) -> None:
        with self._held:
            if self._lineage.resumption is not None:
                self._lineage.resumption.rollout_start()
            self._moments.rollout_start(wanted=self._signals.received is not None)

    def _on_step(self) -> bool:
        # At every step, so each call here is one that somebody's training waits for.
        with self._held:
            live, moments = self._live, self._snapshots
            if live is None or moments is None or self._interruption is not None:
                live, moments = self._running(), self._moments
            moments.step()
            ended = self._episodes.ended(self.model, self.locals)
            if ended:
                self._count(ended)
            live.stepped(self.num_timesteps, self.episode)
            if self._curve.due():
                self._add_point(live)
            if live.has_failed:
                self._check_writer(live)
            if self._due is not None or self._signals.received is not None:
                moments.take_soon(overdue=self._signals.overdue)
        return True

    def _on_rollout_end(self) -> None:
        with self._held:
            if "dones" not in self.locals:
                # ARS tells of a candidate's episodes after its last step.
                self._count(self._episodes.ended(self.model, self.locals))
                if self._due is not None:
                    self._moments.take_soon(overdue=False)
            self._moments.rollout_end()
            if self._lineage.resumption is not None:
                self._lineage.resumption.rollout_end()

    def _on_training_end(self) -> None:
        with self._held:
            self._end(self._running())

    def _end(self, live: LiveRun) -> None:
        try:
            live.flush()
            self._check_writer(live)
            point = self._moments.training_end()
            resumption = self._lineage.resumption
            if resumption is not None and not resumption.complete:
                # There was nothing left to train: what was to be restored is in the checkpoint that it came from.
                point = None
                resumption.close()
            due, self._due = self._due, None
            if due is not None:
                self._save(due, "interval", point)
            elif self._saved_state != self._state():
                self._save(self.episode, "end", point)
            live.flush()
            self._check_writer(live)
        except CheckpointSaveError as error:
            self._finish("failed", error)
            raise
        signum, checkpoint = self._signals.received, live.latest
        reached = self.model.num_timesteps >= self.model._total_timesteps
        self._finish("completed" if signum is None or reached else "interrupted")
        if signum is not None:
            # It came during the last update. Whoever calls learn() in a loop must stop all the same.
            self._leave(signum, checkpoint)

    def _take_up(self) -> None:
        """Take up where the model stands."""
        is_another = self._trained is None or self._trained() is not self.model
        if is_another or self.model.num_timesteps == 0:
            # A model of its own, be it the first or a further one in a loop over seeds.
            self._lineage.take_up(self.model, self._resume_state, self._overrides)
            self.episode, self._saved_state = self._lineage.episode, None
        else:
            self._lineage.go_on()

    def _open(self) -> LiveRun:
        """Begin the run: from here on it is recorded."""
        self.agent_id = self.agent_id or f"{algorithm_name(type(self.model)).rpartition(':')[2].lower()}_agent"
        given = self._given_config
        if given is None:
            given = describe_model(self.model, total_timesteps=self.model._total_timesteps)
        self._config = plain(given)
        record = first_record(
            self.model,
            self._lineage,
            agent_id=self.agent_id,
            name=self.run_name,
            config=self._config,
            overrides=self._overrides,
            heartbeat_seconds=self._options.heartbeat_seconds,
        )
        if self._sweep is not None:
            record["sweep"] = self._sweep
        return open_run(
            record,
            self._lineage,
            self._checkpoint_dir,
            self._mirrors,
            self._options,
            start_offline=self._start_offline,
            fresh=self.model.num_timesteps == 0,
            lease=lease_of(self.model),
            check=self._signals.stop,
        )

    @property
    def _moments(self) -> Snapshots:
        if self._snapshots is None:
            raise RuntimeError("The callback is called outside of learn()")
        return self._snapshots

    def _running(self) -> LiveRun:
        if self._interruption is not None:
            # Somebody's `except:` was in the way when it was raised.
            raise self._interruption
        if self._live is None:
            raise RuntimeError("The callback is called outside of learn()")
        return self._live

    def _count(self, ended: int) -> None:
        before, self.episode = self.episode, self.episode + ended
        due = self._interval.due(before, self.episode)
        if due is not None:
            # Several that fall due before the next safe point are one checkpoint, as several in one step are.
            self._due = due

    def _state(self) -> tuple[int, int, int]:
        return self.episode, self.model.num_timesteps, int(getattr(self.model, "_n_updates", 0))

    def _take(self, point: SafePoint | None) -> None:
        with self._held:
            live = self._running()
            due, self._due = self._due, None
            if due is not None:
                self._save(due, "interval", point)
            if self._signals.received is not None:
                self._stop_for_signal(live, self._signals.received, point)

    def _save_here(self, frame: FrameType | None) -> None:
        if self._live is not None and not is_writing(frame):
            self._moments.take_here()

    def _end_beside(self, seconds: float, say: Callable[[str], None]) -> None:
        deadline = time.monotonic() + seconds
        live = self._live or self._ending
        if live is None:
            say("Nothing was trained")
            cancel(self._mirrors, "interrupted")
            return
        live.report(num_timesteps=self.num_timesteps, episode=self.episode)
        live.end_beside("interrupted")
        say(f"The last checkpoint is {live.latest}" if live.latest is not None else "No checkpoint was saved")
        live.leave_mirrors(deadline - time.monotonic())

    def _save(self, episode: int, trigger: str, point: SafePoint | None = None) -> None:
        assert self.agent_id is not None and self.run_id is not None
        started = time.perf_counter()
        live, snapshot = self._running(), self._moments.capture(point)
        try:
            capture = capture_checkpoint(
                self.model,
                agent_id=self.agent_id,
                run_id=self.run_id,
                episode=episode,
                finished_episodes=self.episode,
                config=self._config,
                extra_state={"sweep": self._sweep} if self._sweep is not None else None,
                trigger=trigger,
                parent=self._lineage.parent,
                root_run_id=self._lineage.root_run_id,
                attributes=self._lineage.resumption.held_attributes if self._lineage.resumption is not None else None,
                exact=snapshot.exact,
                not_exact=snapshot.not_exact,
                replay=snapshot.replay,
                recorder=self._moments.recorder,
            )
        except BaseException:
            if snapshot.replay is not None:
                # Training would wait for somebody to write it.
                snapshot.replay.release()
            raise
        waited = live.save(capture) + self._moments.recorder.waited
        self._stalls.note(time.perf_counter() - started, waited)
        self._saved_state = self._state()
        mean_reward = capture.metadata.metrics["mean_reward"]
        if mean_reward is not None:
            # The curve looks once a second: the best checkpoint may lie between.
            live.report(mean_reward=mean_reward)

    def _check_writer(self, live: LiveRun) -> None:
        for failure in live.failures():
            if self._on_save_failure == "stop" or isinstance(failure, RunTakenOverError):
                raise failure
            self._saved_state = None
            logger.error("%s; training goes on (on_save_failure: continue)", failure)

    def _stop_for_signal(self, live: LiveRun, signum: int, point: SafePoint | None) -> None:
        if self._saved_state != self._state():
            self._save(self.episode, "signal", point)
        live.flush()
        self._check_writer(live)
        checkpoint = live.latest
        self._finish("interrupted")
        self._leave(signum, checkpoint)

    def _leave(self, signum: int, checkpoint: Path | None) -> NoReturn:
        self._interruption = TrainingInterrupted(signum, checkpoint)
        raise self._interruption

    def _add_point(self, live: LiveRun) -> None:
        point = {**self._curve.point(self.model, self.episode), **self._stalls.point()}
        live.add_metrics(point)
        live.report(
            num_timesteps=self.num_timesteps,
            episode=self.episode,
            steps_per_second=point["steps_per_second"],
            mean_reward=point["ep_rew_mean"],
            checkpoint_stalls=self._stalls.summary(),
        )

    def _finish(self, status: str, error: BaseException | None = None) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        self._ending = live
        self._moments.close()
        # A step has one point: the end may come right after one.
        if self._curve.last_step != self.model.num_timesteps:
            self._add_point(live)
        live.report(episode=self.episode, checkpoint_stalls=self._stalls.summary())
        if self._curve in self.logger.output_formats:
            self.logger.output_formats.remove(self._curve)
        if self._lineage.resumption is not None:
            self._lineage.resumption.close()
        try:
            signalled = self._signals.received
            self.behind = live.finish(
                status,
                error,
                hurry=lambda: self._signals.received != signalled or self._signals.no_time_for_copies,
            )
        finally:
            self._ending = None
            self._latest_of_ended = live.latest
            if live.latest is not None and live.latest_metadata is not None:
                # Another callback that trains this model goes on from here.
                note_origin(self.model, str(live.latest.absolute()), live.latest_metadata)
            self._exit.remove()
            self._signals.remove()
            self._say_end(live, status)

    def _say_end(self, live: LiveRun, status: str) -> None:
        if live.latest is None or live.latest_metadata is None:
            self._say(f"Run {self.run_id}: {status}, without a checkpoint")
            return
        resume = live.latest_metadata.resume_state
        exact = "exact" if resume.get("exact") else f"not exact: {resume.get('reason')}"
        self._say(f"Run {self.run_id}: {status}; its last checkpoint is {live.latest.absolute()} (a resume is {exact})")

    def _say(self, line: str) -> None:
        if self.verbose >= 1:
            print(printable(line))
