"""Owns what runs in a trial: the project's own `train`, from where the trial stands, below the sweep's MLflow run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.config import ENVIRONMENT_PREFIX, TrainingConfig
from sb3_mlflow_ckpt.errors import CheckpointError, MirrorUnavailableError, TrainingStopped
from sb3_mlflow_ckpt.layout import RunFolder, SweepFolder
from sb3_mlflow_ckpt.ownership import FolderClaim
from sb3_mlflow_ckpt.resume import ResumeSource, newest_of_run, resolve_checkpoint
from sb3_mlflow_ckpt.scale.search_space import short
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig
from sb3_mlflow_ckpt.scale.sweep_stop import TrialStop
from sb3_mlflow_ckpt.scale.trial_start import TrialStart, handed_checkpoint, trial_start

logger = logging.getLogger(__name__)

_LONGEST_NAME = 120

# A node may keep its checkpoints elsewhere than the others.
_CHECKPOINT_DIR = f"{ENVIRONMENT_PREFIX}CHECKPOINT_DIR"
# A process that Tune has told to end still writes its last lines.
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a sweep is told.

    Attributes:
        sweep: The sweep.
        sweep_id: Its id.
        storage_path: Where its folder lies, absolute.
        checkpoint_dir: Where run folders are made, absolute; `SB3_MLFLOW_CKPT_CHECKPOINT_DIR` of a node goes before it.
        tracking_uri: MLflow's, the same from every folder; None where nothing is tracked.
        mlflow_parent: The MLflow run of the sweep.
        one_machine: Whether a trial cannot have been at another one.
        flag: The handle of the sweep's `SweepFlag`.
    """

    sweep: SweepConfig
    sweep_id: str
    storage_path: str
    checkpoint_dir: str
    tracking_uri: str | None
    mlflow_parent: str | None
    one_machine: bool
    flag: Any

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(Path(self.storage_path), self.sweep_id)

    def run_folder(self, trial_id: str) -> RunFolder:
        """Return where a trial's run is kept at this machine."""
        return self.folder_of_run(self.folder.run_id(trial_id))

    def folder_of_run(self, run_id: str) -> RunFolder:
        """Return where the run of a trial is kept at this machine."""
        place = os.environ.get(_CHECKPOINT_DIR) or self.checkpoint_dir
        return RunFolder(Path(place).expanduser().absolute(), self.sweep.agent_id, run_id)


def run_trial(config: Mapping[str, Any], plan: TrialPlan) -> None:
    """Train one trial; what Ray Tune calls, in a thread of a process of its own.

    Args:
        config: The values that Tune chose.
        plan: What is the same for all.
    """
    from ray import tune

    from sb3_mlflow_ckpt.scale.tune_reports import TuneReporter, report_checkpoint
    from sb3_mlflow_ckpt.trainer import SweepPlace, train

    trial_id = str(tune.get_context().get_trial_id())
    stop = TrialStop(plan.flag, trial_id)
    folder, sweep = plan.run_folder(trial_id), plan.sweep
    if folder.record.exists():
        # What is the newest is known once the process before this one has let go.
        FolderClaim(folder, _PATIENCE_SECONDS).release()
    with _handed() as handed:
        own = _own(plan, folder, handed)
        start = trial_start(folder.run_id, config, own, handed, sweep.space)
        for source in (own, handed):
            if source is not None and source is not start.source and source.lease is not None:
                source.lease.release()
        facts = {"id": plan.sweep_id, "trial": trial_id.rpartition("_")[2], **start.facts()}
        place = SweepPlace(facts, plan.mlflow_parent, start.source)
        reporter = TuneReporter(sweep.report_interval_timesteps, facts, stop.is_set)
        try:
            result = train(_training(plan, folder, start), reporter=reporter, sweep=place)
        except TrainingStopped:
            if stop.is_set():
                stop.wait_for_the_end()
            raise
        if result.run_folder is None and start.source is not None:
            # It was trained to its end before; whoever asked did not know.
            report_checkpoint(start.source.path, facts)


def _training(plan: TrialPlan, folder: RunFolder, start: TrialStart) -> TrainingConfig:
    own: dict[str, Any] = {
        "run_id": folder.run_id,
        "agent_id": folder.agent_id,
        "checkpoint_dir": str(folder.checkpoint_dir),
        "run_name": _name(plan, folder.run_id, start.hyperparameters),
    }
    if plan.tracking_uri is not None:
        own["tracking_uri"] = plan.tracking_uri
    if start.source is not None or plan.one_machine:
        # MLflow answered when the sweep began; what is on the way does not wait for it.
        own["start_offline"] = True
    return plan.sweep.trial_config(start.hyperparameters, f"trial {folder.run_id}", **own)


def _name(plan: TrialPlan, run_id: str, values: Mapping[str, Any]) -> str:
    """Return what lists call a trial: its values, but for a population, whose values change."""
    told = ["seed"] if plan.sweep.scheduler == "pbt" else ["seed", *plan.sweep.search]
    described = ", ".join(f"{key.partition('.')[2] or key} {short(values[key])}" for key in told if key in values)
    return f"{plan.sweep.name} {run_id.rpartition('-')[2]}: {described}"[:_LONGEST_NAME]


def _own(plan: TrialPlan, folder: RunFolder, handed: ResumeSource | None) -> ResumeSource | None:
    """Return the newest checkpoint of the trial's run: of its folder here, or of MLflow where it was elsewhere since.

    Raises:
        MirrorUnavailableError: MLflow does not answer, and nothing else tells where the trial stands.
        CheckpointError: What MLflow has does not verify, and there is nothing else.
    """
    find = partial(newest_of_run, folder.run_id, checkpoint_dir=str(folder.checkpoint_dir))
    if plan.one_machine or plan.tracking_uri is None:
        return find(tracked=False)
    from sb3_mlflow_ckpt.mirrors.tracked_run import mlflow_id_of

    try:
        known_as = mlflow_id_of(folder.run_id, plan.tracking_uri)
        return find(tracked=known_as is not None, tracking_uri=plan.tracking_uri, mlflow_run_id=known_as)
    except (MirrorUnavailableError, CheckpointError) as error:
        here = find(tracked=False)
        if here is None and handed is None:
            raise  # It may be far on, and must not begin anew.
        logger.warning("%s. The trial goes on from what is here", error)
        return here


@contextmanager
def _handed() -> Iterator[ResumeSource | None]:
    """Yield the checkpoint that Tune hands the trial: its own, or another's that it is to go on from."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with ExitStack() as stack:
        source = None
        try:
            path = handed_checkpoint(Path(stack.enter_context(checkpoint.as_directory())))
            if path is not None:
                source = resolve_checkpoint(str(path), checkpoint_dir=str(path.parent), agent_id="")
        except (CheckpointError, OSError) as error:
            logger.warning("What Ray Tune hands the trial is passed over: %s", error)
        yield source
