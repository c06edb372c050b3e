"""A population of an off-policy algorithm: replay buffers are handed on whole, and survive a driver that ends at once."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from paced import Pace
from processes import lives, wait_for
from stable_baselines3 import DQN
from sweeps import records, run_sweep, saves, start_sweep, write_sweep

from sb3_mlflow_ckpt.checkpoints import verify_checkpoint
from sb3_mlflow_ckpt.commit import capture_checkpoint, commit_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder

pytest.importorskip("ray.tune", reason="NOT TESTED: the extra [ray] is not installed")
pytestmark = pytest.mark.usefixtures("only_ray")

from sb3_mlflow_ckpt.scale import tune_reports  # noqa: E402


def _reported(folder: Path) -> list[Path]:
    return sorted(folder.glob("sweeps/*/run_trial_*/checkpoint_*/ep*.zip"))


def test_a_second_ctrl_c_ends_all_at_once_and_a_clone_and_its_donor_go_on_exactly(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pace = Pace(tmp_path, math.inf)
    file = write_sweep(
        tmp_path,
        training={
            "algo": "dqn", "env_id": "toy_environments:FixedLength-v0", "total_timesteps": 320,
            "hyperparameters": {
                "learning_starts": 50, "buffer_size": 120, "batch_size": 16, "policy_kwargs": {"net_arch": [8]},
            },
            "checkpoint_interval_episodes": 7, "keep_last_n_checkpoints": 1, "env_wrappers": [pace.wrapper],
        },
        # Who has the shorter episodes has the lower rewards, and takes over the other's model and buffer.
        search={"learning_rate": {"uniform": [1e-4, 1e-2]}, "env_kwargs": {"grid": [{"length": 5}, {"length": 10}]}},
        scheduler="pbt",
        pbt={"perturbation_interval": 100, "quantile_fraction": 0.5},
        report_interval_timesteps=50,
    )  # fmt: skip
    process = start_sweep(file)
    request.addfinalizer(process.kill)
    wait_for(lambda: len(records(tmp_path)) == 2, "both members", process)
    pace.set(0.02)
    wait_for(lambda: "interrupted" in _statuses(tmp_path), "a member that is to be a clone", process)
    # Its process is started anew; the donor must not come to its end meanwhile.
    pace.set(math.inf)
    wait_for(lambda: any(_generations(tmp_path)), "the clone", process)
    [clone] = [record for record in records(tmp_path).values() if record["sweep"]["donor"]]
    pace.set(0.04)
    taken = clone["sweep"]["donor"]["num_timesteps"]
    wait_for(lambda: saves(tmp_path)[clone["run_id"]][-1] > taken, "a checkpoint of the clone", process)
    pace.set(math.inf)
    before = saves(tmp_path)
    started = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.name()]
    assert [p for p in started if "raylet" in p.name()] and [p for p in started if "train" in p.name()]
    # One that follows within a second is the same Ctrl-C, heard twice.
    wait_for(lambda: process.poll() is not None or process.send_signal(signal.SIGINT), "the end by a second Ctrl-C")
    assert process.returncode == 128 + signal.SIGINT
    said = (tmp_path / "sweep.log").read_text()
    assert said.endswith("Interrupted again, and ended at once; go on with the same command and --resume\n")
    assert "running" in _statuses(tmp_path)
    wait_for(lambda: not any(lives(p.pid) for p in started), "the end of Ray and of the trials")
    _whole(tmp_path)

    pace.set(0)
    done = run_sweep(file, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    after = records(tmp_path).values()
    assert [(r["status"], r["resume"]) for r in after] == [("completed", {"exact": True, "reason": None})] * 2
    # Tune may perturb once more, and hand the clone an earlier step of its donor's; none begins anew.
    assert all(min(saved[len(before[run]) :]) > 90 for run, saved in saves(tmp_path).items())
    _whole(tmp_path)


def _statuses(folder: Path) -> list[str]:
    return [record["status"] for record in records(folder).values()]


def _generations(folder: Path) -> list[int]:
    return [record["sweep"]["generation"] for record in records(folder).values()]


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
