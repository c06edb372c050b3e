"""Owns how long checkpoints hold the training thread: counted, told in the curve and the record, and warned of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

METRIC = "checkpoint/stall_ms"
"""What a point of the curve calls the milliseconds since the point before."""

_WORTH_A_WARNING = 1.0
_A_LOCK_S_PRICE = 0.001


class Stalls:
    """The stalls of one run."""

    def __init__(self) -> None:
        self._count = 0
        self._total = self._longest = self._waited = 0.0
        self._since_point: float | None = None
        self._warned = False

    def note(self, seconds: float, waited: float) -> None:
        """Count a checkpoint.

        Args:
            seconds: How long the training thread was held.
            waited: The part of it in which the checkpoints before were still being written.
        """
        self._count += 1
        self._total += seconds
        self._longest = max(self._longest, seconds)
        # Taking a lock that is free takes its microseconds as well.
        self._waited += waited if waited > _A_LOCK_S_PRICE else 0.0
        self._since_point = (self._since_point or 0.0) + seconds
        if waited > _WORTH_A_WARNING and not self._warned:
            self._warned = True
            logger.warning(
                "Training waited %.1f s for the disk: checkpoints come faster than they can be written. "
                "Increase checkpoint_interval_episodes, or use a faster checkpoint_dir",
                waited,
            )

    def point(self) -> dict[str, float]:
        """Return what the next point of the curve says; nothing where no checkpoint was taken since the last."""
        since, self._since_point = self._since_point, None
        return {} if since is None else {METRIC: _milliseconds(since)}

    def summary(self) -> dict[str, Any]:
        """Return what the record's `progress` says of all of them."""
        return {
            "count": self._count,
            "total_ms": _milliseconds(self._total),
            "longest_ms": _milliseconds(self._longest),
            "waited_ms": _milliseconds(self._waited),
        }


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def stall_text(progress: Mapping[str, Any]) -> str:
    """Return in words what a record's `progress` says of stalls; empty where it says nothing that makes sense."""
    stalls = progress.get("checkpoint_stalls")
    keys = ("count", "total_ms", "longest_ms", "waited_ms")
    values = [stalls.get(key) for key in keys] if isinstance(stalls, Mapping) else []
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e15]
    if len(numbers) < len(keys) or numbers[0] < 1:
        return ""
    count, total, longest, waited = numbers
    each = f"{total / count:,.1f} ms each, {longest:,.1f} ms at most"
    return f"{each}, of it {waited:,.0f} ms waiting for the disk" if waited >= 1 else each
