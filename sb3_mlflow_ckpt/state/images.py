"""Owns the memory that tensors are copied to: allocated once, and used again when what was copied is on disk."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch as th
from numpy.typing import NDArray

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.state.tensor_files import Bytes, Slot, TensorFile, TensorPickler, saved, written

logger = logging.getLogger(__name__)

_IMAGES = 2
"""One is written while the next is captured; a third would cost memory and help no disk that is too slow."""

_PLAIN = frozenset({type(None), bool, int, float, str})
_KNOWN_TO_NUMPY = frozenset(
    {th.float32, th.float64, th.float16, th.int64, th.int32, th.int16, th.int8, th.uint8, th.bool}
)


class Image:
    """A copy of a model's tensors, in memory of its own: a part for each file that they are written to."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._devices = DeviceCopies()
        # Has the form that this one's parts will have.
        self.sibling: Image | None = None

    def begin(self) -> None:
        """Forget what was copied; its memory is overwritten from here on."""
        for part in self._parts.values():
            part.begin()

    def copy(self, name: str, value: Any) -> Part:
        """Copy a nested structure of plain values and tensors to the part of a name."""
        part = self._parts.get(name)
        if part is None:
            other = self.sibling._parts.get(name) if self.sibling is not None else None
            part = self._parts[name] = Part(self._devices, other)
        part.fill(value)
        return part

    def end(self) -> None:
        """Order what follows on devices after the copies."""
        self._devices.end()


class DeviceCopies:
    """Copies from devices that are under way beside the training, which does not wait for them."""

    def __init__(self) -> None:
        self._streams: dict[th.device, Any] = {}
        self._under_way: list[Any] = []

    def copy(self, source: th.Tensor, target: th.Tensor) -> None:
        """Begin to copy a tensor of a device to pinned memory."""
        stream = self._streams.get(source.device)
        if stream is None:
            cuda: Any = th.cuda
            stream = self._streams[source.device] = cuda.Stream(source.device)
        # After what computes its value.
        stream.wait_stream(th.cuda.current_stream(source.device))
        with th.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def end(self) -> None:
        """Have what the training computes next, which may change the tensors, come after the copies."""
        for device, stream in self._streams.items():
            event = stream.record_event()
            th.cuda.current_stream(device).wait_event(event)
            self._under_way.append(event)

    def wait(self) -> None:
        """Wait until the copies are whole: the thread that writes them does."""
        while self._under_way:
            self._under_way.pop().synchronize()


class _Form(NamedTuple):
    """A file, and where in it each room lies; None for one that takes no bytes."""

    file: TensorFile
    slots: list[Slot | None]


class Part:
    """The tensors of one `.pth` file.

    Filled from the first tensor to the last; as long as they come in the same order, shapes and types, nothing is
    allocated, and they are copied to where they lie in the file.

    Args:
        devices: Copies from devices.
        sibling: The same part of another image, which may know the file's form already.

    Attributes:
        value: The structure that was copied last; every tensor in it is a copy.
    """

    def __init__(self, devices: DeviceCopies, sibling: Part | None = None) -> None:
        self.value: Any = None
        self._devices = devices
        self._rooms: list[Room] = []
        # By address: the tensor that was copied from there, and its copy.
        self._seen: dict[int, tuple[th.Tensor, th.Tensor]] = {}
        self._filled = 0
        self._pickler = TensorPickler()
        # What the rooms lie in, and what they move to before they are filled again.
        self._form: _Form | None = None
        self._next: _Form | None = None
        form = None if sibling is None else sibling._next or sibling._form
        if sibling is not None and form is not None and len(form.slots) == len(sibling._rooms):
            self._rooms = list(sibling._rooms)
            self._next = form._replace(file=form.file.another(pinned=sibling._pinned))
            self.begin()

    def begin(self) -> None:
        """Forget what was copied."""
        form, self._next = self._next, None
        if form is not None and len(form.slots) == len(self._rooms):
            self._rooms = [room.moved(form.file.content, s) for room, s in zip(self._rooms, form.slots, strict=True)]
            self._form = form
            self._pickler.forget()

    def fill(self, value: Any) -> None:
        """Copy a nested structure."""
        self._filled = 0
        try:
            self.value = self._copied(value)
        except Exception as error:
            logger.debug("Copied by its own means, which takes longer: %s", error)
            # A sparse tensor, a container that is made in a way of its own: rare, and SB3 saves it.
            self.value, self._filled = copy.deepcopy(value), 0
            self._pickler.forget()
        finally:
            self._seen.clear()
        if self._filled < len(self._rooms):
            del self._rooms[self._filled :]
            self._form = None

    def pieces(self) -> Iterator[memoryview]:
        """Return what `torch.save` would write of the value, in pieces, for use before the image is filled again."""
        self._devices.wait()
        try:
            document, keys = self._pickler.dump(self.value)
        except Exception as error:
            logger.debug("Written by torch, which takes longer: %s", error)
            # A type of tensor that has a pickle of its own.
            self._form = None
            return atomic.slices(written(self.value).data)
        if self._form is not None and self._form.file.take(document):
            return self._form.file.pieces()
        content, file = saved(self.value, document, self._pinned)
        if file is not None:
            found = (file.slots.get(keys.get(id(room.copy), "")) for room in self._rooms)
            self._next = _Form(file, [slot if slot is not None and slot.size else None for slot in found])
        return atomic.slices(content.data)

    @property
    def _pinned(self) -> bool:
        return any(room.on_device for room in self._rooms)

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, th.Tensor):
            return self._copy(value)
        if isinstance(value, dict):
            items = value.items()
            copied = kind((key, item if type(item) in _PLAIN else self._copied(item)) for key, item in items)
            if kind is OrderedDict:
                # The versions of the modules, made anew for each `state_dict`; what loads an old one goes by them.
                vars(copied).update(vars(value))
            return copied
        if isinstance(value, (list, tuple)):
            return kind(item if type(item) in _PLAIN else self._copied(item) for item in value)
        # Such as what a module says in `get_extra_state`: it is pickled later.
        return value if kind in _PLAIN else copy.deepcopy(value)

    def _copy(self, source: th.Tensor) -> th.Tensor:
        if source.requires_grad:
            source = source.detach()
        address = source.data_ptr()
        # A CNN lists its shared extractor three times: copied once, it is also written once.
        seen = self._seen.get(address)
        if seen is not None and _alias(seen[0], source):
            return seen[1]
        place, self._filled = self._filled, self._filled + 1
        room = self._rooms[place] if place < len(self._rooms) else None
        if room is None or not room.fill(source, self._devices):
            room = self._new_room(place, source)
            room.fill(source, self._devices)
        if address:
            self._seen[address] = source, room.copy
        return room.copy

    def _new_room(self, place: int, source: th.Tensor) -> Room:
        if source.is_quantized:
            # Its scale is no part of its bytes.
            raise TypeError("a quantized tensor")
        room = Room(th.empty_like(source, device="cpu", pin_memory=source.is_cuda), source.is_cuda)
        self._rooms[place : place + 1] = [room]
        self._form = None
        self._pickler.forget()
        return room


def _alias(one: th.Tensor, other: th.Tensor) -> bool:
    """Return whether two tensors that begin at the same address hold the same values: a transposed one does not."""
    form = one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
    return form and one.is_conj() == other.is_conj() and one.is_neg() == other.is_neg()


class Room:
    """The memory for one tensor's copy.

    Args:
        copy: The memory, as a tensor.
        on_device: Whether what is copied to it lies on a device.
    """

    __slots__ = ("_array", "_dtype", "_shape", "_strides", "copy", "on_device")

    def __init__(self, copy: th.Tensor, on_device: bool) -> None:
        self.copy = copy
        self.on_device = on_device
        # Compared at each copy, and numpy's are at hand where torch makes its own anew.
        self._array: NDArray[Any] | None = None
        if not on_device and copy.dtype in _KNOWN_TO_NUMPY:
            self._array = copy.numpy()
            self._shape, self._strides, self._dtype = self._array.shape, self._array.strides, self._array.dtype

    def moved(self, content: Bytes, slot: Slot | None) -> Room:
        """Return a room of the same form in a file's bytes."""
        if slot is None:
            return self
        count = slot.size // self.copy.element_size()
        flat = th.frombuffer(content, dtype=self.copy.dtype, count=count, offset=slot.at)
        return Room(flat.as_strided(self.copy.shape, self.copy.stride()), self.on_device)

    def fill(self, source: th.Tensor, devices: DeviceCopies) -> bool:
        """Copy a tensor here, or begin to where it lies on a device; return whether it is of this form."""
        if self._array is not None and source.is_cpu and source.dtype in _KNOWN_TO_NUMPY and not source.is_neg():
            # torch's own copy is split over threads, and then waits for cores that others are busy on.
            array = source.numpy()
            if array.shape != self._shape or array.dtype != self._dtype:
                return False
            if array.strides != self._strides and array.flags.c_contiguous:
                return False
            self._array[...] = array
            return True
        if not self._fits(source):
            return False
        if self.on_device:
            devices.copy(source, self.copy)
        else:
            self.copy.copy_(source)
        return True

    def _fits(self, source: th.Tensor) -> bool:
        copy = self.copy
        if self.on_device != source.is_cuda or copy.shape != source.shape or copy.dtype != source.dtype:
            return False
        return copy.stride() == source.stride() or not source.is_contiguous()


class ImagePool:
    """The images of one model."""

    def __init__(self) -> None:
        self._free = [Image() for _ in range(_IMAGES)]
        for image, sibling in zip(self._free, self._free[::-1], strict=True):
            image.sibling = sibling
        self._changed = threading.Condition()
        self._waited = 0.0

    @property
    def waited(self) -> float:
        """The seconds that the last `take` waited."""
        return self._waited

    def take(self) -> tuple[Image, Callable[[], None]]:
        """Wait for an image that is free; return it, and what lets it be used again."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            self._waited = time.perf_counter() - started
            image = self._free.pop()
        image.begin()
        held = [image]
        # Once: a second time it may be somebody else's already.
        return image, lambda: self._give_back(held.pop()) if held else None

    def _give_back(self, image: Image) -> None:
        with self._changed:
            self._free.append(image)
            self._changed.notify()
