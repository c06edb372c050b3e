"""Owns what became of a run's checkpoints: the lines of `checkpoints.jsonl`, and how the folder corrects them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import takewhile
from typing import Any

from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.layout import LARGEST_EPISODE, RunFolder, chunk_range, entry_chunk, metadata_episode
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, timestamp_now
from sb3_mlflow_ckpt.verification import read_metadata

logger = logging.getLogger(__name__)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_EPISODE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_chunks(value: Any) -> bool:
    return isinstance(value, list) and all(chunk_range(name) is not None for name in value)


def committed_episodes(folder: RunFolder) -> list[int]:
    """Return the episodes of the committed checkpoints in a run folder, ascending."""
    try:
        with os.scandir(folder.path) as entries:
            names = {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return []
    episodes = (metadata_episode(name) for name in names)
    return sorted(e for e in episodes if e is not None and folder.model(e).name in names)


def saved_facts(metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return what the journal keeps of a commit."""
    model = metadata.files[0] if metadata.files else None
    chunks = [name for entry in metadata.files if (name := entry_chunk(entry.name)) is not None]
    return {
        "episode": metadata.episode,
        "num_timesteps": metadata.num_timesteps,
        "timestamp": metadata.timestamp,
        "bytes": model.bytes if model else None,
        "sha256": model.sha256 if model else None,
        "mean_reward": metadata.metrics.get("mean_reward"),
        "trigger": metadata.trigger,
        **({"replay": chunks} if chunks else {}),
    }


# What a line must hold, and what it may hold; a line with anything else in one of these was not written by us.
_NEEDED: dict[str, Callable[[Any], bool]] = {"episode": _is_count, "event": _is_text}
_ADMITTED: dict[str, Callable[[Any], bool]] = {
    "num_timesteps": _is_count,
    "bytes": _is_count,
    "timestamp": _is_text,
    "sha256": _is_text,
    "trigger": _is_text,
    "uri": _is_text,
    "mean_reward": lambda value: type(value) in (int, float),
    "replay": _are_chunks,
}


class CheckpointLedger:
    """The state of a run's checkpoints as its `checkpoints.jsonl` tells it.

    Attributes:
        saved: The facts of each commit, by episode, in the order of the commits.
        uris: The address of each mirrored checkpoint, by episode, in the order of the uploads.
        retired: The episodes whose copy the mirror's retention removed; they are not sent again.
        pruned: The episodes whose files were removed.
        on_disk: The episodes of `saved` that are not in `pruned`, in the same order.
        waiting: Those of them that were never mirrored.
    """

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, Any]] = {}
        self.uris: dict[int, str] = {}
        self.retired: set[int] = set()
        self.pruned: set[int] = set()
        # Kept, not worked out: asked for at every checkpoint, of however many that were saved before it.
        self.on_disk: dict[int, None] = {}
        self.waiting: set[int] = set()
        # The number of the line that told last of an episode, the highest at the end; and of its commit.
        self._changed: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._lines = 0

    def copy(self) -> CheckpointLedger:
        """Return a ledger of its own with the same facts."""
        ledger = CheckpointLedger()
        ledger.saved, ledger.uris = dict(self.saved), dict(self.uris)
        ledger.retired, ledger.pruned = set(self.retired), set(self.pruned)
        ledger.on_disk, ledger.waiting = dict(self.on_disk), set(self.waiting)
        ledger._changed, ledger._committed, ledger._lines = dict(self._changed), dict(self._committed), self._lines
        return ledger

    def copy_of(self, episodes: Iterable[int]) -> CheckpointLedger:
        """Return a ledger of its own that knows these checkpoints, as far as this one does, and no others."""
        known = sorted((e for e in set(episodes) if e in self.saved), key=self._committed.__getitem__)
        ledger = CheckpointLedger()
        ledger.saved = {episode: self.saved[episode] for episode in known}
        ledger.uris = {episode: self.uris[episode] for episode in known if episode in self.uris}
        ledger.retired = {episode for episode in known if episode in self.retired}
        ledger.pruned = {episode for episode in known if episode in self.pruned}
        ledger.on_disk = {episode: None for episode in known if episode in self.on_disk}
        ledger.waiting = {episode for episode in known if episode in self.waiting}
        ledger._changed = {episode: self._changed[episode] for episode in known}
        ledger._committed = {episode: self._committed[episode] for episode in known}
        ledger._lines = self._lines
        return ledger

    def changed_since(self, line: int) -> tuple[set[int], int]:
        """Return the episodes of which lines behind a number told, and the number of the last line."""
        return set(takewhile(lambda episode: self._changed[episode] > line, reversed(self._changed))), self._lines

    def newest_mirrored(self, *further: int) -> int | None:
        """Return the episode in the mirror, or of some further ones, that was saved last."""
        return next((e for e in reversed(self.saved) if e in self.uris or e in further), None)

    def apply(self, event: Mapping[str, Any]) -> int | None:
        """Take one line in; return its episode, or None for a line that is not understood."""
        episode, kind = event.get("episode"), event.get("event")
        if not all(key in event and admits(event[key]) for key, admits in _NEEDED.items()):
            return None
        if not all(admits(event[key]) for key, admits in _ADMITTED.items() if event.get(key) is not None):
            return None  # What is on disk corrects it (`reconcile`).
        assert isinstance(episode, int)
        if kind == "saved":
            self.saved.pop(episode, None)
            self.saved[episode] = {key: value for key, value in event.items() if key != "event"}
            self.pruned.discard(episode)
            # A checkpoint that was saved again is new content: what the mirror has is the old one.
            self.uris.pop(episode, None)
            self.retired.discard(episode)
        elif kind == "mirrored" and event.get("uri"):
            if event.get("sha256") != self._sha256(episode):
                return None  # While it was sent, the episode was saved again: what the mirror has is the old one.
            self.uris.pop(episode, None)
            self.uris[episode] = str(event.get("uri"))
        elif kind == "unmirrored":
            # The same the other way round; lines of earlier versions do not say which content it was.
            if "sha256" in event and event["sha256"] != self._sha256(episode):
                return None
            self.uris.pop(episode, None)
            self.retired.add(episode)
        elif kind == "missing":
            self.uris.pop(episode, None)
        elif kind == "pruned":
            self.pruned.add(episode)
        else:
            return None
        self._lines += 1
        self._changed.pop(episode, None)
        self._changed[episode] = self._lines
        if kind == "saved":
            self._committed[episode] = self._lines
        self._place(episode, is_new=kind == "saved")
        return episode

    def _place(self, episode: int, *, is_new: bool) -> None:
        present = episode in self.saved and episode not in self.pruned
        if is_new or not present:
            self.on_disk.pop(episode, None)
        if is_new and present:
            self.on_disk[episode] = None
        if present and episode not in self.uris and episode not in self.retired:
            self.waiting.add(episode)
        else:
            self.waiting.discard(episode)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield lines that tell what this ledger holds."""
        for saved in self.saved.values():
            yield {"event": "saved", **saved}
        for episode, uri in self.uris.items():
            yield {"event": "mirrored", "episode": episode, "uri": uri, "sha256": self._sha256(episode)}
        for episode in sorted(self.retired):
            yield {"event": "unmirrored", "episode": episode, "sha256": self._sha256(episode)}
        for episode in sorted(self.pruned):
            yield {"event": "pruned", "episode": episode}

    def _sha256(self, episode: int) -> Any:
        return self.saved.get(episode, {}).get("sha256")


def _facts_on_disk(folder: RunFolder, episode: int) -> dict[str, Any]:
    # The zip as well: where a crash came while it was written anew, it says which of two contents it has.
    found = (path.stat() for path in (folder.metadata(episode), folder.model(episode)))
    return _facts_in(folder, episode, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in found))


# A folder may hold thousands of checkpoints, and a page of it is asked for again and again.
@lru_cache(maxsize=1 << 14)
def _facts_in(folder: RunFolder, episode: int, stamps: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    return saved_facts(read_metadata(folder.model(episode)))


def corrections(folder: RunFolder, ledger: CheckpointLedger) -> list[dict[str, Any]]:
    """Return the lines that a ledger lacks to agree with its folder.

    The two differ where a crash, or this moment, lies between a commit or a removal and its line.
    """
    saved: list[dict[str, Any]] = []
    on_disk = committed_episodes(folder)
    newest = max((str(facts.get("timestamp")) for facts in ledger.saved.values()), default="")
    for episode in on_disk:
        try:
            facts = _facts_on_disk(folder, episode)
        except (OSError, CheckpointError) as error:
            logger.warning("A checkpoint is passed over: %s", error)
            continue
        known = ledger.saved.get(episode, {})
        # An episode that was saved again has other content under the same name.
        if not known or episode in ledger.pruned or facts["sha256"] != known.get("sha256"):
            # One that the run itself did not note is put in its place by its time, not by that of this line.
            late = facts["timestamp"] < newest
            saved.append({"event": "saved", **facts, **({"adopted": True} if late else {})})
    # As they were committed: a run that went back to an older checkpoint has lower numbers after higher ones.
    saved.sort(key=lambda facts: (facts["timestamp"], facts["episode"]))
    gone = sorted(set(ledger.saved) - set(on_disk) - ledger.pruned)
    return saved + [{"event": "pruned", "episode": episode, "time": timestamp_now()} for episode in gone]
