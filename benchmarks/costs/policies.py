"""Owns what is trained: an environment whose episodes end when the benchmark says so, and models of several sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mlflow_ckpt import CheckpointableEnv

ROLLOUT = 32
_BRIGHT, _SIDE, _SQUARE = 255, 84, 12


class Walk(gym.Env[np.ndarray, Any]):
    """A point that walks at random, as numbers or as a square in an image; an episode lasts until `ends` is set."""

    def __init__(self, width: int = 4, *, pixels: bool = False, continuous: bool = False) -> None:
        box = spaces.Box(0, _BRIGHT, (4, _SIDE, _SIDE), np.uint8)
        self.observation_space = box if pixels else spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = spaces.Box(-1, 1, (6,), np.float32) if continuous else spaces.Discrete(4)
        self._pixels, self._at, self.ends = pixels, np.zeros(width), False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._at = self.np_random.normal(size=self._at.shape)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._at = 0.9 * self._at + self.np_random.normal(size=self._at.shape)
        over, self.ends = self.ends, False
        return self._observation(), float(-np.abs(self._at).mean()), over, False, {}

    def get_checkpoint_state(self) -> dict[str, Any]:
        return {"at": self._at, "random": self.np_random.bit_generator.state}

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._at, self.np_random.bit_generator.state = state["at"], state["random"]

    def _observation(self) -> np.ndarray:
        if not self._pixels:
            return self._at.astype(np.float32)
        image = np.zeros(self.observation_space.shape, np.uint8)
        for frame, (x, y) in enumerate(zip(self._at, np.roll(self._at, 1), strict=True)):
            left, top = (int(36 + 8 * np.clip(place, -4, 4)) for place in (x, y))
            image[frame, top : top + _SQUARE, left : left + _SQUARE] = _BRIGHT
        return image


@dataclass(frozen=True)
class Policy:
    """What is trained.

    Attributes:
        title: What tables call it.
        algorithm: The class; off-policy ones get a full replay buffer.
        settings: Its arguments.
        pixels: Whether it sees images.
        width: How many numbers it sees otherwise.
        unit: Steps after which its training repeats: a rollout with its updates.
    """

    title: str
    algorithm: type[BaseAlgorithm] = PPO
    settings: dict[str, Any] = field(default_factory=dict)
    pixels: bool = False
    width: int = 4
    unit: int = ROLLOUT

    @property
    def off_policy(self) -> bool:
        return self.algorithm is not PPO

    def build(self, transitions: int) -> tuple[Any, Walk]:
        """Return a model and the environment within it.

        Args:
            transitions: The size of a replay buffer; it is full.
        """
        walk = Walk(self.width, pixels=self.pixels, continuous=self.algorithm is SAC)
        env = DummyVecEnv([lambda: CheckpointableEnv(Monitor(walk))])
        if not self.off_policy:
            kind = "CnnPolicy" if self.pixels else "MlpPolicy"
            rollout = {"n_steps": ROLLOUT, "batch_size": ROLLOUT, "n_epochs": 4}
            return self.algorithm(kind, env, seed=0, device="cpu", **rollout, **self.settings), walk
        model: Any = self.algorithm(
            "MlpPolicy", env, seed=0, device="cpu", buffer_size=transitions, learning_starts=0, **self.settings
        )
        buffer, rng = model.replay_buffer, np.random.default_rng(0)
        for array in (buffer.observations, buffer.next_observations, buffer.rewards):
            array[:] = rng.normal(size=array.shape)
        buffer.full = True
        return model, walk


def _wide(width: int) -> dict[str, Any]:
    return {"policy_kwargs": {"net_arch": [width] * 3}}


POLICIES = {
    "mlp": Policy("64x64 MLP"),
    "cnn": Policy("NatureCNN", pixels=True),
    "wide": Policy("1024x3 MLP", settings=_wide(1024)),
    "huge": Policy("1448x3 MLP", settings=_wide(1448)),
    "dqn": Policy("DQN, full replay buffer", DQN, width=17, unit=4),
    "sac": Policy("SAC, full replay buffer", SAC, width=17, unit=4),
}
