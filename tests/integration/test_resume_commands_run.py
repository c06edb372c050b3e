"""Resume commands, pasted into a shell as the pages and `runs show` offer them: each goes on with the training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from processes import DEADLINE, ROOT, environment, trainer

from sb3_mlflow_ckpt.resume_commands import resume_command
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_EXPERIMENT = "It's mine"


class Trained:
    """A run that reached its target, in a folder whose name no shell takes as it is; its record is read anew."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint_dir = folder / "it's \"my\" $HOME\nfolder"
        self.uri = f"sqlite:///{folder}/mlflow.db"
        done = trainer(
            "--env-id", "toy_environments:FixedLength-v0", "--env-kwargs", "{length: 8}", "--total-timesteps", 64,
            "--hyperparameters", "{n_steps: 32, policy_kwargs: {net_arch: [8], activation_fn: toy_algorithms:MyTanh}}",
            "--checkpoint-interval-episodes", 2, "--keep-last-n-checkpoints", 1, "--seed", 1,
            "--checkpoint-dir", self.checkpoint_dir, "--tracking-uri", self.uri, "--experiment-name", _EXPERIMENT,
            cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.printed = done.stdout
        [self.record] = self.records()

    def records(self) -> list[dict[str, Any]]:
        runs = FolderRuns(self.checkpoint_dir)
        return [runs.get(run["run_id"]) for run in runs.list()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def test_the_trainer_prints_the_command_that_the_pages_offer(trained: Trained) -> None:
    offered = resume_command(trained.record, trained.record["checkpoint_paths"][-1], program="trainer", source="path")
    [printed] = [line for line in trained.printed.splitlines() if line.startswith("Resume with: ")]
    assert printed == f"Resume with: {offered}"
    assert "--total-timesteps 128" in printed


@pytest.mark.parametrize(
    ("program", "source"), [("trainer", "path"), ("trainer", "uri"), ("mlflow", "path"), ("mlflow", "uri")]
)
def test_a_command_that_is_pasted_goes_on_with_the_training(
    trained: Trained, tmp_path: Path, program: Any, source: Any
) -> None:
    # The newest from the disk; one that only MLflow has left, since one is kept on disk.
    chosen = trained.record["checkpoint_paths"][-1 if source == "path" else 1]
    assert chosen["on_disk"] is (source == "path")
    command = resume_command(trained.record, chosen, program=program, source=source)
    assert command is not None and command.isprintable()
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    before = {run["run_id"] for run in trained.records()}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE,
        env=environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    [new] = [run for run in trained.records() if run["run_id"] not in before]
    assert (new["status"], new["resume"]["exact"]) == ("completed", True)
    assert new["parent"]["run_id"] == trained.record["run_id"]
    assert new["parent"]["checkpoint"] == chosen["path" if source == "path" else "uri"]
    assert new["progress"]["num_timesteps"] == (128 if source == "path" else 64)
    changed = {"total_timesteps"} if source == "path" else set()
    assert new["overrides"].keys() == changed
    run = MlflowClient(trained.uri).get_run(new["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.experiment_id == trained.record["mlflow"]["experiment_id"]
    assert new["mlflow"]["experiment_name"] == _EXPERIMENT
