"""Owns the ways to save a model that are compared: each saves on the training thread, and tells when it was durable.

Those of other libraries are given the same tensors as `model.save` writes, by `model.get_parameters()`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror, latest_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.journal import RunJournal

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


class Lightning(Method):
    """Lightning's AsyncCheckpointIO around its own TorchCheckpointIO."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._written = written = Moment()

        class Timed(TorchCheckpointIO):
            def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
                super().save_checkpoint(*arguments, **options)
                written.note()

        self._io = AsyncCheckpointIO(Timed())

    def _save(self, model: Any, path: Path) -> None:
        self._written.forget()
        self._io.save_checkpoint(state(model), path)

    def wait(self) -> float:
        return self._written.wait()


class TorchDistributed(Method):
    """torch.distributed.checkpoint's async_save, in one process."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        from torch.distributed import checkpoint

        self._checkpoint, self._written = checkpoint, Moment()

    def _save(self, model: Any, path: Path) -> None:
        self._written.forget()
        future = self._checkpoint.async_save(state(model), checkpoint_id=path, no_dist=True)
        future.add_done_callback(lambda done: (done.result(), self._written.note()))

    def wait(self) -> float:
        return self._written.wait()


class Orbax(Method):
    """Orbax's StandardCheckpointer, which is asynchronous."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        import orbax.checkpoint

        self._checkpointer, self._written = orbax.checkpoint.StandardCheckpointer(), Moment()

    def _save(self, model: Any, path: Path) -> None:
        self._written.forget()
        self._checkpointer.save(path.absolute(), state_arrays(model))
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        self._checkpointer.wait_until_finished()
        self._written.note()

    def wait(self) -> float:
        return self._written.wait()


class Ours(Method):
    """`EpisodeCheckpointCallback` with everything on: it saves by itself, at the safe point after an episode's end."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._written = Moment()
        self._callback = _TimedCallback(self, 1, 3, place.folder, mirrors=[self._mirror(place)], resume_state="exact")
        self.callbacks = (self._callback,)

    def _mirror(self, place: Place) -> Any:
        return _Watch(self.saved)

    def save(self, model: Any) -> None:
        """Do nothing but forget the last one: the callback sees the end of the episode."""
        self._written.forget()
        self._count += 1

    def saved(self, journal: RunJournal) -> None:
        """Hear that the mirror has what is in the journal, whose `saved` follows a commit."""
        ledger = journal.snapshot()
        if len(ledger.saved) >= self._count and not (self._uploads and ledger.waiting):
            self._written.note()

    _uploads = False

    def taken(self, seconds: float) -> None:
        """Hear how long the training thread was held."""
        self.stall = seconds

    def wait(self) -> float:
        ended = self._written.wait()
        if self._count == 1:
            latest = latest_checkpoint(self._folder)
            assert latest is not None and verify_checkpoint(latest).resume_state["exact"], "It must be exact"
        return ended


class OursMLflow(Ours):
    """The same, with MLflowMirror."""

    _uploads = True

    def _mirror(self, place: Place) -> Any:
        return _timed_mirror(self.saved, place.local)


class OursMLflowServer(OursMLflow):
    """The same, to a server."""

    def _mirror(self, place: Place) -> Any:
        return _timed_mirror(self.saved, place.server)


class _TimedCallback(EpisodeCheckpointCallback):
    def __init__(self, method: Ours, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._method = method

    def _take(self, point: Any) -> None:
        began = time.perf_counter()
        super()._take(point)
        self._method.taken(time.perf_counter() - began)


class _Watch:
    """A mirror that keeps nothing: it is told of each commit as mirrors are."""

    name, stores_checkpoints = "benchmark", False

    def __init__(self, hear: Callable[[RunJournal], None]) -> None:
        self.replicate = hear

    def open(self, record: Mapping[str, Any]) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    def tell_end(self, record: Mapping[str, Any]) -> None:
        pass

    def cancel(self, status: str) -> None:
        pass

    def close(self) -> None:
        pass


def _timed_mirror(hear: Callable[[RunJournal], None], uri: str) -> MLflowMirror:
    class Timed(MLflowMirror):
        def replicate(self, journal: RunJournal) -> None:
            super().replicate(journal)
            hear(journal)

    return Timed(uri)


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


METHODS: dict[str, tuple[str, type[Method]]] = {
    "copy": ("memory copy of the state", Copy),
    "sb3": ("SB3 `save`", Save),
    "sb3-mlflow": ("SB3 `save` + `log_artifact`, local store", SaveMLflow),
    "sb3-server": ("SB3 `save` + `log_artifact`, server", SaveMLflowServer),
    "lightning": ("Lightning AsyncCheckpointIO", Lightning),
    "torch": ("torch.distributed.checkpoint async_save", TorchDistributed),
    "orbax": ("Orbax async", Orbax),
    "ours": ("EpisodeCheckpointCallback", Ours),
    "ours-mlflow": ("EpisodeCheckpointCallback + MLflow, local store", OursMLflow),
    "ours-server": ("EpisodeCheckpointCallback + MLflow, server", OursMLflowServer),
}
