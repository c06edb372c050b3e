"""A user's own script around the callback: layers, callbacks and a buffer that the trainer does not make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_mlflow_ckpt import CheckpointableEnv, EpisodeCheckpointCallback, latest_checkpoint, load_checkpoint


def train(total_timesteps: int, last: Any) -> None:
    """Train to a target, from the newest checkpoint in the current folder on if there is one.

    Does nothing where that checkpoint has reached the target.

    Args:
        total_timesteps: The target of the whole training.
        last: A callback beside ours.
    """
    environments = make_vec_env("CartPole-v1", n_envs=2, seed=5, wrapper_class=CheckpointableEnv)
    env = VecNormalize(VecMonitor(environments, str(Path.cwd() / "vec_monitor")))
    path = latest_checkpoint("checkpoints", agent_id="mine")
    if path is None:
        model: Any = PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=5, device="cpu")
    else:
        model, _, _ = load_checkpoint(path, env=env, device="cpu")
    if model.num_timesteps >= total_timesteps:
        return
    evaluation = EvalCallback(
        VecNormalize(VecMonitor(make_vec_env("CartPole-v1", seed=6)), training=False),
        best_model_save_path="best",
        n_eval_episodes=1,
        eval_freq=40,
        verbose=0,
    )
    ours = EpisodeCheckpointCallback(1, agent_id="mine", handle_signals=False)
    last.episodes_of = ours
    model.learn(
        total_timesteps - model.num_timesteps, callback=[ours, evaluation, last], reset_num_timesteps=path is None
    )
    # Of a resumed run as of an uninterrupted one: how often it evaluated, and when.
    last.evaluated = (evaluation.n_calls, evaluation.evaluations_timesteps)
