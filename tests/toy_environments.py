"""Small environments whose episodes end exactly when a test needs it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class FixedLength(gym.Env[np.ndarray, Any]):
    """Every episode lasts `length` steps; raises at step `fails_at` of the process if that is given."""

    def __init__(self, length: int = 5, continuous: bool = False, fails_at: int | None = None, width: int = 3) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (width,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else spaces.Discrete(2)
        self._length, self._fails_at, self._step, self._total = length, fails_at, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._step = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._step += 1
        self._total += 1
        if self._total == self._fails_at:
            raise RuntimeError("the simulator broke")
        # Half of the episodes end, half are cut: both count.
        over = self._step == self._length
        truncated = over and self.np_random.random() < 0.5
        return self._observation(), 1.0, over and not truncated, truncated, {}

    def action_masks(self) -> np.ndarray:
        return np.array([True, self._step % 2 == 0])

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, self.observation_space.shape).astype(np.float32)


class ReachGoal(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Move a point to a goal on a line: the smallest environment that HER learns from."""

    def __init__(self, length: int = 10) -> None:
        point = spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.observation_space = spaces.Dict({"observation": point, "achieved_goal": point, "desired_goal": point})
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._step = 0
        self._position = np.zeros(1, np.float32)
        self._goal = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        self._step += 1
        self._position = np.clip(self._position + 0.2 * action, -2, 2).astype(np.float32)
        reward = float(self.compute_reward(self._position, self._goal, {}))
        return self._observation(), reward, False, self._step == self._length, {}

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, info: Any) -> np.ndarray:
        return -(np.abs(achieved - desired).max(axis=-1) > 0.1).astype(np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        return {"observation": self._position, "achieved_goal": self._position, "desired_goal": self._goal}


class Unrepeatable(FixedLength):
    """What it answers depends on how often the process has asked: no state of its own says that."""

    asked = 0

    def _observation(self) -> np.ndarray:
        Unrepeatable.asked += 1
        return np.full(self.observation_space.shape, 1 / Unrepeatable.asked, np.float32)


gym.register("FixedLength-v0", FixedLength)
gym.register("ReachGoal-v0", ReachGoal)
gym.register("Unrepeatable-v0", Unrepeatable)
