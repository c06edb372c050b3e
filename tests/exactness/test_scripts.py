"""Scripts of users' own: what is claimed to be exact is, whatever is around the callback."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from matrix import fingerprint
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from sb3_mlflow_ckpt import CheckpointableEnv, EpisodeCheckpointCallback, load_checkpoint
from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.state.archive import read_exact


class Last(BaseCallback):
    """Takes the fingerprint of the end."""

    hashes: dict[str, str]

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.hashes = fingerprint(self.model)


def cart_pole(n_envs: int = 1) -> Any:
    return make_vec_env("CartPole-v1", n_envs=n_envs, seed=1, wrapper_class=CheckpointableEnv)


def ppo(env: Any, **arguments: Any) -> PPO:
    return PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=2, seed=1, device="cpu", **arguments)


def learned(model: Any, folder: Path, target: int, *others: BaseCallback) -> tuple[dict[str, str], Any]:
    """Train to a target; return the hashes of the end and our callback."""
    ours, last = EpisodeCheckpointCallback(1, 0, folder), Last()
    remaining = target - model.num_timesteps
    model.learn(remaining, [ours, *others, last], reset_num_timesteps=model.num_timesteps == 0)
    return last.hashes, ours


@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_target_within_a_rollout_is_resumed_to_the_end_of_the_rollout(tmp_path: Path, n_envs: int) -> None:
    expected, _ = learned(ppo(cart_pole(n_envs)), tmp_path, 400)
    paths = list_checkpoints(tmp_path)
    steps = [verify_checkpoint(path).num_timesteps for path in paths]
    # Whole rollouts of 64 steps of each environment.
    end = -(-400 // (64 * n_envs)) * 64 * n_envs
    assert max(steps) == end and not [step for step in steps if 400 <= step < end]
    late = max((path for path in paths if verify_checkpoint(path).num_timesteps < 400), key=lambda p: p.name)
    model, _, _ = load_checkpoint(late, env=cart_pole(n_envs), device="cpu")
    assert learned(model, tmp_path / "resumed", 400)[0] == expected


def test_a_learn_with_nothing_left_to_train_changes_nothing(tmp_path: Path) -> None:
    learned(ppo(cart_pole()), tmp_path, 200)
    path = list_checkpoints(tmp_path)[3]
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    callback = EpisodeCheckpointCallback(1, 0, tmp_path / "again")
    model.learn(0, callback=callback, reset_num_timesteps=False)
    assert model.n_steps == 64
    assert not [p for p in list_checkpoints(tmp_path / "again") if verify_checkpoint(p).resume_state["exact"]]


class Broken(BaseCallback):
    def _on_training_start(self) -> None:
        raise ValueError("broken")

    def _on_step(self) -> bool:
        return True


def test_a_callback_that_fails_at_the_start_leaves_the_model_as_it_is_configured(tmp_path: Path) -> None:
    learned(ppo(cart_pole()), tmp_path, 200)
    model, _, _ = load_checkpoint(list_checkpoints(tmp_path)[3], env=cart_pole(), device="cpu")
    with pytest.raises(ValueError, match="broken"), EpisodeCheckpointCallback(1, 0, tmp_path / "again") as ours:
        model.learn(100, [ours, Broken()], reset_num_timesteps=False)
    assert model.n_steps == 64
    [saved] = list_checkpoints(tmp_path / "again")
    assert load_checkpoint(saved, env=cart_pole(), device="cpu").model.n_steps == 64


def half(progress: float) -> float:
    return 1e-3 * (0.5 + progress / 2)


@pytest.mark.parametrize("rate", [half, LinearSchedule(1e-2, 1e-5, 1.0)], ids=["function", "schedule"])
def test_a_schedule_that_was_not_given_again_is_not_exact_and_given_again_it_is(tmp_path: Path, rate: Any) -> None:
    expected, _ = learned(ppo(cart_pole(), learning_rate=rate), tmp_path, 256)
    path = list_checkpoints(tmp_path)[2]
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    _, ours = learned(model, tmp_path / "without", 256)
    assert not ours.resume_report["exact"] and "learning_rate" in ours.resume_report["reason"]
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu", hyperparameters={"learning_rate": rate})
    hashes, ours = learned(model, tmp_path / "with", 256)
    assert hashes == expected and ours.resume_report["exact"]


def test_noise_that_was_not_given_again_is_not_exact_and_given_again_it_is(tmp_path: Path) -> None:
    def env() -> Any:
        return make_vec_env("Pendulum-v1", seed=1, env_kwargs={"max_episode_steps": 20}, wrapper_class=CheckpointableEnv)

    noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.2 * np.ones(1))
    model = TD3("MlpPolicy", env(), learning_starts=30, batch_size=8, action_noise=noise, seed=1, device="cpu")
    expected, _ = learned(model, tmp_path, 120)
    path = list_checkpoints(tmp_path)[2]
    loaded, _, _ = load_checkpoint(path, env=env(), device="cpu")
    assert "action_noise" in learned(loaded, tmp_path / "without", 120)[1].resume_report["reason"]
    again = {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.2 * np.ones(1))}
    loaded, _, _ = load_checkpoint(path, env=env(), device="cpu", hyperparameters=again)
    assert learned(loaded, tmp_path / "with", 120)[0] == expected


class Adding(VecNormalize):
    """A subclass may keep more than the class."""


class OwnDummy(DummyVecEnv):
    """As may this one."""


class OwnBuffer(RolloutBuffer):
    """And this one."""


def outside(env: Any) -> Any:
    return TimeLimit(CheckpointableEnv(env), 30)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ppo(make_vec_env("CartPole-v1", wrapper_class=outside)), "wrappers outside of CheckpointableEnv"),
        (lambda: ppo(CheckpointableEnv(gym.make("CartPole-v1"))), "wrappers outside of CheckpointableEnv"),
        (lambda: ppo(Adding(cart_pole())), "the state of Adding is not known"),
        (
            lambda: ppo(make_vec_env("CartPole-v1", wrapper_class=CheckpointableEnv, vec_env_cls=OwnDummy)),
            "the state of OwnDummy is not known",
        ),
        (lambda: ppo(cart_pole(), rollout_buffer_class=OwnBuffer), "OwnBuffer"),
    ],
    ids=["outside", "monitor", "normalize", "vectorised", "buffer"],
)
def test_what_may_keep_more_than_is_known_is_not_exact(tmp_path: Path, make: Callable[[], Any], reason: str) -> None:
    learned(make(), tmp_path, 128)
    states = [verify_checkpoint(path).resume_state for path in list_checkpoints(tmp_path)]
    assert states and all(not state["exact"] and reason in state["reason"] for state in states)


class Drifting(VecEnvWrapper):
    """Hands out the very array that it goes on changing."""

    def __init__(self, venv: Any) -> None:
        super().__init__(venv)
        self.drift = np.zeros(4, dtype=np.float32)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.drift += 1e-3
        return observations + self.drift, rewards, dones, infos

    def get_checkpoint_state(self) -> dict[str, Any]:
        return {"drift": self.drift}

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.drift[:] = state["drift"]


def test_a_state_that_is_handed_out_by_reference_is_copied(tmp_path: Path) -> None:
    expected, _ = learned(ppo(Drifting(cart_pole())), tmp_path, 256)
    for path in list_checkpoints(tmp_path)[1:4]:
        model, _, _ = load_checkpoint(path, env=Drifting(cart_pole()), device="cpu")
        assert learned(model, tmp_path / path.stem, 256)[0] == expected


def test_a_model_that_was_trained_further_is_not_taken_back(tmp_path: Path) -> None:
    learned(ppo(cart_pole()), tmp_path, 128)
    model, _, _ = load_checkpoint(list_checkpoints(tmp_path)[0], env=cart_pole(), device="cpu")
    model.learn(128, reset_num_timesteps=False)
    steps, ours = model.num_timesteps, EpisodeCheckpointCallback(1, 0, tmp_path / "on")
    model.learn(64, callback=ours, reset_num_timesteps=False)
    assert model.num_timesteps == steps + 64
    assert ours.resume_report is None


def test_one_callback_resumes_a_second_model(tmp_path: Path) -> None:
    expected, ours = learned(ppo(cart_pole()), tmp_path, 256)
    path = list_checkpoints(tmp_path)[2]
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    last, first_run = Last(), ours.run_id
    model.learn(256 - model.num_timesteps, [ours, last], reset_num_timesteps=False)
    assert last.hashes == expected
    assert ours.run_id != first_run and ours.resume_report == {"exact": True, "reason": None}


class Curious(BaseCallback):
    """Makes its state in mid-training, an array among it, and trains by it."""

    def _on_step(self) -> bool:
        self.seen = getattr(self, "seen", 0) + 1
        self.sums = getattr(self, "sums", np.zeros(2)) + self.seen
        self.model.ent_coef = 1e-4 * float(self.sums[0] % 7)
        return True


def test_what_a_callback_made_in_mid_training_is_restored(tmp_path: Path) -> None:
    expected, _ = learned(ppo(cart_pole()), tmp_path, 256, Curious())
    path = list_checkpoints(tmp_path)[2]
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    curious = Curious()
    hashes, ours = learned(model, tmp_path / "resumed", 256, curious)
    assert hashes == expected and ours.resume_report["exact"] and curious.seen == 256
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    _, ours = learned(model, tmp_path / "without", 256)
    assert "the callback Curious of the checkpoint is not there" in ours.resume_report["reason"]


class Counting(EpisodeCheckpointCallback):
    """Ours, with a state of a user's own."""

    def __init__(self, *arguments: Any) -> None:
        self.mine = 0
        super().__init__(*arguments)
        self.also_mine = 0

    def _on_step(self) -> bool:
        self.mine += 1
        self.also_mine += 2
        return super()._on_step()


def test_of_a_subclass_of_ours_what_the_user_added_is_restored(tmp_path: Path) -> None:
    learned_by = [Counting(1, 0, tmp_path), Last()]
    ppo(cart_pole()).learn(256, learned_by)
    expected, path = learned_by[1].hashes, list_checkpoints(tmp_path)[2]
    exact = read_exact(path)
    steps = verify_checkpoint(path).num_timesteps
    assert exact is not None
    [counted] = [state for name, state in exact["callbacks"].items() if name.endswith(".Counting")]
    assert counted == {"n_calls": steps, "mine": steps, "also_mine": 2 * steps}

    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    again = [Counting(1, 0, tmp_path / "resumed"), Last()]
    model.learn(256 - model.num_timesteps, again, reset_num_timesteps=False)
    assert again[1].hashes == expected and again[0].resume_report == {"exact": True, "reason": None}
    assert (again[0].mine, again[0].also_mine) == (256, 512)


def test_an_evaluation_that_draws_is_not_exact(tmp_path: Path) -> None:
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=50, n_eval_episodes=1, deterministic=False)
    learned(ppo(cart_pole()), tmp_path, 128, evaluation)
    state = verify_checkpoint(list_checkpoints(tmp_path)[0]).resume_state
    assert not state["exact"] and "EvalCallback" in state["reason"]


@pytest.mark.timeout(120)  # It waited for minutes for a writer that never came.
def test_a_capture_that_fails_does_not_hold_up_the_training(tmp_path: Path) -> None:
    env = make_vec_env("Pendulum-v1", env_kwargs={"max_episode_steps": 20}, wrapper_class=CheckpointableEnv)
    model = SAC("MlpPolicy", env, learning_starts=30, batch_size=8, buffer_size=100)
    model.lock = threading.Lock()  # type: ignore[attr-defined] # SB3 cannot pickle it
    with pytest.raises(TypeError, match="pickle"), EpisodeCheckpointCallback(1, 0, tmp_path) as ours:
        model.learn(100, callback=ours)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the exact state in a checkpoint, with hashes that are right again."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(members["sb3_mlflow_ckpt/exact.json"])
    change(document)
    members["sb3_mlflow_ckpt/exact.json"] = json.dumps(document).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    metadata_file = path.with_name(f"{path.stem}_metadata.json")
    metadata = json.loads(metadata_file.read_bytes())
    content = path.read_bytes()
    metadata["files"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    metadata_file.write_text(json.dumps(metadata))


@pytest.mark.parametrize("key", ["environments", "observed", "randomness", "callbacks", "logger", "rollout", "gsde"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, {"layers": [3], "environments": [4]}], ids=str)
def test_a_made_up_state_is_no_error_but_a_reason(tmp_path: Path, key: str, value: Any) -> None:
    learned(ppo(cart_pole()), tmp_path, 128)
    path = list_checkpoints(tmp_path)[1]
    rewritten(path, lambda document: document.__setitem__(key, value))
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    _, ours = learned(model, tmp_path / "resumed", 128)
    # What is dropped is collected anew.
    assert model.num_timesteps >= 128
    if key in ("environments", "observed", "randomness"):
        assert not ours.resume_report["exact"]


def test_a_file_does_not_say_where_a_callback_writes_to(tmp_path: Path) -> None:
    def evaluation() -> EvalCallback:
        return EvalCallback(make_vec_env("CartPole-v1"), eval_freq=50, n_eval_episodes=1, best_model_save_path=None)

    learned(ppo(cart_pole()), tmp_path, 128, evaluation())
    path = list_checkpoints(tmp_path)[1]

    def change(document: dict[str, Any]) -> None:
        [name] = [name for name in document["callbacks"] if name.endswith("EvalCallback")]
        document["callbacks"][name]["best_model_save_path"] = str(tmp_path / "elsewhere")

    rewritten(path, change)
    model, _, _ = load_checkpoint(path, env=cart_pole(), device="cpu")
    callback = evaluation()
    _, ours = learned(model, tmp_path / "resumed", 128, callback)
    assert callback.best_model_save_path is None and not (tmp_path / "elsewhere").exists()
    assert "is a text" in ours.resume_report["reason"]
