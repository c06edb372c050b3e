"""Owns the files of a run folder that mirrors replay: `run.json`, `metrics.jsonl`, `checkpoints.jsonl`.

`run.json` holds what changes in place and is rewritten atomically; the other two only grow, a line a fact:

- `metrics.jsonl`: a point of the learning curve;
- `checkpoints.jsonl`: `saved`, `mirrored`, `unmirrored`, `pruned`, in the order in which they happened.

The presence of a checkpoint's metadata is its commit; the line `saved` follows it and is made good at the next
start where a crash came between (`reconcile`).
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    RunFolderBusyError,
    RunTakenOverError,
)
from sb3_mlflow_ckpt.layout import LOCK_NAME, REPLAY_FOLDER, TEMPORARY_PREFIX, RunFolder, entry_chunk, metadata_episode
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, parse_metadata, timestamp_now
from sb3_mlflow_ckpt.ownership import FolderClaim
from sb3_mlflow_ckpt.timeline import Timeline

logger = logging.getLogger(__name__)

# More than a point is long.
_TAIL_BYTES = 1 << 16


def read_record(folder: RunFolder) -> dict[str, Any]:
    """Return what `run.json` holds.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointCorruptError: It is not a JSON object.
    """
    try:
        record = json.loads(folder.record.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(folder.record, "The folder holds no run record") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(folder.record, f"the run record is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointCorruptError(folder.record, "the run record is not a JSON object")
    return record


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


class CheckpointLedger:
    """The state of a run's checkpoints as its `checkpoints.jsonl` tells it.

    Attributes:
        saved: The facts of each commit, by episode, in the order of the commits.
        uris: The address of each mirrored checkpoint, by episode, in the order of the uploads.
        retired: The episodes whose copy the mirror's retention removed; they are not sent again.
        pruned: The episodes whose files were removed.
    """

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, Any]] = {}
        self.uris: dict[int, str] = {}
        self.retired: set[int] = set()
        self.pruned: set[int] = set()

    def copy(self) -> CheckpointLedger:
        """Return a ledger of its own with the same facts."""
        ledger = CheckpointLedger()
        ledger.saved, ledger.uris = dict(self.saved), dict(self.uris)
        ledger.retired, ledger.pruned = set(self.retired), set(self.pruned)
        return ledger

    def apply(self, event: Mapping[str, Any]) -> int | None:
        """Take one line in; return its episode, or None for a line that is not understood."""
        episode, kind = event.get("episode"), event.get("event")
        if not isinstance(episode, int):
            return None
        if kind == "saved":
            self.saved.pop(episode, None)
            self.saved[episode] = {key: value for key, value in event.items() if key != "event"}
            self.pruned.discard(episode)
            # A checkpoint that was saved again is new content: what the mirror has is the old one.
            self.uris.pop(episode, None)
            self.retired.discard(episode)
        elif kind == "mirrored":
            if event.get("sha256") != self.saved.get(episode, {}).get("sha256"):
                return None  # While it was sent, the episode was saved again: what the mirror has is the old one.
            self.uris.pop(episode, None)
            self.uris[episode] = str(event.get("uri"))
        elif kind == "unmirrored":
            self.uris.pop(episode, None)
            self.retired.add(episode)
        elif kind == "pruned":
            self.pruned.add(episode)
        else:
            return None
        return episode

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield lines that tell what this ledger holds."""
        for saved in self.saved.values():
            yield {"event": "saved", **saved}
        for episode, uri in self.uris.items():
            sha256 = self.saved.get(episode, {}).get("sha256")
            yield {"event": "mirrored", "episode": episode, "uri": uri, "sha256": sha256}
        for kind, episodes in (("unmirrored", self.retired), ("pruned", self.pruned)):
            for episode in sorted(episodes):
                yield {"event": kind, "episode": episode}

    @property
    def waiting(self) -> set[int]:
        """The episodes that are on disk and were never mirrored."""
        return set(self.saved) - set(self.uris) - self.pruned - self.retired


class RunJournal:
    """The one writer of a run folder's record, curve and checkpoint ledger. Safe to call from any thread.

    Opening takes the folder's lock. Before every write it is made sure that the folder is still this journal's: one
    that was removed or renamed meanwhile is made again; one that another process has taken over is left to it.

    Args:
        folder: The run folder; made if it is missing.

    Raises:
        RunFolderBusyError: A live process holds the folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._claim = FolderClaim(folder)
        self._timeline = Timeline()
        self._lock = threading.RLock()
        self._listeners: list[Callable[[], None]] = []
        self.ledger = CheckpointLedger()
        events, _ = atomic.read_lines(folder.events)
        for event in events:
            self.ledger.apply(event)
        self._record: dict[str, Any] = read_record(folder) if folder.record.exists() else {}
        last_points = _last_points(folder.metrics)
        self._curve_end = max((steps for steps, _ in last_points), default=-1)
        for stamp in [
            *(time for _, time in last_points),
            *(saved.get("timestamp") for saved in self.ledger.saved.values()),
        ]:
            self._timeline.note(stamp)
        self._reconcile()

    @property
    def record(self) -> dict[str, Any]:
        """A copy of the record as it stands."""
        with self._lock:
            return dict(self._record)

    def start(self, record: Mapping[str, Any]) -> None:
        """Write the record of a run that starts, or starts again in its own folder (its attempt counts up)."""
        with self._lock:
            attempt = int(self._record.get("attempt", 0)) + 1
            kept = {key: self._record[key] for key in ("started_at", "parent") if self._record.get(key)}
            self._timeline.note((record.get("parent") or {}).get("timestamp"))
            self._record = {**record, **kept, "attempt": attempt}
            atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))
        self._notify()

    def stamp(self, timestamp: str) -> str:
        """Return a time that lies after all that this run, and the one that it came from, gave out before."""
        with self._lock:
            return self._timeline.after(timestamp)

    def make_sure(self) -> None:
        """Make sure that the folder is still this journal's, as before every write.

        Raises:
            RunTakenOverError: Another process writes to it now.
            OSError: It is gone and cannot be made again.
        """
        with self._lock:
            if not self._claim.holds():
                self._claim_again()
            elif self._superseded():
                raise RunTakenOverError(self.folder.path)

    def update(self, **fields: Any) -> None:
        """Change fields of the record and rewrite it; a nested mapping replaces the one before."""
        with self._lock:
            self._record.update(fields)
            self._write_record()
        self._notify()

    def add_metrics(self, point: Mapping[str, Any]) -> None:
        """Append a point of the learning curve.

        An attempt that goes on in its own folder passes again through what the one before it lived to see after
        its last checkpoint. The curve does not double back: those points are there already.
        """
        if point.get("num_timesteps", 0) <= self._curve_end:
            return
        with self._lock:
            self.make_sure()
            stamp = {"time": self.stamp(point["time"])} if "time" in point else {}
            atomic.append_line(self.folder.metrics, {**point, **stamp}, durable=False)
        self._notify()

    def add_saved(self, metadata: CheckpointMetadata) -> None:
        """Note that a checkpoint was committed."""
        self._add_event({"event": "saved", **saved_facts(metadata)})

    def add_mirrored(self, episode: int, uri: str, sha256: str | None) -> None:
        """Note that a checkpoint lies whole in the mirror at `uri`.

        Args:
            episode: Its episode.
            uri: Its address.
            sha256: What was sent; if the episode was saved again meanwhile it still waits for its mirror.
        """
        event = {"event": "mirrored", "episode": episode, "uri": uri, "sha256": sha256}
        self._add_event({**event, "time": timestamp_now()})

    def add_unmirrored(self, episode: int) -> None:
        """Note that the mirror's retention removed its copy of a checkpoint."""
        self._add_event({"event": "unmirrored", "episode": episode, "time": timestamp_now()})

    def add_pruned(self, episode: int) -> None:
        """Note that a checkpoint's files were removed from the folder."""
        self._add_event({"event": "pruned", "episode": episode, "time": timestamp_now()})

    def waiting_for_mirror(self) -> set[int]:
        """Return the episodes that are on disk and were never mirrored."""
        with self._lock:
            return self.ledger.waiting

    def snapshot(self) -> CheckpointLedger:
        """Return a copy of the ledger as it stands; `ledger` itself goes on changing under other threads."""
        with self._lock:
            return self.ledger.copy()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` (quick, from any thread) after every change."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Release the folder."""
        self._claim.release()

    def _add_event(self, event: dict[str, Any]) -> None:
        with self._lock:
            self.make_sure()
            atomic.append_line(self.folder.events, event)
            self.ledger.apply(event)
        self._notify()

    def _write_record(self) -> None:
        self.make_sure()
        atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))

    def _superseded(self) -> bool:
        """Return whether a later attempt has written the record: a lock is no fence where a file system has none."""
        try:
            found = read_record(self.folder)
        except (CheckpointError, OSError):
            return False  # Whatever became of it, the next update writes it anew.
        attempt = found.get("attempt")
        return isinstance(attempt, int) and attempt > int(self._record.get("attempt", 0))

    def _claim_again(self) -> None:
        """Take the folder anew after it, or its lock, was removed or renamed in mid-run."""
        held = self._claim
        try:
            self._claim = FolderClaim(self.folder)
        except RunFolderBusyError as error:
            raise RunTakenOverError(self.folder.path) from error
        held.release()
        if self._superseded():
            raise RunTakenOverError(self.folder.path)
        if self._record and not self.folder.record.exists():
            logger.error(
                "%s was removed or renamed while its run trains. It is made again: "
                "the checkpoints that lay in it are not there any more, the next ones will be",
                self.folder.path,
            )
            atomic.write_bytes(self.folder.record, atomic.dump_json(self._record))
        if not self.folder.events.exists():
            lines = [atomic.dump_json(event, indent=None) for event in self.ledger.events()]
            atomic.write_bytes(self.folder.events, b"".join(lines))
            self._reconcile()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def _reconcile(self) -> None:
        """Make the ledger agree with the folder where a crash came between a commit or removal and its line."""
        on_disk = set(committed_episodes(self.folder))
        for episode in sorted(on_disk):
            if episode in self.ledger.saved and episode not in self.ledger.pruned:
                continue
            path = self.folder.metadata(episode)
            try:
                self.add_saved(parse_metadata(path.read_bytes(), path))
            except (OSError, CheckpointError) as error:
                logger.warning("A checkpoint is passed over: %s", error)
        for episode in sorted(set(self.ledger.saved) - on_disk - self.ledger.pruned):
            self.add_pruned(episode)


def _last_points(path: Path) -> list[tuple[int, Any]]:
    """Return timesteps and time of the last points that earlier attempts left."""
    start = max(0, path.stat().st_size - _TAIL_BYTES) if path.exists() else 0
    points, _ = atomic.read_lines(path, start)
    return [
        (point["num_timesteps"], point.get("time")) for point in points if isinstance(point.get("num_timesteps"), int)
    ]


def sweep_dead_writers(folder: RunFolder) -> None:
    """Remove what dead writers left half-written in this run's folder and in its agent's other runs'.

    The caller holds this folder's lock. Another one is swept only if nobody holds its lock.
    """
    _sweep(folder.path)
    for other in _subfolders(folder.path.parent):
        if other == folder.path or not _temporaries(other):
            continue
        try:
            with FileLock(other / LOCK_NAME, timeout=0):
                _sweep(other)
        except (Timeout, OSError) as error:
            logger.debug("%s is left as it is: %s", other, error)


def _sweep(folder: Path) -> None:
    for path in _temporaries(folder):
        path.unlink(missing_ok=True)


def _temporaries(folder: Path) -> list[Path]:
    found: list[Path] = []
    for part in (folder, folder / REPLAY_FOLDER):
        if part.is_dir() and not part.is_symlink():
            with os.scandir(part) as entries:
                found += [
                    Path(entry.path)
                    for entry in entries
                    if entry.name.startswith(TEMPORARY_PREFIX) and entry.is_file(follow_symlinks=False)
                ]
    return found


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
