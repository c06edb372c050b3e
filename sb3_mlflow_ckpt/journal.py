"""Owns the files of a run folder that mirrors replay: `run.json`, `metrics.jsonl`, `checkpoints.jsonl`.

`run.json` holds what changes in place and is rewritten atomically; the other two only grow, a line a fact:

- `metrics.jsonl`: a point of the learning curve;
- `checkpoints.jsonl`: `saved`, `mirrored`, `unmirrored`, `missing`, `pruned`, in the order in which they happened.

The presence of a checkpoint's metadata is its commit; the line `saved` follows it, and is made good at the next
start where a crash came between (`corrections`), or with the next line where the disk refused it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import atomic, strict_json
from sb3_mlflow_ckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    InvalidIdError,
    RunFolderBusyError,
    RunTakenOverError,
)
from sb3_mlflow_ckpt.layout import (
    LARGEST_EPISODE,
    LOCK_NAME,
    REPLAY_FOLDER,
    TEMPORARY_PREFIX,
    RunFolder,
    chunk_range,
    entry_chunk,
    metadata_episode,
    temporary_target,
)
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, timestamp_now
from sb3_mlflow_ckpt.ownership import FolderClaim
from sb3_mlflow_ckpt.runs.document import wrong_field
from sb3_mlflow_ckpt.timeline import Timeline
from sb3_mlflow_ckpt.verification import read_metadata

logger = logging.getLogger(__name__)

# More than a point is long.
_TAIL_BYTES = 1 << 16


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_EPISODE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_chunks(value: Any) -> bool:
    return isinstance(value, list) and all(chunk_range(name) is not None for name in value)


def read_record(folder: RunFolder) -> dict[str, Any]:
    """Return what `run.json` holds.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointCorruptError: It cannot be read, or is not a JSON object.
    """
    try:
        record = strict_json.loads(atomic.read_bytes(folder.record))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(folder.record, "The folder holds no run record") from error
    except OSError as error:
        raise CheckpointCorruptError(
            folder.record, f"the run record cannot be read ({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise CheckpointCorruptError(folder.record, f"the run record is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointCorruptError(folder.record, "the run record is not a JSON object")
    wrong = wrong_field(record)
    if wrong is not None:
        raise CheckpointCorruptError(folder.record, f"the run record is not valid at {wrong!r}")
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
            if event.get("sha256") != self.saved.get(episode, {}).get("sha256"):
                return None  # While it was sent, the episode was saved again: what the mirror has is the old one.
            self.uris.pop(episode, None)
            self.uris[episode] = str(event.get("uri"))
        elif kind == "unmirrored":
            self.uris.pop(episode, None)
            self.retired.add(episode)
        elif kind == "missing":
            self.uris.pop(episode, None)
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


def corrections(folder: RunFolder, ledger: CheckpointLedger) -> list[dict[str, Any]]:
    """Return the lines that a ledger lacks to agree with its folder.

    The two differ where a crash, or this moment, lies between a commit or a removal and its line.
    """
    saved: list[dict[str, Any]] = []
    on_disk = committed_episodes(folder)
    for episode in on_disk:
        try:
            facts = saved_facts(read_metadata(folder.model(episode)))
        except (OSError, CheckpointError) as error:
            logger.warning("A checkpoint is passed over: %s", error)
            continue
        known = ledger.saved.get(episode, {})
        # An episode that was saved again has other content under the same name.
        if not known or episode in ledger.pruned or facts["sha256"] != known.get("sha256"):
            saved.append({"event": "saved", **facts})
    # As they were committed: a run that went back to an older checkpoint has lower numbers after higher ones.
    saved.sort(key=lambda facts: (facts["timestamp"], facts["episode"]))
    gone = sorted(set(ledger.saved) - set(on_disk) - ledger.pruned)
    return saved + [{"event": "pruned", "episode": episode, "time": timestamp_now()} for episode in gone]


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
        # Nobody else writes here now: what lies about half-written is a dead writer's.
        sweep(folder)
        self._timeline = Timeline()
        self._lock = threading.RLock()
        self._closed = False
        self._listeners: list[Callable[[], None]] = []
        self.ledger = CheckpointLedger()
        events, _ = atomic.read_lines(folder.events)
        for event in events:
            self.ledger.apply(event)
        # Lines that the disk refused; they go before the next one.
        self._refused: list[dict[str, Any]] = []
        self._record: dict[str, Any] = read_record(folder) if folder.record.exists() else {}
        last_points = _last_points(folder.metrics)
        self._curve_end = max((steps for steps, _ in last_points), default=-1)
        for stamp in [
            *(time for _, time in last_points),
            *(saved.get("timestamp") for saved in self.ledger.saved.values()),
        ]:
            self._timeline.note(stamp)
        self.reconcile()

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
            ValueError: The journal is closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError(f"The journal of {self.folder.path} is closed")
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

    def add_missing(self, episode: int) -> None:
        """Note that the mirror lacks a checkpoint that it had: it waits again, if it is still on disk."""
        self._add_event({"event": "missing", "episode": episode, "time": timestamp_now()})

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
        """Release the folder; nothing is written to it from now on, by whatever thread comes late."""
        with self._lock:
            if self._refused:
                self._write_events()
            self._closed = True
        self._claim.release()

    def _add_event(self, event: dict[str, Any]) -> None:
        """Take a fact in, and write it down; a disk that refuses the line does not undo the fact."""
        with self._lock:
            self.ledger.apply(event)
            self._refused.append(event)
            self._write_events()
        self._notify()

    def _write_events(self) -> None:
        try:
            self.make_sure()
            while self._refused:
                atomic.append_line(self.folder.events, self._refused[0])
                del self._refused[0]
        except RunTakenOverError:
            raise
        except OSError as error:
            logger.warning("A line on the run's checkpoints was not written and follows later: %s", error)

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
            self._refused.clear()
            self.reconcile()

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    def reconcile(self) -> None:
        """Make the ledger agree with the folder."""
        with self._lock:
            for event in corrections(self.folder, self.ledger):
                self._add_event(event)


def _last_points(path: Path) -> list[tuple[int, Any]]:
    """Return timesteps and time of the last points that earlier attempts left."""
    start = max(0, path.stat().st_size - _TAIL_BYTES) if path.exists() else 0
    points, _ = atomic.read_lines(path, start)
    return [
        (point["num_timesteps"], point.get("time")) for point in points if isinstance(point.get("num_timesteps"), int)
    ]


def sweep_dead_writers(folder: RunFolder) -> None:
    """Remove what dead writers left half-written in the folders of an agent's other runs, if nobody holds their lock.

    Opening a journal does so in its own folder.
    """
    for other in _subfolders(folder.path.parent):
        if other == folder.path or not temporaries(other):
            continue
        try:
            with FileLock(other / LOCK_NAME, timeout=0):
                sweep(RunFolder.at(other))
        except (Timeout, OSError, InvalidIdError) as error:
            logger.debug("%s is left as it is: %s", other, error)


def sweep(folder: RunFolder) -> None:
    """Remove what dead writers left half-written in a run's folder, whose lock the caller holds."""
    for path in temporaries(folder.path):
        discard_temporary(folder, path)


def discard_temporary(folder: RunFolder, path: Path) -> None:
    """Remove one file that a dead writer left half-written.

    Metadata under a temporary name is that of a commit or a removal that was not finished. Its zip goes first, so
    that the next one knows it, too, if this process dies in between.
    """
    episode = metadata_episode(temporary_target(path.name) or "")
    if episode is not None and not folder.metadata(episode).exists():
        folder.model(episode).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def temporaries(folder: Path) -> list[Path]:
    """Return what writers left half-written in a run folder; of a live one it is under way."""
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
