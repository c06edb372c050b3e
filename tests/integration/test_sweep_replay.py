"""A sweep of an off-policy algorithm: what Ray Tune is handed holds the replay buffer whole, whatever happens."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
from paced import Pace
from processes import wait_for
from stable_baselines3 import DQN
from sweeps import records, restarted, run_sweep, saves, start_sweep, write_sweep

from sb3_mlflow_ckpt.checkpoints import verify_checkpoint
from sb3_mlflow_ckpt.commit import capture_checkpoint, commit_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder

pytest.importorskip("ray.tune", reason="NOT TESTED: the extra [ray] is not installed")
pytestmark = pytest.mark.usefixtures("only_ray")

from sb3_mlflow_ckpt.scale import tune_reports  # noqa: E402


def _reported(folder: Path) -> list[Path]:
    return sorted(folder.glob("sweeps/*/run_trial_*/checkpoint_*/ep*.zip"))


def test_a_clone_and_a_resumed_trial_have_the_whole_replay_buffer_and_go_on_exactly(tmp_path: Path) -> None:
    pace = Pace(tmp_path, math.inf)
    file = write_sweep(
        tmp_path,
        training={
            "algo": "dqn", "env_id": "toy_environments:FixedLength-v0", "total_timesteps": 1600,
            "hyperparameters": {
                "learning_starts": 50, "buffer_size": 300, "batch_size": 16, "policy_kwargs": {"net_arch": [8]},
            },
            "checkpoint_interval_episodes": 7, "keep_last_n_checkpoints": 1, "env_wrappers": [pace.wrapper],
        },
        # Who has the shorter episodes has the lower rewards, and takes over the other's model and buffer.
        search={"learning_rate": {"uniform": [1e-4, 1e-2]}, "env_kwargs": {"grid": [{"length": 5}, {"length": 10}]}},
        scheduler="pbt",
        pbt={"perturbation_interval": 300, "quantile_fraction": 0.5},
        report_interval_timesteps=150,
    )  # fmt: skip
    process = start_sweep(file)
    wait_for(lambda: len(records(tmp_path)) == 2, "both members", process)
    pace.set(0.008)

    def clone_goes_on() -> bool:
        return any(
            max(saves(tmp_path)[record["run_id"]], default=0) > step["donor"]["num_timesteps"] + 150
            for record in records(tmp_path).values()
            for step in record["sweep"]["lineage"]
        )

    wait_for(clone_goes_on, "a clone that has reported", process)
    # To the driver alone, as a supervisor does.
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    before = records(tmp_path)
    saved = saves(tmp_path)
    clones = [record for record in before.values() if record["sweep"]["generation"] > 0]
    assert clones and all(record["resume"] == {"exact": True, "reason": None} for record in clones)
    assert {record["status"] for record in before.values()} == {"interrupted"}
    _whole(tmp_path)

    pace.set(0)
    done = run_sweep(file, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    after = records(tmp_path)
    assert [(r["status"], r["resume"]) for r in after.values()] == [("completed", {"exact": True, "reason": None})] * 2
    # An exploit leads to the donor's step, which may lie before the clone's own.
    kept = [r["run_id"] for n, r in after.items() if r["sweep"]["generation"] == before[n]["sweep"]["generation"]]
    assert restarted({run: saved[run] for run in kept}, saves(tmp_path)) == {}
    _whole(tmp_path)


def _whole(folder: Path) -> None:
    assert _reported(folder)
    for path in _reported(folder):
        metadata = verify_checkpoint(path)
        assert len(metadata.files) > 1, "its chunks lie beside it"
        assert metadata.resume_state is not None and metadata.resume_state["exact"]


def test_a_checkpoint_that_is_saved_anew_while_it_is_laid_out_is_one_of_the_two_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DQN("MlpPolicy", "CartPole-v1", buffer_size=500, learning_starts=10**9, seed=0)
    recorder, folder = ReplayRecorder(model), RunFolder(tmp_path, "agent", "run")

    def save() -> None:
        # A report, and the checkpoint of an interval, may come within one episode.
        model.learn(30, reset_num_timesteps=False, callback=lambda *_: recorder.protect() >= 0)
        captured = capture_checkpoint(model, agent_id="agent", run_id="run", episode=1, replay=recorder.capture())
        commit_checkpoint(folder, captured)

    save()
    link, moments = tune_reports._link, ["before", "after"]

    def meanwhile(source: Path, target: Path) -> Any:
        if source.suffix == ".zip" and moments:
            moment = moments.pop()
            if moment == "before":
                save()
            link(source, target)
            if moment == "after":
                save()
        else:
            link(source, target)

    monkeypatch.setattr(tune_reports, "_link", meanwhile)
    with tune_reports.staged(folder.model(1)) as (laid_out, metadata):
        assert verify_checkpoint(laid_out / folder.model(1).name) == metadata
        assert metadata.num_timesteps == model.num_timesteps
        assert not moments
