"""Owns the plain form of nested state: values and arrays <-> a JSON document and one run of bytes. No pickle.

Only what has an entry here can be written, and reading makes nothing but these types, so a file from a stranger
can at most hold wrong numbers.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KIND = "$"
_ALIGNMENT = 64
_DEPTH = 64
# JSON readers differ beyond it; the states of random number generators are such integers.
_LARGEST_INTEGER = 2**63 - 1
_LONGEST_INTEGER = 300
# Kinds of numpy types whose bytes mean the same in every process: no objects, no structures.
_PLAIN_KINDS = frozenset("biufcSU")
_DTYPE = re.compile(r"[<>|=]?[A-Za-z]+\d{0,9}", re.ASCII)


def dtype_of(name: Any) -> np.dtype[Any]:
    """Return the type of numbers that a text such as `<f4` or `float32` names.

    Raises:
        ValueError: It names none. numpy itself would read any text as Python's source.
    """
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"{str(name)[:40]!r} is no type of numbers")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise ValueError(f"{name[:40]!r} is no type of numbers") from error


class NotPlainError(TypeError):
    """A value has no plain form; the message says where it stands and what it is."""


def encode(value: Any) -> tuple[Any, list[NDArray[Any]]]:
    """Return the JSON document of a nested value, and its arrays in the order in which the document counts them.

    Takes None, bool, int, float, str, bytes, numpy arrays and scalars, torch tensors, lists, tuples, deques and
    mappings of these. A deque becomes a list. Arrays are not copied.

    Raises:
        NotPlainError: Something else is in it.
    """
    arrays: list[NDArray[Any]] = []
    document = _encode(value, arrays, "state", _Offset())
    return document, arrays


def pieces(arrays: list[NDArray[Any]]) -> Iterator[NDArray[np.uint8]]:
    """Yield the pieces that, one after the other, are the bytes that a document's arrays stand in."""
    for array in arrays:
        content = np.ascontiguousarray(array)
        yield content.reshape(-1).view(np.uint8) if content.size else np.empty(0, dtype=np.uint8)
        yield np.zeros(-content.nbytes % _ALIGNMENT, dtype=np.uint8)


def decode(document: Any, content: bytes | memoryview = b"") -> Any:
    """Return the value that `encode` was given; arrays are copies of their own.

    Args:
        document: The JSON document.
        content: The bytes of its arrays.

    Raises:
        ValueError: It is not such a document, or an array is not within the bytes.
    """
    return _decode(document, memoryview(content), 0)


class _Offset:
    """Counts where the next array begins."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, size: int) -> int:
        at = self.next
        self.next += size + -size % _ALIGNMENT
        return at


def _encode(value: Any, arrays: list[NDArray[Any]], where: str, offset: _Offset) -> Any:
    if type(value) is int and abs(value) > _LARGEST_INTEGER:
        if value.bit_length() > 3 * _LONGEST_INTEGER:
            raise NotPlainError(f"{where} is an integer of {value.bit_length()} bits")
        return {_KIND: "integer", "digits": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic):
        # A subclass (IntEnum, say) is stored as what it is an instance of.
        return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array("array" if isinstance(value, np.ndarray) else "scalar", value, arrays, where, offset)
    if isinstance(value, (bytes, bytearray)):
        return _encode_array("bytes", np.frombuffer(bytes(value), dtype=np.uint8), arrays, where, offset)
    if _is_tensor(value):
        return _encode_array("tensor", value.detach().cpu().numpy(), arrays, where, offset)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: _encode(item, arrays, f"{where}.{key}", offset) for key, item in value.items()}
        items = [[_encode(key, arrays, where, offset), _encode(item, arrays, f"{where}[{key!r}]", offset)]
                 for key, item in value.items()]  # fmt: skip
        return {_KIND: "map", "items": items}
    if isinstance(value, (list, tuple, deque)):
        encoded = [_encode(item, arrays, f"{where}[{index}]", offset) for index, item in enumerate(value)]
        return {_KIND: "tuple", "items": encoded} if isinstance(value, tuple) else encoded
    raise NotPlainError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")


def _encode_array(kind: str, value: Any, arrays: list[NDArray[Any]], where: str, offset: _Offset) -> dict[str, Any]:
    array = np.asarray(value)
    if array.dtype.kind not in _PLAIN_KINDS:
        raise NotPlainError(f"{where} is an array of {array.dtype}")
    arrays.append(array)
    return {_KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "at": offset.take(array.nbytes)}


def _is_tensor(value: Any) -> bool:
    # Asked by name: this module is used where torch is not imported.
    return type(value).__module__.startswith("torch") and hasattr(value, "detach")


def _decode(document: Any, content: memoryview, depth: int) -> Any:
    if depth > _DEPTH:
        raise ValueError("the state is nested too deeply")
    if isinstance(document, list):
        return [_decode(item, content, depth + 1) for item in document]
    if not isinstance(document, dict):
        return document
    kind = document.get(_KIND)
    if kind is None:
        return {key: _decode(item, content, depth + 1) for key, item in document.items()}
    if kind == "integer":
        digits = document.get("digits")
        if not isinstance(digits, str) or len(digits) > _LONGEST_INTEGER:
            raise ValueError("the state holds an integer that is not described")
        return int(digits)
    items = document.get("items")
    if kind == "tuple" and isinstance(items, list):
        return tuple(_decode(item, content, depth + 1) for item in items)
    if kind == "map" and isinstance(items, list) and all(isinstance(i, list) and len(i) == 2 for i in items):
        return {_decode(key, content, depth + 1): _decode(item, content, depth + 1) for key, item in items}
    array = _decode_array(document, content)
    if kind == "array":
        return array
    if kind == "scalar" and array.shape == ():
        return array[()]
    if kind == "bytes" and array.dtype == np.uint8:
        return array.tobytes()
    if kind == "tensor":
        import torch

        return torch.from_numpy(array)
    raise ValueError(f"the state holds a value of the unknown kind {kind!r}")


def _decode_array(document: Mapping[str, Any], content: memoryview) -> NDArray[Any]:
    try:
        dtype = dtype_of(document["dtype"])
        shape = tuple(int(length) for length in document["shape"])
        at = int(document["at"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the state holds an array that is not described ({error})") from error
    size = math.prod(shape) * dtype.itemsize
    if dtype.kind not in _PLAIN_KINDS or min((*shape, at)) < 0 or at + size > len(content):
        raise ValueError("the state holds an array that is not within its bytes")
    return np.frombuffer(content[at : at + size], dtype=dtype).reshape(shape).copy()
