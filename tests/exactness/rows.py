"""The trainings of the exactness matrix: every algorithm, and what can go wrong around it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

_numbers = itertools.count()


def monitor_with_a_file(env: Any) -> Any:
    """Return an environment that writes its episodes to a file of its own in the current folder, over resumes."""
    from stable_baselines3.common.monitor import Monitor

    return Monitor(env, str(Path.cwd() / f"{next(_numbers)}.monitor.csv"), override_existing=False)


_CART = {"env_id": "CartPole-v1", "total_timesteps": 400}
_SHORT_PENDULUM = {"env_id": "Pendulum-v1", "env_kwargs": {"max_episode_steps": 25}}
_ROLLOUT = {"n_steps": 64, "batch_size": 32, "n_epochs": 2}
_RECURRENT = {**_ROLLOUT, "policy_kwargs": {"lstm_hidden_size": 16}}
_OFF = {**_SHORT_PENDULUM, "total_timesteps": 260}
_STARTS = {"learning_starts": 60, "batch_size": 32, "policy_kwargs": {"net_arch": [16, 16]}}
_RING = {**_STARTS, "buffer_size": 100}
_OU = {"action_noise": {"type": "ornstein-uhlenbeck", "sigma": 0.2}}
_NORMAL = {"action_noise": {"type": "normal", "sigma": 0.2}}
_DQN = {**_CART, "total_timesteps": 300}
_DQN_STARTS = {"learning_starts": 60, "batch_size": 16, "target_update_interval": 40, "exploration_fraction": 0.8}

ROWS: dict[str, dict[str, Any]] = {
    "PPO": {"algo": "ppo", **_CART, "hyperparameters": _ROLLOUT},
    "PPO, 4 environments": {"algo": "ppo", **_CART, "n_envs": 4, "hyperparameters": _ROLLOUT},
    "PPO, 4 environments, VecNormalize, stacked frames": {
        "algo": "ppo",
        **_SHORT_PENDULUM,
        "total_timesteps": 600,
        "n_envs": 4,
        "normalize": True,
        "frame_stack": 3,
        "learning_rate": "lin_3e-4",
        "hyperparameters": {**_ROLLOUT, "clip_range": "lin_0.2"},
    },
    "PPO, gSDE": {
        "algo": "ppo",
        **_SHORT_PENDULUM,
        "total_timesteps": 400,
        "normalize": True,
        "hyperparameters": {**_ROLLOUT, "use_sde": True},
    },
    "PPO, gSDE drawn every 4 steps": {
        "algo": "ppo",
        **_SHORT_PENDULUM,
        "total_timesteps": 400,
        "n_envs": 2,
        "hyperparameters": {**_ROLLOUT, "use_sde": True, "sde_sample_freq": 4},
    },
    "PPO, dictionary observations": {
        "algo": "ppo",
        "env_id": "toy_environments:ReachGoal-v0",
        "total_timesteps": 300,
        "hyperparameters": _ROLLOUT,
    },
    "PPO, 2 subprocesses": {
        "algo": "ppo",
        **_CART,
        "n_envs": 2,
        "vec_env": "subproc",
        "hyperparameters": _ROLLOUT,
    },
    "PPO, LunarLander, Monitor with a file": {
        "algo": "ppo",
        "env_id": "LunarLander-v3",
        "total_timesteps": 500,
        "n_envs": 2,
        "env_wrappers": [{"rows:monitor_with_a_file": {}}],
        "hyperparameters": _ROLLOUT,
    },
    "PPO, a script with VecMonitor, VecNormalize and EvalCallback": {"script": "own_script", "total_timesteps": 500},
    "A2C": {"algo": "a2c", **_CART, "total_timesteps": 300, "hyperparameters": {"n_steps": 8}},
    "A2C, 4 environments": {"algo": "a2c", **_CART, "n_envs": 4, "hyperparameters": {"n_steps": 5}},
    "TRPO": {"algo": "trpo", **_CART, "hyperparameters": {"n_steps": 64, "batch_size": 32}},
    "MaskablePPO": {
        "algo": "maskable_ppo",
        "env_id": "toy_environments:FixedLength-v0",
        "total_timesteps": 300,
        "hyperparameters": _ROLLOUT,
    },
    "RecurrentPPO": {"algo": "recurrent_ppo", **_CART, "total_timesteps": 300, "hyperparameters": _RECURRENT},
    "RecurrentPPO, 4 environments, truncations": {
        "algo": "recurrent_ppo",
        **_SHORT_PENDULUM,
        "total_timesteps": 400,
        "n_envs": 4,
        "hyperparameters": {**_RECURRENT, "n_steps": 32},
    },
    "DQN": {"algo": "dqn", **_DQN, "hyperparameters": {**_DQN_STARTS, "buffer_size": 100}},
    "DQN, 4 environments": {"algo": "dqn", **_DQN, "n_envs": 4, "hyperparameters": _DQN_STARTS},
    "DQN, optimize_memory_usage": {
        "algo": "dqn",
        **_DQN,
        "hyperparameters": {
            **_DQN_STARTS,
            "buffer_size": 100,
            "optimize_memory_usage": True,
            "replay_buffer_kwargs": {"handle_timeout_termination": False},
        },
    },
    "DQN, Breakout in AtariWrapper, 2 environments, stacked frames": {
        "algo": "dqn",
        "env_id": "BreakoutNoFrameskip-v4",
        "env_wrappers": ["stable_baselines3.common.atari_wrappers:AtariWrapper"],
        "n_envs": 2,
        "frame_stack": 4,
        "total_timesteps": 240,
        "hyperparameters": {**_DQN_STARTS, "buffer_size": 150, "train_freq": 8},
    },
    "QRDQN": {"algo": "qrdqn", **_DQN, "hyperparameters": {**_DQN_STARTS, "buffer_size": 200}},
    "SAC": {"algo": "sac", **_OFF, "hyperparameters": _RING},
    "SAC, 4 environments, VecNormalize": {
        "algo": "sac",
        **_OFF,
        "n_envs": 4,
        "normalize": True,
        "hyperparameters": _RING,
    },
    "SAC, n-step returns": {"algo": "sac", **_OFF, "hyperparameters": {**_RING, "n_steps": 3}},
    "SAC, gSDE, an update an episode": {
        "algo": "sac",
        **_OFF,
        "hyperparameters": {**_STARTS, "use_sde": True, "train_freq": [1, "episode"], "gradient_steps": -1},
    },
    "SAC, HER": {
        "algo": "sac",
        "env_id": "toy_environments:ReachGoal-v0",
        "total_timesteps": 260,
        "hyperparameters": {**_RING, "replay_buffer_class": "HerReplayBuffer"},
    },
    "SAC, HalfCheetah": {
        "algo": "sac",
        "env_id": "HalfCheetah-v5",
        "env_kwargs": {"max_episode_steps": 25},
        "total_timesteps": 260,
        "hyperparameters": _RING,
    },
    "TD3, Ornstein-Uhlenbeck noise": {"algo": "td3", **_OFF, "hyperparameters": {**_RING, **_OU}},
    "TD3, noise of 4 environments": {"algo": "td3", **_OFF, "n_envs": 4, "hyperparameters": {**_STARTS, **_OU}},
    "DDPG": {"algo": "ddpg", **_OFF, "hyperparameters": {**_RING, **_NORMAL}},
    "TQC": {"algo": "tqc", **_OFF, "hyperparameters": _RING},
    "CrossQ": {"algo": "crossq", **_OFF, "hyperparameters": _RING},
    "ARS": {"algo": "ars", **_CART, "total_timesteps": 800, "hyperparameters": {"n_delta": 2}},
    "ARS, a network, 2 environments, VecNormalize": {
        "algo": "ars",
        "policy": "MlpPolicy",
        **_CART,
        "total_timesteps": 1200,
        "n_envs": 2,
        "normalize": True,
        "hyperparameters": {"n_delta": 2, "zero_policy": False, "policy_kwargs": {"net_arch": [8]}},
    },
}
"""Settings of the trainer, by the name that the table prints."""
