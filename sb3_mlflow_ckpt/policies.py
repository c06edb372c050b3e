"""Owns the decisions when to save and what to keep. Pure: frozen dataclasses that never touch disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EveryNEpisodes:
    """A checkpoint at every multiple of `interval` episodes; 0 disables periodic checkpoints."""

    interval: int = 50

    def due(self, before: int, after: int) -> int | None:
        """Return the label of the checkpoint that is due after a step, or None.

        Several environments can end in one step, so the count may jump over a multiple: what matters is that
        one was crossed, not that the count stands on it. Several multiples crossed at once are one checkpoint.

        Args:
            before: Finished episodes before the step.
            after: Finished episodes after it.
        """
        if self.interval <= 0 or after // self.interval <= before // self.interval:
            return None
        return after // self.interval * self.interval


@dataclass(frozen=True)
class KeepLastN:
    """Keep the `n` checkpoints that were committed last; 0 keeps all."""

    n: int = 3

    def removable(self, episodes: Sequence[int], protected: Collection[int] = ()) -> list[int]:
        """Return the episodes to remove, oldest first.

        The newest checkpoint is never removed, nor is a protected one; protected ones count among the kept.

        Args:
            episodes: What is there, in the order of its commit: a run that went back to an older checkpoint
                commits lower numbers after higher ones.
            protected: What must stay whatever its age (not mirrored yet, in use by a resume, ...).
        """
        if self.n <= 0:
            return []
        return [episode for episode in episodes[: -self.n] if episode not in protected]


@dataclass(frozen=True)
class MirrorBacklog:
    """How many checkpoints may wait for their mirror before the oldest loses its protection."""

    limit: int = 50

    def split(self, waiting: Collection[int]) -> tuple[set[int], set[int]]:
        """Return (protected, given up) episodes of those that wait for the mirror."""
        ordered = sorted(waiting, reverse=True)
        return set(ordered[: self.limit]), set(ordered[self.limit :])
