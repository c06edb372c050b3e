"""Owns the second part: how fast a whole training is at several intervals, with and without MLflow."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from costs.campaign import Stores, Worker, interleaved
from costs.ours import wait_for_processes
from costs.saving import Method, Place, Save, SaveMLflow, SaveMLflowServer
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror

BASELINE = "none"
INTERVALS = (0, 50, 10, 1)
_SAVES: dict[str, type[Method]] = {"no MLflow": Save, "local store": SaveMLflow, "server": SaveMLflowServer}
_WARM_UP = 512


def modes(stores: Sequence[str]) -> dict[str, tuple[str, int, str]]:
    """Return name -> who saves, every how many episodes (0 is never), and where MLflow keeps it."""
    ours = {f"ours/{n}/{store}": ("EpisodeCheckpointCallback", n, store) for n in INTERVALS for store in stores}
    mirrored = [store for store in stores if store != "no MLflow"]
    threads = {f"thread/1/{s}": ("EpisodeCheckpointCallback, MLflow in a thread", 1, s) for s in mirrored}
    return ours | threads | {f"sb3/1/{store}": ("SB3 `save`", 1, store) for store in stores}


class Clock(BaseCallback):
    """Ends a training after so many steps, and tells how long they took.

    Args:
        steps: How many are measured.
        saves: Has a mirror whose process is to be at work before; None where there is none.
    """

    def __init__(self, steps: int, saves: EpisodeCheckpointCallback | None) -> None:
        super().__init__()
        self._saves = saves
        self._steps, self._began, self.seconds, self.episodes, self.ended = steps, 0.0, 0.0, 0, 0.0

    def _on_step(self) -> bool:
        if self.num_timesteps == _WARM_UP:
            if self._saves is not None:
                wait_for_processes(self._saves)
            self._began = time.perf_counter()
        elif self.num_timesteps >= _WARM_UP + self._steps:
            self.ended = time.perf_counter()
            self.seconds = self.ended - self._began
            return False
        self.episodes += int(self.locals["dones"].sum())
        return True


class SaveEveryEpisode(BaseCallback):
    """What a user's own callback does: `save`, and `log_artifact` where there is MLflow."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self._method = method

    def _on_step(self) -> bool:
        if self.locals["dones"].any():
            self._method.save(self.model)
        return True


def train(connection: Connection, place: Place, steps: int, threads: int) -> None:
    """Train once for each mode that it hears of, and tell how fast that was: the main function of the process."""
    th.set_num_threads(threads)
    os.chdir(place.base)
    while (mode := connection.recv()) is not None:
        place.folder.mkdir()
        callbacks = _callbacks(mode, place)
        apart = mode.startswith("ours/") and not mode.endswith("/no MLflow")
        clock = Clock(steps, cast("EpisodeCheckpointCallback", callbacks[0]) if apart else None)
        # The same seed and so the same episodes in each of them.
        model = PPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=512, device="cpu")
        model.learn(10**9, callback=CallbackList([*callbacks, clock]))
        connection.send({
            "seconds": clock.seconds, "episodes": clock.episodes, "end": time.perf_counter() - clock.ended,
        })  # fmt: skip
        shutil.rmtree(place.folder)


def _callbacks(mode: str, place: Place) -> list[BaseCallback]:
    if mode == BASELINE:
        return []
    who, interval, store = mode.split("/")
    if who == "sb3":
        return [SaveEveryEpisode(_SAVES[store](place))]
    uri = {"local store": place.local, "server": place.server}.get(store)
    mirrors = [] if uri is None else [MLflowMirror(uri)]
    return [
        EpisodeCheckpointCallback(
            int(interval), 3, place.folder, mirrors=mirrors, resume_state="exact",
            mirror_process_seconds=math.inf if who == "thread" else 0,
        )
    ]  # fmt: skip


def throughput(stores: Stores, options: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each mode: ratios of its speed to that of a training without anything, of each pair."""
    chosen = modes([store for store in _SAVES if stores.server or store != "server"])
    worker = Worker(train, stores.place("throughput"), options.steps, options.threads)
    try:
        worker.ask(BASELINE)
        pairs = interleaved(worker.ask, BASELINE, list(chosen), options.rounds)
    finally:
        worker.close()
    for mode, (who, interval, store) in chosen.items():
        yield {
            "names": mode.split("/"), "saves": who, "every": interval, "mlflow": store,
            "episodes": pairs[mode][0][0]["episodes"], "steps": options.steps,
            "ratios": [plain["seconds"] / own["seconds"] for own, plain in pairs[mode]],
            "end": [own["end"] for own, _ in pairs[mode]],
        }  # fmt: skip
