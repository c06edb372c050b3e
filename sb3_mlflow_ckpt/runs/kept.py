"""Owns what readers keep of what they have read: safe to lose, and known to be old by a stamp."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)
_T = TypeVar("_T")


class Kept(Generic[_K, _T]):
    """What was read of some runs, the least used of it forgotten first. Safe to use from any thread.

    Args:
        at_most: Of how many runs.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._found: OrderedDict[_K, tuple[object, _T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _K, stamp: object, read: Callable[[], _T]) -> _T:
        """Return what is kept, or what `read` returns where it is kept with another stamp or not at all.

        Args:
            key: What it is kept by.
            stamp: Another one whenever what is read is; it was taken before it is read, so that what changes
                meanwhile is read again.
            read: Reads it.
        """
        with self._lock:
            kept = self._found.get(key)
        found = kept if kept is not None and kept[0] == stamp else (stamp, read())
        with self._lock:
            self._found[key] = found
            self._found.move_to_end(key)
            while len(self._found) > self._at_most:
                self._found.popitem(last=False)
        return found[1]
