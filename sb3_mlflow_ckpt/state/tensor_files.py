"""Owns the `.pth` members in memory: torch writes each of them once, from then on its tensors are exchanged in place.

A `.pth` is a zip without compression: the pickle of what is no tensor, and a record of bytes for each storage. As long
as the same tensors come, the next one differs in these bytes alone, and in the records' checksums. So tensors are
copied straight to where they lie in the file, and writing it is one pass over memory. Everything that is no tensor is
pickled anew each time: a learning rate may have changed.
"""

from __future__ import annotations

import copy
import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_mlflow_ckpt import atomic

Bytes = NDArray[np.uint8]

_PICKLE = "data.pkl"
_STORAGES = "data/"
_PROTOCOL = 2
_LOCAL, _DESCRIPTOR, _CENTRAL = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02"
_HAS_DESCRIPTOR = 0x8


class Slot(NamedTuple):
    """Where a tensor's bytes lie in a file.

    Attributes:
        at: The first byte.
        size: How many there are.
    """

    at: int
    size: int


class _Record(NamedTuple):
    at: int
    size: int
    checksums: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    kind: Any
    numel: int


class TensorPickler:
    """Pickles values as `torch.save` does, but for what makes that slow: a function of torch's, called for each object.

    What it knows of a tensor it knows by the object: whoever exchanges tensors forgets.
    """

    def __init__(self) -> None:
        self._reduced: dict[tuple[int, str], tuple[Any, ...]] = {}
        self._tensors: list[th.Tensor] = []

    def forget(self) -> None:
        """Look at every tensor anew."""
        self._reduced.clear()
        self._tensors.clear()

    def dump(self, value: Any) -> tuple[bytes, dict[int, str]]:
        """Return a value's pickle, and the key that each tensor's storage has in it, by the tensor's id."""
        file, keys = io.BytesIO(), dict[int, str]()
        pickler = _Pickler(file, protocol=_PROTOCOL)

        def reduce(tensor: th.Tensor) -> tuple[Any, ...]:
            key = keys.setdefault(id(tensor), str(len(keys)))
            return self._reduced.get((id(tensor), key)) or self._reduce(tensor, key)

        pickler.dispatch_table = {th.Tensor: reduce}
        pickler.dump(value)
        return file.getvalue(), keys

    def _reduce(self, tensor: th.Tensor, key: str) -> tuple[Any, ...]:
        # Kept: an id is its object's only as long as that lives.
        self._tensors.append(tensor)
        kind: Any = th.storage.TypedStorage
        typed = kind(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        storage = _Storage(key, getattr(th, typed._pickle_storage_type()), typed._size())
        place = (storage, tensor.storage_offset(), tuple(tensor.size()), tensor.stride())
        # Written with its types, the class itself would be in the pickle.
        hooks: OrderedDict[Any, Any] = OrderedDict()
        reduced: tuple[Any, ...] = th._utils._rebuild_tensor_v2, (*place, False, hooks)
        self._reduced[id(tensor), key] = reduced
        return reduced


class _Pickler(pickle.Pickler):
    dispatch_table: Mapping[type, Any]

    def persistent_id(self, value: Any) -> Any:
        if type(value) is _Storage:
            return ("storage", value.kind, value.key, "cpu", value.numel)
        return None


class TensorFile:
    """A `.pth` in memory.

    Attributes:
        content: Its bytes.
        slots: Where tensors lie in it, by the key of their storage.
    """

    def __init__(self, content: Bytes, records: Mapping[str, _Record], document: bytes) -> None:
        self.content = content
        self.slots = {
            name.removeprefix(_STORAGES): Slot(record.at, record.size)
            for name, record in records.items()
            if name.startswith(_STORAGES)
        }
        self._records = records
        changing = [record for name, record in records.items() if name == _PICKLE or name.startswith(_STORAGES)]
        self._changing = sorted(changing, key=lambda record: record.at)
        self._document = document
        pickle_record = records[_PICKLE]
        written = content[pickle_record.at : pickle_record.at + pickle_record.size].tobytes()
        # Where this torch pickles otherwise than `pickled`, only what is pickled alike is known to mean the same.
        self._exchangeable = written == document

    def another(self, pinned: bool = False) -> TensorFile:
        """Return a file like this one in memory of its own; what its tensors hold means nothing yet."""
        content = _memory(self.content.nbytes, pinned)
        content[...] = self.content
        file = copy.copy(self)
        file.content = content
        return file

    def take(self, document: bytes) -> bool:
        """Take in the pickle of the value that the tensors are from; return whether it fits."""
        record = self._records[_PICKLE]
        if document != self._document:
            if not self._exchangeable or len(document) != record.size:
                return False
            self._document = document
        if self._exchangeable:
            self.content[record.at : record.at + record.size] = np.frombuffer(document, np.uint8)
        return True

    def pieces(self) -> Iterator[memoryview]:
        """Yield the file, made whole after its tensors were exchanged: what comes first is whole before the rest is."""
        view, begun = self.content.data, 0
        for at, size, checksums in self._changing:
            checksum = zlib.crc32(view[at : at + size])
            for position in checksums:
                struct.pack_into("<I", view, position, checksum)
            # What is changed for the records behind this one lies behind it.
            if at + size - begun >= atomic.SLICE:
                yield from atomic.slices(view[begun : at + size])
                begun = at + size
        yield from atomic.slices(view[begun:])


def saved(value: Any, document: bytes, pinned: bool = False) -> tuple[Bytes, TensorFile | None]:
    """Have torch write a value.

    Args:
        value: Nested plain values and tensors in the memory of the processor.
        document: Its pickle, as `TensorPickler` makes it.
        pinned: Whether a device is to copy to the file's memory.

    Returns:
        The bytes, and the file in which tensors can be exchanged; None where it is not as this module knows it.
    """
    content = written(value, pinned)
    records = _records(content)
    return content, None if records is None else TensorFile(content, records, document)


def written(value: Any, pinned: bool = False) -> Bytes:
    """Return what torch writes of a value.

    Args:
        value: Nested values and tensors.
        pinned: Whether a device is to copy to the file's memory.
    """
    # Twice, rather than a buffer that grows: growing takes the memory twice, which here may be all that is left.
    length = _Length()
    th.save(value, cast("IO[bytes]", length))
    content = _memory(length.bytes, pinned)
    th.save(value, cast("IO[bytes]", _Memory(content)))
    return content


def _memory(size: int, pinned: bool) -> Bytes:
    # Pinned memory is what a device copies to without the processor's help.
    return th.empty(size, dtype=th.uint8, pin_memory=True).numpy() if pinned else np.empty(size, np.uint8)


class _Length(io.RawIOBase):
    """Counts what is written to it."""

    bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        size = memoryview(piece).nbytes
        self.bytes += size
        return size


class _Memory(io.RawIOBase):
    """Memory as a file."""

    def __init__(self, content: Bytes) -> None:
        self._content = content
        self._at = 0

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        source = np.frombuffer(piece, np.uint8)
        self._content[self._at : self._at + source.nbytes] = source
        self._at += source.nbytes
        return source.nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._content.nbytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._content[self._at : self._at + len(buffer)]
        buffer[: piece.nbytes] = piece.tobytes()
        self._at += piece.nbytes
        return piece.nbytes


def _records(content: Bytes) -> dict[str, _Record] | None:
    """Return a zip's records by their names without the folder; None where a checksum is not where it is sought."""
    view = content.data
    with zipfile.ZipFile(_Memory(content)) as archive:
        entry, found = archive.start_dir, {}
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", view, info.header_offset + 26)
            at = info.header_offset + 30 + name_length + extra_length
            if info.flag_bits & _HAS_DESCRIPTOR:
                local, mark, sign = at + info.file_size + 4, at + info.file_size, _DESCRIPTOR
            else:
                local, mark, sign = info.header_offset + 14, info.header_offset, _LOCAL
            checksums = (local, entry + 16)
            signs = bytes(view[mark : mark + 4]), bytes(view[entry : entry + 4])
            if signs != (sign, _CENTRAL) or any(struct.unpack_from("<I", view, c)[0] != info.CRC for c in checksums):
                return None
            found[info.filename.partition("/")[2]] = _Record(at, info.file_size, checksums)
            entry += 46 + sum(struct.unpack_from("<HHH", view, entry + 28))
    return found
