"""Resumes that the matrix does not make: from MLflow, from an older checkpoint, after a signal; and those not exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from matrix import Fingerprints, fingerprint
from preempted import saved_at_signal
from processes import environment, start_trainer, trainer, wait_for
from rows import ROWS
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper

from sb3_mlflow_ckpt import CheckpointableEnv, EpisodeCheckpointCallback, load_checkpoint
from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.errors import IncompatibleCheckpointError
from sb3_mlflow_ckpt.json_lines import read_lines
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.trainer import TrainingResult, train

PPO_ROW, SAC_ROW = ROWS["PPO, 4 environments"], ROWS["SAC"]


def run(folder: Path, settings: dict[str, Any], **changes: Any) -> tuple[TrainingResult, dict[str, str]]:
    """Train in this process; return the result and the hashes of everything at its end."""
    folder.mkdir(exist_ok=True)
    whole = {"mlflow": False, "seed": 7, "checkpoint_interval_episodes": 1, "device": "cpu",
             "checkpoint_dir": str(folder / "checkpoints"), **settings, **changes}  # fmt: skip
    result = train(build_config([Layer("the test", whole)]), reporter=Fingerprints(folder / "result.json"))
    return result, json.loads((folder / "result.json").read_text())


def record(result: TrainingResult) -> dict[str, Any]:
    assert result.run_folder is not None
    return FolderRuns(result.run_folder.parents[1]).get(result.run_folder.name)


def in_the_middle(result: TrainingResult) -> Path:
    assert result.run_folder is not None
    paths = [path for path in list_checkpoints(result.run_folder.parents[1], result.run_folder.name)
             if verify_checkpoint(path).trigger == "interval"]  # fmt: skip
    return paths[len(paths) // 2]


@pytest.mark.parametrize("settings", [PPO_ROW, SAC_ROW], ids=["ppo", "sac"])
def test_a_resume_from_an_older_checkpoint_passes_through_the_newer_ones_states(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    alone, expected = run(tmp_path, settings, keep_last_n_checkpoints=0)
    resumed, hashes = run(tmp_path, settings, resume_from_checkpoint=str(in_the_middle(alone)))
    assert hashes == expected
    assert record(resumed)["resume"] == {"exact": True, "reason": None}


@pytest.mark.parametrize("settings", [PPO_ROW, SAC_ROW], ids=["ppo", "sac"])
def test_a_resume_from_mlflow_alone_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    tracked = {"mlflow": True, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    alone, expected = run(tmp_path, settings, keep_last_n_checkpoints=0, **tracked)
    uri = f"runs:/{alone.mlflow_run_id}/checkpoints/{in_the_middle(alone).name}"
    shutil.rmtree(tmp_path / "checkpoints")
    resumed, hashes = run(tmp_path, settings, resume_from_checkpoint=uri, keep_last_n_checkpoints=0, **tracked)
    assert hashes == expected
    # Its own checkpoints are whole without the run that it came from.
    assert all(verify_checkpoint(path) for path in list_checkpoints(tmp_path / "checkpoints"))
    assert record(resumed)["resume"]["exact"]


def test_the_folder_that_a_run_came_from_can_be_removed(tmp_path: Path) -> None:
    alone, expected = run(tmp_path, SAC_ROW, keep_last_n_checkpoints=0)
    assert alone.run_folder is not None
    first, _ = run(tmp_path, SAC_ROW, resume_from_checkpoint=str(in_the_middle(alone)), keep_last_n_checkpoints=0)
    shutil.rmtree(alone.run_folder)
    _, hashes = run(tmp_path, SAC_ROW, resume_from_checkpoint=str(in_the_middle(first)))
    assert hashes == expected


def test_a_resume_in_the_runs_own_folder_does_not_double_the_curve(tmp_path: Path) -> None:
    alone, expected = run(tmp_path, PPO_ROW, run_id="one", keep_last_n_checkpoints=0)
    assert alone.run_folder is not None
    _, hashes = run(tmp_path, PPO_ROW, run_id="one", resume_from_checkpoint=str(in_the_middle(alone)))
    assert hashes == expected
    points, _ = read_lines(alone.run_folder / "metrics.jsonl")
    steps = [point["num_timesteps"] for point in points]
    assert steps == sorted(set(steps))


def test_a_training_that_a_signal_stopped_ends_as_if_it_had_not(tmp_path: Path) -> None:
    flags = ("--algo", "ppo", "--env-id", "CartPole-v1", "--seed", 7, "--mlflow", "false", "--device", "cpu",
             "--hyperparameters", "{n_steps: 64, batch_size: 64, n_epochs: 2}", "--checkpoint-interval-episodes", 20,
             "--resume-from-checkpoint", "auto")  # fmt: skip
    process = start_trainer(*flags, "--total-timesteps", 10_000_000, cwd=tmp_path)
    wait_for(lambda: list_checkpoints(tmp_path / "checkpoints"), "the first checkpoint", process)
    process.terminate()
    assert process.wait(300) == 143
    metadata = saved_at_signal(tmp_path / "checkpoints")
    assert metadata.resume_state["exact"]
    target = metadata.num_timesteps + 1_000
    done = trainer(*flags, "--total-timesteps", target, cwd=tmp_path)
    assert done.returncode == 0 and "as if it had not stopped" in done.stdout, done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    assert trainer(*flags, "--total-timesteps", target, cwd=alone).returncode == 0
    ends = [max(list_checkpoints(folder / "checkpoints"), key=lambda p: verify_checkpoint(p).num_timesteps)
            for folder in (tmp_path, alone)]  # fmt: skip
    ours, expected = (load_checkpoint(path).model.get_parameters()["policy"] for path in ends)
    assert all(th.equal(ours[name], expected[name]) for name in expected)


def test_a_longer_target_goes_on_from_the_end(tmp_path: Path) -> None:
    settings = {**ROWS["PPO, gSDE"], "keep_last_n_checkpoints": 0}
    run(tmp_path / "short", settings, total_timesteps=256)
    path = list_checkpoints(tmp_path / "short" / "checkpoints")[-1]
    assert verify_checkpoint(path).trigger == "end"
    _, hashes = run(tmp_path / "short", settings, total_timesteps=512, resume_from_checkpoint=str(path))
    _, expected = run(tmp_path / "long", settings, total_timesteps=512)
    assert hashes == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resume_state": "weights"}, "resume_state is weights"),
        ({"seed": 8}, "this run has another seed"),
        ({"n_envs": 2}, "the environments are reset: this run changes their settings"),
        ({"env_kwargs": {"max_episode_steps": 30}}, "the environments are reset: this run changes their settings"),
        ({"hyperparameters": {"n_steps": 16, "batch_size": 32, "n_epochs": 2}}, "the unfinished rollout is dropped"),
    ],
    ids=["weights", "seed", "environments", "arguments", "rollout"],
)
def test_a_resume_that_is_not_exact_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    alone, _ = run(tmp_path, PPO_ROW, keep_last_n_checkpoints=0)
    late = [p for p in list_checkpoints(tmp_path / "checkpoints") if verify_checkpoint(p).num_timesteps % 256 > 100]
    resumed, _ = run(tmp_path, PPO_ROW, resume_from_checkpoint=str(late[0]), **changes)
    assert alone.run_folder != resumed.run_folder
    assert not record(resumed)["resume"]["exact"]
    assert reason in record(resumed)["resume"]["reason"]
    if changes.get("resume_state") == "weights":
        saved = verify_checkpoint(list_checkpoints(tmp_path / "checkpoints", resumed.run_folder.name)[-1])
        assert not saved.resume_state["exact"]
    else:
        with pytest.raises(IncompatibleCheckpointError, match=f"cannot be resumed exactly: .*{reason}"):
            run(tmp_path, PPO_ROW, resume_from_checkpoint=str(late[0]), **changes, resume_state="exact")


def test_another_number_of_threads_is_not_exact(tmp_path: Path) -> None:
    alone, _ = run(tmp_path, PPO_ROW, keep_last_n_checkpoints=0)
    before = th.get_num_threads()
    th.set_num_threads(before + 1)
    try:
        resumed, _ = run(tmp_path, PPO_ROW, resume_from_checkpoint=str(in_the_middle(alone)))
    finally:
        th.set_num_threads(before)
    assert "threads" in record(resumed)["resume"]["reason"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"save_replay_buffer": "never"}, "the replay buffer is left out (save_replay_buffer: never)"),
        (
            {"hyperparameters": {**SAC_ROW["hyperparameters"], "buffer_size": 90_000_000}},
            "the replay buffer is left out: it can grow to",
        ),
    ],
    ids=["never", "over 2 GiB"],
)
def test_a_buffer_that_is_left_out_is_said_and_refilled(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    alone, _ = run(tmp_path, SAC_ROW, keep_last_n_checkpoints=0, **changes)
    path = in_the_middle(alone)
    metadata = verify_checkpoint(path)
    assert not metadata.resume_state["exact"] and metadata.resume_state["reason"].startswith(reason)
    assert [entry.name for entry in metadata.files] == [path.name]
    resumed, _ = run(tmp_path, SAC_ROW, resume_from_checkpoint=str(path), **changes)
    assert reason in record(resumed)["resume"]["reason"]


def test_a_large_buffer_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    changes = {"hyperparameters": {**SAC_ROW["hyperparameters"], "buffer_size": 90_000_000}}
    alone, _ = run(tmp_path, SAC_ROW, save_replay_buffer="always", keep_last_n_checkpoints=0, **changes)
    assert verify_checkpoint(in_the_middle(alone)).resume_state["exact"]


class Unknown(VecEnvWrapper):
    """A layer that keeps something to itself."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


class MyPPO(PPO):
    """An algorithm that may keep something to itself."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PPO("MlpPolicy", make_vec_env("CartPole-v1"), n_steps=32), "are not wrapped in CheckpointableEnv"),
        (
            lambda: PPO("MlpPolicy", Unknown(make_vec_env("CartPole-v1", wrapper_class=CheckpointableEnv)), n_steps=32),
            "the state of Unknown is not known",
        ),
        (
            lambda: MyPPO("MlpPolicy", make_vec_env("CartPole-v1", wrapper_class=CheckpointableEnv), n_steps=32),
            "what state MyPPO adds to its parameters is not known",
        ),
    ],
    ids=["environment", "layer", "algorithm"],
)
def test_what_cannot_be_captured_is_said_in_the_checkpoint(tmp_path: Path, make: Any, reason: str) -> None:
    make().learn(200, callback=EpisodeCheckpointCallback(1, 0, tmp_path))
    for path in list_checkpoints(tmp_path):
        state = verify_checkpoint(path).resume_state
        assert not state["exact"] and reason in state["reason"]


class Counting(VecEnvWrapper):
    """A layer that says its state."""

    steps = 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.steps += 1
        return self.venv.step_wait()

    def get_checkpoint_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_checkpoint_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_a_layer_of_ones_own_that_says_its_state_is_exact(tmp_path: Path) -> None:
    def env() -> Counting:
        return Counting(make_vec_env("CartPole-v1", seed=1, wrapper_class=CheckpointableEnv))

    class Last(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.hashes = fingerprint(self.model) | {"steps": self.training_env.steps}

    alone, last = Last(), Last()
    PPO("MlpPolicy", env(), n_steps=32, seed=1).learn(200, [EpisodeCheckpointCallback(1, 0, tmp_path), alone])
    path = list_checkpoints(tmp_path)[3]
    assert verify_checkpoint(path).resume_state["exact"]
    model, _, _ = load_checkpoint(path, env=env())
    callbacks = [EpisodeCheckpointCallback(1, 0, tmp_path), last]
    model.learn(200 - model.num_timesteps, callbacks, reset_num_timesteps=False)
    assert last.hashes == alone.hashes


def test_a_checkpoint_of_an_error_is_not_exact(tmp_path: Path) -> None:
    env = make_vec_env(
        "toy_environments:FixedLength-v0", env_kwargs={"fails_at": 77}, wrapper_class=CheckpointableEnv
    )
    with pytest.raises(RuntimeError, match="the simulator broke"), EpisodeCheckpointCallback(5, 0, tmp_path) as ours:
        PPO("MlpPolicy", env, n_steps=32).learn(200, ours)
    saved = [verify_checkpoint(path) for path in list_checkpoints(tmp_path)]
    assert [m.resume_state["exact"] for m in saved if m.trigger == "exception"] == [False]
    assert all(m.resume_state["exact"] for m in saved if m.trigger == "interval")


def test_an_off_policy_script_goes_on_with_its_buffer(tmp_path: Path) -> None:
    def env() -> Any:
        make = lambda env: CheckpointableEnv(TimeLimit(env, 20))  # noqa: E731
        return make_vec_env("Pendulum-v1", seed=1, wrapper_class=make)

    model = SAC("MlpPolicy", env(), learning_starts=20, batch_size=8, buffer_size=500, seed=1)
    model.learn(100, callback=EpisodeCheckpointCallback(2, 0, tmp_path))
    resumed, _, _ = load_checkpoint(list_checkpoints(tmp_path)[-1], env=env())
    callback = EpisodeCheckpointCallback(2, 0, tmp_path)
    resumed.learn(20, callback=callback, reset_num_timesteps=False)
    assert resumed.replay_buffer is not None and resumed.replay_buffer.size() == 120
    assert callback.resume_report == {"exact": True, "reason": None}


def test_the_environment_of_the_trainer_is_the_one_that_says_whether_it_is_exact(tmp_path: Path) -> None:
    done = trainer("--mlflow", "false", "--total-timesteps", 200, "--hyperparameters", "n_steps=64",
                   cwd=tmp_path, env=environment())  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path, *_] = list_checkpoints(tmp_path / "checkpoints")
    assert verify_checkpoint(path).resume_state == {
        "restored": ["parameters", "optimizers", "counters", "random states", "environments"],
        "exact": True,
        "reason": None,
    }
