"""Owns the end of trials: what stopped one is in its record and its MLflow run, before the sweep's own run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.patience import quick_requests
from sb3_mlflow_ckpt.mirrors.tracked_run import run_of
from sb3_mlflow_ckpt.reap import settle_run
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.scale.search_space import short
from sb3_mlflow_ckpt.scale.trial import TrialPlan
from sb3_mlflow_ckpt.scale.trial_start import EXPLOIT
from sb3_mlflow_ckpt.scale.tune_copies import remove_copies
from sb3_mlflow_ckpt.sync import MirrorAddresses, sync_runs

if TYPE_CHECKING:
    from ray.tune import Callback, Checkpoint

logger = logging.getLogger(__name__)

# A process that Tune has told to end sends its last lines itself.
_PATIENCE_SECONDS = 20.0


class TrialCloser:
    """Knows the trials of a sweep, and ends what they could not end themselves.

    Args:
        plan: The sweep.
        tell: Is given a line when a trial starts, goes on or ends.

    Attributes:
        failed: The ids of runs that ended with an error which no retry has mended.
    """

    def __init__(self, plan: TrialPlan, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._tell = tell
        self._errors: dict[str, str | None] = {}
        self._values: dict[str, Mapping[str, Any]] = {}
        # One at a time, and not in Tune's loop: a trial's process may take a while to let go.
        self._work = ThreadPoolExecutor(1, thread_name_prefix="closing")
        self.failed: set[str] = set()
        self._stepped = False

    @property
    def trials(self) -> dict[str, Mapping[str, Any]]:
        """How each trial's run ended as far as Tune knows, and its values, by the ids of the runs in their order."""
        ended = {self._plan.folder.run_id(trial_id): trial_id for trial_id in self._errors}
        return {
            run_id: {
                "status": "failed" if self._errors[trial_id] is not None else "interrupted",
                "hyperparameters": self._values[trial_id],
            }
            for run_id, trial_id in sorted(ended.items())
        }

    def steps(self, trials: Sequence[Any]) -> None:
        """Tell Tune's trials how they are run: a snapshot has them as they were told before it."""
        sweep = self._plan.sweep
        for trial in trials:
            trial.max_failures = sweep.max_failures
            if not self._stepped and trial.status == "PENDING":
                # None has a process yet.
                trial.update_resources({"cpu": sweep.resources.cpu, "gpu": sweep.resources.gpu})
        self._stepped = True

    def started(self, trial_id: str, config: Mapping[str, Any]) -> None:
        """Note a trial that starts, or goes on."""
        self._errors[trial_id] = None
        self._values[trial_id] = {key: value for key, value in config.items() if key != EXPLOIT}
        self.failed.discard(self._plan.folder.run_id(trial_id))
        own = () if EXPLOIT in config else ("seed",)
        values = "  ".join(f"{key} {short(config[key])}" for key in (*own, *self._plan.sweep.search) if key in config)
        self._tell(f"{self._plan.folder.run_id(trial_id)} trains: {values}")

    def failed_once(self, trial_id: str, error: str, attempt: str) -> None:
        """Tell of an attempt that failed, and is followed by another."""
        self._tell(f"{self._plan.folder.run_id(trial_id)} failed, and is tried again: {error}; {attempt}")

    def ended(self, trial_id: str, error: str | None = None, attempt: str = "") -> None:
        """Note a trial that has ended, with an error that is not retried or without one."""
        self._errors[trial_id] = error
        run_id = self._plan.folder.run_id(trial_id)
        if error is not None:
            self.failed.add(run_id)
        self._tell(f"{run_id} ended" + (f" with an error: {error}; {attempt}" if error is not None else ""))
        self._work.submit(self._close, trial_id, "failed" if error is not None else "interrupted")

    def saved(self, checkpoint: Checkpoint, trials: Sequence[Any]) -> None:
        """Note a checkpoint that a trial has reported."""
        sweep = self._plan.sweep
        if sweep.scheduler == "pbt":
            remove_copies(checkpoint, trials, -(-sweep.perturbation_interval // sweep.report_interval_timesteps) + 1)

    def known(self, trial_id: str, config: Mapping[str, Any], error: str | None) -> None:
        """Note a trial of a sweep that has ended, whatever became of it."""
        self._errors.setdefault(trial_id, error)
        self._values.setdefault(trial_id, {key: value for key, value in config.items() if key != EXPLOIT})
        if error is not None:
            self.failed.add(self._plan.folder.run_id(trial_id))

    def close_all(self) -> None:
        """End every run that has no end yet."""
        for trial_id, error in self._errors.items():
            self._work.submit(self._close, trial_id, "failed" if error is not None else "interrupted")
        self._work.shutdown()

    def _close(self, trial_id: str, status: str) -> None:
        folder = self._plan.run_folder(trial_id)
        try:
            self._tell_mlflow(folder, *self._settled(folder, status, self._errors.get(trial_id)))
        except Exception:
            logger.exception("The run %s of the sweep was not ended", folder.run_id)

    def _settled(self, folder: RunFolder, status: str, error: str | None) -> tuple[str, str | None]:
        """End a trial's run in its folder; return how it ended, and its id in MLflow."""
        try:
            settle_run(folder, status, error, addresses=self._mirrors, patience=_PATIENCE_SECONDS)
            record = read_record(folder)
            return str(record["status"]), (record.get("mlflow") or {}).get("run_id")
        except CheckpointError as problem:
            # Another node's disk holds it, or it never began: MLflow is told all the same.
            logger.debug("%s", problem)
            return status, None

    @property
    def _mirrors(self) -> MirrorAddresses:
        return MirrorAddresses(tracking_uri=self._plan.tracking_uri)

    def _tell_mlflow(self, folder: RunFolder, status: str, mlflow_run_id: str | None) -> None:
        """Send MLflow what the trial's process was ended in the middle of, and at least the end."""
        if self._plan.tracking_uri is None:
            return
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._plan.tracking_uri)
        with quick_requests():
            run = client.get_run(mlflow_run_id) if mlflow_run_id else run_of(client, folder.run_id)
            if run is None or run.info.status != "RUNNING":
                return
            if folder.record.exists():
                sync_runs(folder.checkpoint_dir, self._mirrors, run_id=folder.run_id, agent_id=folder.agent_id)
            if client.get_run(run.info.run_id).info.status == "RUNNING":
                client.set_terminated(run.info.run_id, naming.STATUS[status])


_closer: TrialCloser | None = None


def noting(closer: TrialCloser) -> Callback:
    """Return the callback by which Tune tells a closer of its trials.

    It holds nothing: Tune writes it down with its snapshot, and a restored sweep tells the closer of its own process.
    """
    global _closer
    _closer = closer
    return make_callback()


def make_callback() -> Callback:
    """Return a callback that tells the closer of this process."""
    from ray.tune import Callback

    class _Noting(Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            current().steps(trials)

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            current().started(trial.trial_id, trial.config)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            current().ended(trial.trial_id)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            current().failed_once(trial.trial_id, _reason(trial), _attempt(trial))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            current().ended(trial.trial_id, _reason(trial), _attempt(trial))

        def on_checkpoint(self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any) -> None:
            current().saved(checkpoint, trials)

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            for trial in trials:
                current().known(trial.trial_id, trial.config, _reason(trial) if trial.status == "ERROR" else None)

        def __reduce__(self) -> Any:
            return make_callback, ()

    return _Noting()


def current() -> TrialCloser:
    """Return the closer of the sweep that this process drives."""
    assert _closer is not None
    return _closer


def _reason(trial: Any) -> str:
    """Return why a trial failed last: from this machine's file, which Tune copies to its storage only later."""
    try:
        lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    except (OSError, TypeError):
        lines = []
    return redact(lines[-1])[:300] if lines else "Ray Tune gave no reason"


def _attempt(trial: Any) -> str:
    """Return which attempt of a trial failed, and where Tune keeps its whole trace."""
    failures, most = trial.run_metadata.num_failures, trial.max_failures + 1
    # A sweep that was resumed may try more often; a node that was taken away does not count.
    count = f"attempt {max(failures, 1)}" + (f" of {most}" if most >= failures else "")
    return f"{count}, its whole trace is in {trial.path}/{trial.run_metadata.error_filename}"
