"""Holds a training at one named moment, so that a test reaches it for certain.

The moment and where its files lie come from the environment: `MOMENT`, `MOMENT_FOLDER`. A training that arrives
writes the file `reached`, and goes on when there is a file `released`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym

# Steps of the process before the moment in an environment: some episodes, some checkpoints.
STEPS = 150


def arrive(moment: str, *, in_c: bool = False) -> None:
    """Wait if this is the moment.

    Args:
        moment: What is happening.
        in_c: Whether to wait for ever within one call into C, which no signal ends.
    """
    if os.environ.get("MOMENT") != moment:
        return
    folder = Path(os.environ["MOMENT_FOLDER"])
    (folder / "reached").touch()
    if in_c:
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while not (folder / "released").exists():
        time.sleep(0.01)


class Arriving(gym.Wrapper):
    """An environment that arrives when it is made, reset for the first time, and reset or stepped later on."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._steps = 0
        if multiprocessing.parent_process() is not None or os.environ.get("MOMENT") != "making workers":
            arrive("making")
            arrive("making workers")

    def reset(self, **options: Any) -> Any:
        if self._steps == 0:
            arrive("first reset")
        elif self._steps >= STEPS:
            arrive("reset")
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        self._steps += 1
        if self._steps == STEPS:
            arrive("step")
            arrive("step in C", in_c=True)
        return self.env.step(action)


def algorithms() -> Iterator[type]:
    """Yield the algorithms; torch is imported only now."""
    from stable_baselines3 import DQN, PPO

    for base in (PPO, DQN):

        def train(self: Any, *arguments: Any, base: Any = base, **options: Any) -> None:
            if self.num_timesteps >= STEPS:
                arrive("update")
                arrive("update in C", in_c=True)
                if os.environ.get("MOMENT") == "long update":
                    (Path(os.environ["MOMENT_FOLDER"]) / "reached").touch()
                    if base is PPO:
                        self.n_epochs = 10**9
                    else:
                        options["gradient_steps"] = 10**9
            return base.train(self, *arguments, **options)

        yield type(f"Updating{base.__name__}", (base,), {"train": train, "__module__": __name__})


def __getattr__(name: str) -> type:
    for algorithm in algorithms() if name.startswith("Updating") else ():
        globals()[algorithm.__name__] = algorithm
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(name) from None
