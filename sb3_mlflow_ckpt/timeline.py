"""Owns the order of a run's timestamps: they only go forward, whatever the clock does. Pure.

Which checkpoint is the newest, and which points a mirror has already, is told by time.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone


class Timeline:
    """Timestamps that each come after the one before, through restarts and resumes."""

    def __init__(self) -> None:
        self._last: datetime | None = None

    def note(self, timestamp: object) -> None:
        """Take in a timestamp that was given out earlier; anything else is passed over."""
        moment = _parsed(timestamp)
        if moment is not None and (self._last is None or moment > self._last):
            self._last = moment

    def after(self, timestamp: str) -> str:
        """Return a timestamp, or a millisecond after the last one where the clock has been put back."""
        moment = _parsed(timestamp)
        if self._last is not None and (moment is None or moment <= self._last):
            moment = self._last + timedelta(milliseconds=1)
            timestamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._last = moment
        return timestamp


def _parsed(timestamp: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(timestamp).replace("Z", "+00:00"))
        # The last year leaves no room after it.
        return moment.astimezone(timezone.utc) if moment.year < 9999 else None
    except (ValueError, OverflowError):
        return None
