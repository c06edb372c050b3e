"""SIGTERM, SIGINT and unhandled errors in real processes: saved at a safe point, recorded, a non-zero exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from preempted import saved_at_signal
from processes import environment, script, start_python, start_trainer, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_SCRIPT = """
from stable_baselines3 import PPO
from sb3_mlflow_ckpt import EpisodeCheckpointCallback
callback = EpisodeCheckpointCallback(checkpoint_interval_episodes=20)
PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(10_000_000, callback=callback)
"""


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_a_signal_saves_records_and_exits_with_128_plus_its_number(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    process = start_trainer("--total-timesteps", 10_000_000, "--hyperparameters", "n_steps=64", cwd=tmp_path)
    wait_for(lambda: list_checkpoints(tmp_path / "checkpoints"), "the first checkpoint", process)
    for signum in signals:
        process.send_signal(signum)
    assert process.wait(300) == 128 + signals[0]
    log = (tmp_path / "trainer.log").read_text()
    assert "Traceback" not in log

    [record] = FolderRuns(tmp_path / "checkpoints").list()
    assert (record["status"], record["error"]) == ("interrupted", None)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    metadata = saved_at_signal(tmp_path / "checkpoints")
    assert f"--resume-from-checkpoint {newest}" in log
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(record["run_id"])
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow.latest_checkpoint_artifact"] == f"checkpoints/{newest.name}"

    target = metadata.num_timesteps + 128
    done = trainer("--resume-from-checkpoint", "auto", "--total-timesteps", target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"at episode {metadata.episode}, {metadata.num_timesteps} of {target} timesteps" in done.stdout


def test_ctrl_c_with_environments_in_processes_still_saves(tmp_path: Path) -> None:
    """Ctrl-C reaches the workers too: one that dies of it would break the pipe before the save."""
    process = start_python(
        *("-m", "sb3_mlflow_ckpt.trainer", "--total-timesteps", 10_000_000, "--mlflow", "false"),
        *("--n-envs", 2, "--vec-env", "subproc", "--hyperparameters", "n_steps=64"),
        cwd=tmp_path, log=tmp_path / "log", new_session=True,
    )  # fmt: skip
    wait_for(lambda: list_checkpoints(tmp_path / "checkpoints"), "the first checkpoint", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(300) == 130
    [record] = FolderRuns(tmp_path / "checkpoints").list()
    assert record["status"] == "interrupted"
    saved_at_signal(tmp_path / "checkpoints")


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_ctrl_c_in_a_users_own_script_with_environments_in_processes_saves_exactly(
    tmp_path: Path, start_method: str
) -> None:
    (tmp_path / "own.py").write_text(
        "from stable_baselines3 import PPO\n"
        "from stable_baselines3.common.env_util import make_vec_env\n"
        "from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize\n"
        "from sb3_mlflow_ckpt import CheckpointableEnv, EpisodeCheckpointCallback\n"
        "if __name__ == '__main__':\n"
        "    env = VecNormalize(make_vec_env('CartPole-v1', 2, vec_env_cls=SubprocVecEnv,\n"
        f"        vec_env_kwargs={{'start_method': {start_method!r}}}, wrapper_class=CheckpointableEnv))\n"
        "    model = PPO('MlpPolicy', env, n_steps=64, device='cpu')\n"
        "    model.learn(10_000_000, callback=EpisodeCheckpointCallback(20))\n"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "own.py"], cwd=tmp_path, env=environment(), stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip
    wait_for(lambda: list_checkpoints(tmp_path / "checkpoints"), "the first checkpoint", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(300) == 130, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert verify_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).resume_state["exact"] is True


def test_a_users_own_script_is_saved_on_sigterm(tmp_path: Path) -> None:
    process = start_python("-c", _SCRIPT, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: list_checkpoints(tmp_path / "checkpoints"), "the first checkpoint", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143
    saved_at_signal(tmp_path / "checkpoints")


def test_an_unhandled_error_in_a_users_own_script_is_saved_and_recorded(tmp_path: Path) -> None:
    failing = _SCRIPT.replace('"CartPole-v1"', "FixedLength(fails_at=300)").replace(
        "from stable", "from toy_environments import FixedLength\nfrom stable", 1
    )
    done = script(failing, tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: the simulator broke" in done.stderr
    [record] = FolderRuns(tmp_path / "checkpoints").list()
    assert (record["status"], record["error"]["message"]) == ("failed", "the simulator broke")
    assert verify_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).trigger == "exception"


def test_an_exit_in_the_middle_of_training_is_recorded_too(tmp_path: Path) -> None:
    leaving = _SCRIPT.replace("callback=callback", "callback=[callback, Leave()]").replace(
        "callback =",
        "from stable_baselines3.common.callbacks import BaseCallback\n"
        "class Leave(BaseCallback):\n"
        "    def _on_step(self):\n"
        "        if self.num_timesteps == 300: raise SystemExit(7)\n"
        "        return True\n"
        "callback =",
        1,
    )
    done = script(leaving, tmp_path)
    assert done.returncode == 7
    [record] = FolderRuns(tmp_path / "checkpoints").list()
    assert record["status"] == "failed"
    assert verify_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1]).num_timesteps == 300


def test_an_error_of_the_environment_fails_the_run_in_mlflow_too(tmp_path: Path) -> None:
    done = trainer(
        "--env-id", "toy_environments:FixedLength-v0", "--env-kwargs", "fails_at=300", "--hyperparameters", "n_steps=64",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "RuntimeError: the simulator broke" in done.stderr
    [record] = FolderRuns(tmp_path / "checkpoints").list()
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(record["run_id"])
    assert (record["status"], run.info.status) == ("failed", "FAILED")
    assert run.data.tags["sb3_mlflow_ckpt.error"] == "RuntimeError: the simulator broke"
