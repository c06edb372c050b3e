"""Owns what pages showed last: it is shown again, with its time, while the database does not answer. Safe to lose."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from sb3_mlflow_ckpt.metadata import timestamp_now
from sb3_mlflow_ckpt.web.formats import Moment

_MOST = 200


@dataclass(frozen=True)
class Outage:
    """A store that does not answer.

    Attributes:
        problem: In one sentence.
        shown: When what is shown was read.
    """

    problem: str
    shown: Moment | None


class LastGood:
    """What pages showed last, by their addresses. Safe to use from any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, address: str, view: Any) -> None:
        """Keep what a page shows now."""
        with self._lock:
            self._kept[address] = (timestamp_now(), view)
            self._kept.move_to_end(address)
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)

    def get(self, address: str) -> tuple[str, Any] | None:
        """Return when a page was shown last, and what it showed."""
        with self._lock:
            return self._kept.get(address)
