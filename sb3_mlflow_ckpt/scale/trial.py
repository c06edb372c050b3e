"""Owns what runs in a trial: the project's own `train`, from where the trial stands, below the sweep's MLflow run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt.layout import RunFolder, SweepFolder, checkpoint_in
from sb3_mlflow_ckpt.ownership import FolderClaim
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig
from sb3_mlflow_ckpt.scale.trial_start import trial_start

# A process that Tune has told to end still writes its last lines.
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class TrialPlan:
    """What every trial of a sweep is told.

    Attributes:
        sweep: The sweep.
        sweep_id: Its id.
        storage_path: Where its folder lies, absolute.
        checkpoint_dir: Where run folders are made, absolute.
        tracking_uri: MLflow's, the same from every folder; None where nothing is tracked.
        mlflow_parent: The MLflow run of the sweep.
    """

    sweep: SweepConfig
    sweep_id: str
    storage_path: str
    checkpoint_dir: str
    tracking_uri: str | None
    mlflow_parent: str | None

    @property
    def folder(self) -> SweepFolder:
        return SweepFolder(Path(self.storage_path), self.sweep_id)

    def run_folder(self, trial_id: str) -> RunFolder:
        """Return where a trial's run is kept."""
        agent = self.sweep.trial_config({}).agent
        return RunFolder(Path(self.checkpoint_dir), agent, self.folder.run_id(trial_id))


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
    folder, sweep = plan.run_folder(trial_id), plan.sweep
    if folder.record.exists():
        # What is the newest is known once the process before this one has let go.
        FolderClaim(folder, _PATIENCE_SECONDS).release()
    with _handed() as given:
        start = trial_start(folder, config, given, sweep.space)
        facts = {"id": plan.sweep_id, "trial": trial_id.rpartition("_")[2], **start.facts()}
        own: dict[str, Any] = {
            "run_id": folder.run_id,
            "checkpoint_dir": plan.checkpoint_dir,
            "run_name": folder.run_id,
        }
        if plan.tracking_uri is not None:
            own["tracking_uri"] = plan.tracking_uri
        if start.checkpoint is not None:
            own["resume_from_checkpoint"] = str(start.checkpoint)
        training = sweep.trial_config(start.hyperparameters, f"trial {folder.run_id}", **own)
        reporter = TuneReporter(sweep.report_interval_timesteps, facts)
        result = train(training, reporter=reporter, sweep=SweepPlace(facts, plan.mlflow_parent))
        if result.run_folder is None and start.checkpoint is not None:
            # It was trained to its end before; whoever asked did not know.
            report_checkpoint(start.checkpoint, facts)


@contextmanager
def _handed() -> Iterator[Path | None]:
    """Yield the zip of the checkpoint that Tune hands the trial: its own, or another's that it is to go on from."""
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as name:
        yield checkpoint_in(Path(name), os.listdir(name))
