"""Owns the asynchronous savers of other libraries: they are given the tensors that `model.get_parameters()` returns."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from costs.saving import Method, Moment, Place, state, state_arrays


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
