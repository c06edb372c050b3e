"""A sweep that is stopped: by Ctrl-C in the middle of its trials, by SIGTERM before they begin; and one without Ray."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from paced import Pace
from processes import environment, script, wait_for
from sweeps import records, reports, restarted, run_sweep, saves, words, write_sweep

pytest.importorskip("ray.tune", reason="NOT TESTED: the extra [ray] is not installed")
pytestmark = pytest.mark.usefixtures("only_ray")

GO_ON = "Interrupted; go on with: sb3-mlflow-ckpt sweep sweep.yaml --resume\n"


class Sweep:
    """A sweep at a terminal of its own, whose trials take as long as the test wants."""

    def __init__(self, folder: Path, pace: float = 0.01, **keys: Any) -> None:
        self.folder = folder
        self.tracking_uri = f"sqlite:///{folder}/mlflow.db"
        self.pace = Pace(folder, pace)
        training = {
            "total_timesteps": 1024, "mlflow": True, "tracking_uri": self.tracking_uri,
            "env_wrappers": [self.pace.wrapper], **keys.pop("training", {}),
        }  # fmt: skip
        self.file = write_sweep(folder, **{"report_interval_timesteps": 128, "training": training, **keys})

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """Start it, in the process group of a terminal's foreground job."""
        with self._log.open("w") as log:
            return subprocess.Popen(
                words(self.file, *flags), cwd=self.folder, env=environment(), stdout=log, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip

    def reach(self, condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
        """Begin with both trials at once, and return when a condition holds: none comes to its end meanwhile."""
        wait_for(lambda: len(self.statuses) == 2, "both trials", process)
        # Some 10 s of training.
        self.pace.set(0.01)
        wait_for(condition, "trials in the middle", process)
        self.pace.set(0.1)

    @property
    def _log(self) -> Path:
        return self.folder / "sweep.log"

    @property
    def reported(self) -> int:
        return reports(self.folder)

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def saves(self) -> dict[str, list[int]]:
        return saves(self.folder)

    @property
    def statuses(self) -> list[str]:
        return [record["status"] for record in records(self.folder).values()]

    @property
    def in_mlflow(self) -> list[str]:
        return [run.info.status for run in MlflowClient(self.tracking_uri).search_runs(["0"])]


def test_ctrl_c_ends_all_trials_and_a_resume_finishes_them_none_from_zero(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, math.inf, seeds=[0, 1])
    process = sweep.start()
    sweep.reach(lambda: sweep.reported and len(sweep.saves) == 2 and all(sweep.saves.values()), process)
    # As a terminal does: to the driver, and to all that is in its process group.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(300) == 128 + signal.SIGINT
    assert sweep.said.endswith(GO_ON) and "Traceback" not in sweep.said
    assert sweep.statuses == ["interrupted"] * 2
    assert sweep.in_mlflow == ["KILLED"] * 3
    before = sweep.saves

    sweep.pace.set(0)
    done = run_sweep(sweep.file, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweep.statuses == ["completed"] * 2
    assert sweep.in_mlflow == ["FINISHED"] * 3
    assert restarted(before, sweep.saves) == {}
    assert [saved[-1] for saved in sweep.saves.values()] == [1024] * 2


def test_a_trial_saves_before_it_is_stopped(tmp_path: Path) -> None:
    never = {"checkpoint_interval_episodes": 0, "heartbeat_seconds": 0.2}
    sweep = Sweep(tmp_path, math.inf, seeds=[0, 1], report_interval_timesteps=100_000, training=never)
    # As a scheduler does that starts the same command again and again.
    process = sweep.start("--auto-resume")
    sweep.reach(lambda: any(r["progress"]["num_timesteps"] > 200 for r in records(tmp_path).values()), process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    assert "Interrupted: the trials save, and end" in sweep.said and "Traceback" not in sweep.said
    first = sweep.saves
    assert len(first) == 2 and all(len(saved) == 1 for saved in first.values()), sweep.said
    assert max(saved[0] for saved in first.values()) > 200
    assert sweep.statuses == ["interrupted"] * 2 and sweep.in_mlflow == ["KILLED"] * 3
    client = MlflowClient(sweep.tracking_uri)
    for run in client.search_runs(["0"], "tags.`mlflow.parentRunId` != ''"):
        assert len(client.list_artifacts(run.info.run_id, "checkpoints")) == 2
    sweep.pace.set(0)
    done = run_sweep(sweep.file, "--auto-resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert restarted(first, sweep.saves) == {} and sweep.statuses == ["completed"] * 2


def test_a_signal_that_comes_before_tune_listens_is_not_lost_and_does_not_take_ray_away(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, seeds=[0, 1])
    process = sweep.start()
    # The sweep's own run is about to be made.
    wait_for(lambda: (tmp_path / "mlflow.db").exists(), "MLflow's database", process)
    # As `timeout` does.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    assert sweep.said.endswith(GO_ON) and "Traceback" not in sweep.said
    assert set(sweep.statuses) <= {"interrupted"}
    assert set(sweep.in_mlflow) == {"KILLED"}


def test_without_ray_a_sweep_says_what_to_install(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    (tmp_path / "ray.py").write_text("raise ImportError('No module named ray')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"from sb3_mlflow_ckpt.cli import main\nmain(['sweep', {file.name!r}])\n"
    )
    done = script(code, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: sweep: needs Ray Tune, which is not installed (No module named ray). "
        "Install it with: python -m pip install 'sb3-mlflow-ckpt[ray]'\n"
    )
    assert not (tmp_path / "sweeps").exists() and not (tmp_path / "checkpoints").exists()
