"""Owns the decisions when to save and what to keep. Pure: frozen dataclasses that never touch disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class SavedCheckpoint(NamedTuple):
    """What retention knows of a checkpoint: its episode, and the mean reward of its last episodes."""

    episode: int
    mean_reward: float | None = None


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last, the best, and milestones beside them.

    Attributes:
        last_n: How many of those that were committed last stay; 0 keeps all.
        best_n: How many of those with the highest `mean_reward` stay; of equal ones the newer.
        every_n_episodes: The first checkpoint at or after each multiple of it stays; 0 keeps no milestones.
    """

    last_n: int = 3
    best_n: int = 0
    every_n_episodes: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever removable."""
        return self.last_n <= 0

    def reasons(
        self, saved: Sequence[SavedCheckpoint], protected: Mapping[str, Collection[int]] | None = None
    ) -> dict[int, tuple[str, ...]]:
        """Return why each checkpoint stays; one without a reason is removable.

        Args:
            saved: What is there, in the order of its commit: a run that went back to an older checkpoint commits
                lower numbers after higher ones.
            protected: What must stay whatever its age, by the reason (pinned, in use, not mirrored, ...).
        """
        groups: dict[str, Collection[int]] = dict(protected or {})
        episodes = [item.episode for item in saved]
        groups["last"] = episodes[-self.last_n :] if self.last_n > 0 else episodes
        groups["best"] = self._best(saved)
        groups["milestone"] = self._milestones(episodes)
        return {e: tuple(reason for reason, members in groups.items() if e in members) for e in episodes}

    def removable(
        self, saved: Sequence[SavedCheckpoint], protected: Mapping[str, Collection[int]] | None = None
    ) -> list[int]:
        """Return the episodes to remove, oldest first; see `reasons`. The newest is never among them."""
        return [episode for episode, reasons in self.reasons(saved, protected).items() if not reasons]

    def _best(self, saved: Sequence[SavedCheckpoint]) -> set[int]:
        ranked = [
            (item.mean_reward, order, item.episode)
            for order, item in enumerate(saved)
            if item.mean_reward is not None and not math.isnan(item.mean_reward)
        ]
        return {episode for _, _, episode in sorted(ranked, reverse=True)[: max(self.best_n, 0)]}

    def _milestones(self, episodes: Sequence[int]) -> set[int]:
        if self.every_n_episodes <= 0:
            return set()
        first: dict[int, int] = {}
        for episode in sorted(episodes):
            first.setdefault(episode // self.every_n_episodes, episode)
        return {episode for multiple, episode in first.items() if multiple > 0}


@dataclass(frozen=True)
class MirrorBacklog:
    """How many checkpoints may wait for their mirror before the oldest loses its protection."""

    limit: int = 50

    def split(self, waiting: Sequence[int]) -> tuple[set[int], set[int]]:
        """Return (protected, given up) episodes of those that wait for the mirror, in the order of their commits."""
        return set(waiting[-self.limit :]), set(waiting[: -self.limit])
