"""Owns the process that trains one policy and saves it by one method, and measures what a checkpoint costs there.

A figure comes from a pair of windows, in random order: the same number of steps and updates of a real `learn`, with a
checkpoint at its beginning and without one. The window is long enough for the background work to end within it.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from costs.methods import METHODS
from costs.policies import POLICIES
from costs.saving import Place, state_arrays

_STEPS_BETWEEN = 1000
_MOST_PAIRS = 30
_MARGIN = 1.3
_LONGEST_WINDOW = 60.0


class Task(NamedTuple):
    """What a process does: names of POLICIES and METHODS, and where."""

    policy: str
    method: str
    place: Place
    artifacts: tuple[Path, ...]
    transitions: int
    threads: int


class Director(BaseCallback):
    """Runs a plan beside a training: a generator that yields after how many steps it wants to go on."""

    def __init__(self, plan: Iterator[int]) -> None:
        super().__init__()
        self._plan, self._left = plan, 1

    def _on_step(self) -> bool:
        self._left -= 1
        if not self._left:
            self._left = next(self._plan, 0)
        return self._left != 0


class Measuring:
    """The plan of one process.

    Args:
        connection: Hears for how many seconds to measure, or None to end; is told a list of pairs each time.
        task: What is measured.
        model: The model that is trained.
        end_episode: Ends the episode with the next step.
    """

    def __init__(self, connection: Connection, task: Task, model: Any, end_episode: Callable[[], None]) -> None:
        self._connection, self._task, self._model, self._end_episode = connection, task, model, end_episode
        self._policy = POLICIES[task.policy]
        self.method = METHODS[task.method][1](task.place)
        # What a library brings with it is there by now; what it takes for a checkpoint is not.
        self._memory = Memory()
        self._units = 1

    def plan(self) -> Iterator[int]:
        """Save a few times to warm up, and measure when asked to."""
        yield from self._window(True)
        yield from self._window(True)
        figures = yield from self._window(True)
        plain = yield from self._window(False)
        self._units = max(1, math.ceil(_MARGIN * figures["background"] / plain["seconds"]))
        self._connection.send({"state": sum(array.nbytes for array in state_arrays(self._model).values())})
        while (seconds := self._connection.recv()) is not None:
            ends, pairs = time.perf_counter() + seconds, []
            while not pairs or (time.perf_counter() < ends and len(pairs) < _MOST_PAIRS):
                pairs.append((yield from self._pair()))
            self._tidy()
            self._connection.send(pairs)

    def _pair(self) -> Iterator[int]:
        while True:
            windows: dict[bool, Any] = {}
            for saves in random.sample([True, False], 2):
                windows[saves] = yield from self._window(saves)
            figures, length = windows[True], windows[True]["seconds"]
            if figures["background"] <= length or length > _LONGEST_WINDOW:
                return {**figures, "lost": length - windows[False]["seconds"], "without": windows[False]["seconds"]}
            self._units = math.ceil(1.25 * self._units)

    def _window(self, saves: bool) -> Iterator[int]:
        unit = self._policy.unit
        if self._policy.off_policy:
            # What a checkpoint of a replay buffer has to write are the transitions since the last one.
            self._model.learning_starts = self._model.num_timesteps + _STEPS_BETWEEN
            yield _STEPS_BETWEEN // unit * unit
        yield unit - 1
        if saves:
            self._end_episode()
        yield 1
        before, _ = self._files(), self._memory.reset()
        began = time.perf_counter()
        if saves:
            self.method.save(self._model)
        yield self._units * unit
        ended = time.perf_counter()
        if not saves:
            return {"seconds": ended - began}
        background = self.method.wait() - began
        figures = {
            "seconds": ended - began,
            "stall": self.method.stall,
            "background": background,
            "peak": self._memory.peak(),
            "bytes": sum(max(0, size - before.get(file, 0)) for file, size in self._files().items()),
        }
        return figures

    def _files(self) -> dict[tuple[int, int], int]:
        """Return the bytes of the files that were written, here and where MLflow keeps artifacts."""
        found = {}
        for place in (self._task.place.folder, *self._task.artifacts):
            for folder, _, names in os.walk(place):
                for name in names:
                    # While they warm up, others write there.
                    with suppress(FileNotFoundError):
                        facts = (Path(folder) / name).stat()
                        # Two names of one file are one.
                        found[facts.st_ino, facts.st_mtime_ns] = facts.st_size
        return found

    def _tidy(self) -> None:
        """Remove old copies, so that no disk fills up: none is read again. Nobody else saves at that time."""
        own = [] if self.method.callbacks else [self._task.place.folder]
        for place in (*own, *self._task.artifacts):
            for folder, _, names in os.walk(place):
                for name in names:
                    (Path(folder) / name).unlink(missing_ok=True)


class Memory:
    """The highest resident memory of this process and its children beyond what training alone takes."""

    def __init__(self) -> None:
        self._before = self._high_water()

    def reset(self) -> None:
        """Forget how high it was."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the bytes since the last reset."""
        return max(0, self._high_water() - self._before)

    def _high_water(self) -> int:
        own = _status("self", "VmHWM")
        children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
        # What they share with this process is counted here.
        return own + sum(_status(child, "VmHWM") - _status(child, "RssShmem") for child in children)


def _status(process: str, field: str) -> int:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def work(connection: Connection, task: Task) -> None:
    """Train, save and measure until told to end: the main function of the process."""
    th.set_num_threads(task.threads)
    os.chdir(task.place.base)
    task.place.folder.mkdir()
    policy = POLICIES[task.policy]
    model, walk = policy.build(task.transitions)
    # The optimizer's moments and torch's own memory are there before anything is measured.
    model.learn(4 * policy.unit)
    try:
        if task.method.endswith(("mlflow", "server")):
            from mlflow import MlflowClient

            # Its modules are no memory of a checkpoint.
            MlflowClient(task.place.server if "server" in task.method else task.place.local).search_experiments()
        measuring = Measuring(connection, task, model, lambda: setattr(walk, "ends", True))
    except ImportError as error:
        connection.send({"skipped": f"{error.name} is not installed" if error.name else str(error)})
        return
    director = Director(measuring.plan())
    model.learn(10**12, callback=CallbackList([director, *measuring.method.callbacks]))
