"""Owns the memory that tensors are copied to: allocated once, and used again when what was copied is on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch as th
from numpy.typing import NDArray

_IMAGES = 2
"""One is written while the next is captured; a third would cost memory and help no disk that is too slow."""


_PLAIN = frozenset({type(None), bool, int, float, str})
_KNOWN_TO_NUMPY = frozenset(
    {th.float32, th.float64, th.float16, th.int64, th.int32, th.int16, th.int8, th.uint8, th.bool}
)


class Image:
    """A copy of a model's tensors, in memory of its own.

    Filled from the first tensor to the last; as long as they come in the same order, shapes and types, nothing is
    allocated.
    """

    def __init__(self) -> None:
        self._rooms: list[_Room] = []
        self._seen: dict[int, th.Tensor] = {}
        self._filled = 0

    def begin(self) -> None:
        """Forget what was copied; its memory is overwritten from here on."""
        self._filled = 0
        self._seen.clear()

    def copy(self, value: Any) -> Any:
        """Return a nested structure of plain values in which every tensor is a copy."""
        if isinstance(value, th.Tensor):
            return self._copy(value)
        if isinstance(value, dict):
            return type(value)((key, item if type(item) in _PLAIN else self.copy(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(item if type(item) in _PLAIN else self.copy(item) for item in value)
        return value

    def end(self) -> None:
        """Wait until every copy is whole, and give back what was not needed."""
        del self._rooms[self._filled :]
        if any(room.on_device for room in self._rooms):
            th.cuda.synchronize()

    def _copy(self, source: th.Tensor) -> th.Tensor:
        if source.requires_grad:
            source = source.detach()
        address = source.data_ptr()
        # A CNN lists its shared extractor three times: copied once, it is also written once.
        same = self._seen.get(address)
        if same is not None and same.shape == source.shape and same.dtype == source.dtype:
            return same
        room = self._room(source)
        room.fill(source)
        if address:
            self._seen[address] = room.copy
        return room.copy

    def _room(self, source: th.Tensor) -> _Room:
        place, self._filled = self._filled, self._filled + 1
        if place < len(self._rooms) and self._rooms[place].fits(source):
            return self._rooms[place]
        room = _Room(source)
        self._rooms[place : place + 1] = [room]
        return room


class _Room:
    """The memory for one tensor's copy.

    Args:
        source: A tensor of its shape, layout and type.
    """

    __slots__ = ("_array", "_stride", "copy", "on_device")

    def __init__(self, source: th.Tensor) -> None:
        self.on_device = source.is_cuda
        # Pinned memory is what a device copies to without the processor's help.
        self.copy = th.empty_like(source, device="cpu", pin_memory=self.on_device)
        self._stride = source.stride()
        plain = source.device.type == "cpu" and source.dtype in _KNOWN_TO_NUMPY
        self._array: NDArray[Any] | None = self.copy.numpy() if plain else None

    def fits(self, source: th.Tensor) -> bool:
        copy = self.copy
        if self.on_device != source.is_cuda:
            return False
        return copy.shape == source.shape and copy.dtype == source.dtype and self._stride == source.stride()

    def fill(self, source: th.Tensor) -> None:
        if self._array is not None and source.is_cpu:
            # torch's own copy is split over threads, and then waits for cores that others are busy on.
            self._array[...] = source.numpy()
        else:
            self.copy.copy_(source, non_blocking=True)


class ImagePool:
    """The images of one model."""

    def __init__(self) -> None:
        self._free = [Image() for _ in range(_IMAGES)]
        self._changed = threading.Condition()

    def take(self) -> tuple[Image, Callable[[], None]]:
        """Wait for an image that is free; return it, and what lets it be used again."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            image = self._free.pop()
        image.begin()
        held = [image]
        # Once: a second time it may be somebody else's already.
        return image, lambda: self._give_back(held.pop()) if held else None

    def _give_back(self, image: Image) -> None:
        with self._changed:
            self._free.append(image)
            self._changed.notify()
