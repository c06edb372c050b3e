"""Owns replay buffers that tests fill without training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mlflow_ckpt.layout import RunFolder

BOX = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (12, 12, 4), np.uint8)
CHANNELS_FIRST = spaces.Box(0, 255, (4, 12, 12), np.uint8)
GOALS = spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), BOX))
MIXED = spaces.Dict({"image": IMAGE, "place": spaces.Discrete(5), "vector": BOX})

KINDS: dict[str, tuple[type, spaces.Space[Any], dict[str, Any]]] = {
    "vector": (ReplayBuffer, BOX, {}),
    "image": (ReplayBuffer, IMAGE, {}),
    "channels first": (ReplayBuffer, CHANNELS_FIRST, {}),
    "optimized": (
        ReplayBuffer,
        IMAGE,
        {"optimize_memory_usage": True, "handle_timeout_termination": False},
    ),
    "n-step": (NStepReplayBuffer, BOX, {"n_steps": 3}),
    "dict": (DictReplayBuffer, MIXED, {}),
    "her": (HerReplayBuffer, GOALS, {"env": None}),
    "her with infos": (HerReplayBuffer, GOALS, {"env": None, "copy_info_dict": True}),
}


class Filled:
    """A model that has nothing but a replay buffer and timesteps, and environments that fill it."""

    def __init__(self, kind: str, rows: int = 40, n_envs: int = 1, seed: int = 0) -> None:
        cls, space, settings = KINDS[kind]
        self.space, self.rng = space, np.random.default_rng(seed)
        self.buffer = cls(rows * n_envs, space, spaces.Box(-1, 1, (2,), np.float32), n_envs=n_envs, **settings)
        self.model: Any = SimpleNamespace(replay_buffer=self.buffer, num_timesteps=0, n_envs=n_envs)
        self.last = self._reset()

    def step(self, recorder: Any = None) -> None:
        n_envs = self.buffer.n_envs
        if recorder is not None:
            recorder.protect()
        done = self.rng.random(n_envs) < 0.12
        after = self._next(self.last)
        following = self._merge(after, self._reset(), done)
        infos = [{"TimeLimit.truncated": bool(self.rng.random() < 0.5), "x": [1, float("nan")]} for _ in done]
        action, reward = self.rng.normal(size=(n_envs, 2)), self.rng.normal(size=n_envs)
        self.buffer.add(self.last, after, action, reward, done, infos)
        self.model.num_timesteps += n_envs
        self.last = following

    def _reset(self) -> Any:
        return self._each(lambda space: np.stack([self._sample(space) for _ in range(self.buffer.n_envs)]))

    def _sample(self, space: spaces.Space[Any]) -> Any:
        if isinstance(space, spaces.Discrete):
            return np.int64(self.rng.integers(5))
        if space.dtype == np.uint8:
            return self.rng.integers(0, 255, space.shape, dtype=np.uint8)
        value = self.rng.normal(size=space.shape).astype(np.float32)
        value[0] = self.rng.choice([np.nan, -0.0, 0.0, 1.0])
        return value

    def _next(self, last: Any) -> Any:
        fresh = self._reset()

        def stacked(old: Any, new: Any) -> Any:
            if new.shape[1:] == IMAGE.shape:
                return np.concatenate([old[..., 1:], new[..., -1:]], axis=-1)
            if new.shape[1:] == CHANNELS_FIRST.shape:
                return np.concatenate([old[:, 1:], new[:, -1:]], axis=1)
            return new

        if isinstance(fresh, dict):
            return {key: stacked(last[key], fresh[key]) for key in fresh}
        return stacked(last, fresh)

    def _merge(self, after: Any, reset: Any, done: Any) -> Any:
        def chosen(one: Any, other: Any) -> Any:
            result = one.copy()
            result[done] = other[done].reshape(result[done].shape)
            return result

        if isinstance(after, dict):
            return {key: chosen(after[key], reset[key]) for key in after}
        return chosen(after, reset)

    def _each(self, make: Any) -> Any:
        if isinstance(self.space, spaces.Dict):
            return {key: make(space) for key, space in self.space.spaces.items()}
        return make(self.space)


def content(buffer: Any) -> dict[str, Any]:
    """Return the bytes of everything in a buffer's valid rows that training looks at."""
    size = buffer.size()
    found: dict[str, Any] = {"pos": buffer.pos, "full": buffer.full}
    for name, value in vars(buffer).items():
        arrays = value if isinstance(value, dict) else {"": value}
        for key, array in arrays.items():
            if name == "_current_ep_start":
                found[name] = array.tobytes()
            elif name == "infos":
                found[name] = repr(array[:size].tolist()) if buffer.copy_info_dict else ""
            elif isinstance(array, np.ndarray):
                found[name + key] = array[:size].tobytes()
    if buffer.optimize_memory_usage and not buffer.full:
        found["tail"] = buffer.observations[buffer.pos].tobytes()
    return found


def run_folder(path: Path, run_id: str = "run") -> RunFolder:
    """Return the folder of a run."""
    return RunFolder(path, "agent", run_id)
