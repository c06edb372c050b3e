"""Owns what a way to save is here: it saves on the training thread, and tells when that was durable. Has SB3's ways."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

_PATIENCE = 300.0


class Place(NamedTuple):
    """Where a method saves: a folder of its own, two MLflow tracking URIs, and the folder where the local one's lie."""

    folder: Path
    local: str
    server: str
    base: Path


class Method:
    """One way to save. Saving is synchronous unless `wait` says otherwise.

    Attributes:
        stall: The seconds that the training thread waited at the last save.
        callbacks: What takes part in `learn`.
    """

    stall = 0.0
    callbacks: tuple[BaseCallback, ...] = ()

    def __init__(self, place: Place) -> None:
        self._folder = place.folder
        self._count, self._ended = 0, 0.0

    def save(self, model: Any) -> None:
        """Save, on the training thread."""
        self._count += 1
        began = time.perf_counter()
        self._save(model, self._folder / f"checkpoint-{self._count}")
        self._ended = time.perf_counter()
        self.stall = self._ended - began

    def wait(self) -> float:
        """Wait until what was saved is durable, or as durable as it gets; return when it was."""
        return self._ended

    def _save(self, model: Any, path: Path) -> None:
        raise NotImplementedError


class Copy(Method):
    """A memory copy of the state into arrays that are there already: no method can do with less."""

    _copies: list[tuple[np.ndarray, np.ndarray]] | None = None

    def _save(self, model: Any, path: Path) -> None:
        if self._copies is None:
            self._copies = [(np.empty_like(array), array) for array in state_arrays(model).values()]
        for copy, array in self._copies:
            np.copyto(copy, array)


class Save(Method):
    """SB3's `model.save`, and `save_replay_buffer` where there is one."""

    def _save(self, model: Any, path: Path) -> None:
        for file in saved(model, path):
            self._log(file)

    def _log(self, file: Path) -> None:
        """Do nothing more."""


class SaveMLflow(Save):
    """The same, and `log_artifact`."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._tracking(place))
        self._run = self._client.create_run("0").info.run_id

    def _tracking(self, place: Place) -> str:
        return place.local

    def _log(self, file: Path) -> None:
        self._client.log_artifact(self._run, str(file), "checkpoints")


class SaveMLflowServer(SaveMLflow):
    """The same, to a server."""

    def _tracking(self, place: Place) -> str:
        return place.server


class Moment:
    """A moment that one thread notes and another waits for; the first counts until it is forgotten."""

    def __init__(self) -> None:
        self._at, self._noted = 0.0, threading.Event()

    def note(self) -> None:
        if not self._noted.is_set():
            self._at = time.perf_counter()
            self._noted.set()

    def forget(self) -> None:
        self._noted.clear()

    def wait(self) -> float:
        if not self._noted.wait(_PATIENCE):
            raise TimeoutError("The checkpoint was not written")
        return self._at


def saved(model: Any, path: Path) -> list[Path]:
    """Save as SB3 does; return the files."""
    files = [path.with_suffix(".zip")]
    model.save(files[0])
    if getattr(model, "replay_buffer", None) is not None:
        files.append(path.with_suffix(".pkl"))
        model.save_replay_buffer(files[1])
    return files


def state(model: Any) -> dict[str, Any]:
    """Return parameters and optimizers, and the replay buffer, as tensors that share the model's memory."""
    result = dict(model.get_parameters())
    return result | {f"replay.{name}": th.from_numpy(array) for name, array in _replay(model).items()}


def state_arrays(model: Any) -> dict[str, np.ndarray]:
    """Return the same, flat, as arrays: each memory once."""
    memories: dict[int, str] = {}
    tensors = [(name, value) for name, value in _flat(model.get_parameters(), "") if value.numel()]
    kept = [(name, value) for name, value in tensors if memories.setdefault(value.data_ptr(), name) == name]
    return {name: value.detach().numpy() for name, value in kept} | _replay(model)


def _replay(model: Any) -> dict[str, np.ndarray]:
    buffer = getattr(model, "replay_buffer", None)
    return {} if buffer is None else {name: v for name, v in vars(buffer).items() if isinstance(v, np.ndarray)}


def _flat(value: Any, name: str) -> Iterator[tuple[str, th.Tensor]]:
    if isinstance(value, th.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(item, f"{name}.{key}".strip("."))
