"""Owns how much memory a network may take that a checkpoint asks for: about what the checkpoint itself holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.overrides import TorchFunctionMode

_RATIO = 16
_SLACK = 256 * 2**20
_FACTORIES = frozenset({"empty", "zeros", "ones", "full", "rand", "randn", "normal", "eye", "new_empty", "new_zeros"})


@contextmanager
def bounded(size: int | None) -> Iterator[None]:
    """Refuse tensors of more bytes than a checkpoint of `size` bytes can be about; None bounds nothing.

    Raises:
        MemoryError: A network asks for more, before any of it is allocated.
    """
    if size is None:
        yield
        return
    with _Bounded(_RATIO * size + _SLACK):
        yield


class _Bounded(TorchFunctionMode):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FACTORIES:
            asked = 4 * math.prod(_lengths((*args, kwargs.get("size", ()))))
            self._total += asked
            if self._total > self._limit:
                raise MemoryError(
                    f"it asks for networks of {self._total} bytes and more, its own size allows for {self._limit}"
                )
        return func(*args, **kwargs)


def _lengths(arguments: Any) -> Iterator[int]:
    for item in arguments:
        if isinstance(item, (tuple, list, th.Size)):
            yield from _lengths(item)
        elif isinstance(item, int) and not isinstance(item, bool):
            yield item
