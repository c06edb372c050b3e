"""Owns the reading of runs from their folders: the embedded store. Never imports a database's client."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, InvalidIdError, RunNotFoundError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import RunFolder, check_id, id_spellings
from sb3_mlflow_ckpt.ledger import CheckpointLedger, corrections
from sb3_mlflow_ckpt.pins import pinned_episodes
from sb3_mlflow_ckpt.runs.document import checkpoint_entry, last_sign_of_life
from sb3_mlflow_ckpt.runs.reader import Document, Documents, spellings, summary

logger = logging.getLogger(__name__)


def read_run(folder: RunFolder) -> dict[str, Any]:
    """Return a run's whole document: its record and `checkpoint_paths`, ascending by episode.

    The status is the stored one.

    Raises:
        CheckpointNotFoundError: The folder holds no record.
        CheckpointCorruptError: The record cannot be understood, or is another run's.
    """
    record = _checked_record(folder)
    ledger = read_ledger(folder)
    pinned = pinned_episodes(folder)
    return {**record, "checkpoint_paths": [entry(folder, ledger, episode, pinned) for episode in sorted(ledger.saved)]}


def read_ledger(folder: RunFolder) -> CheckpointLedger:
    """Return the state of a run's checkpoints: what `checkpoints.jsonl` tells, corrected by what is on disk."""
    ledger = CheckpointLedger()
    # The lines first: what is committed after they were read is found on disk, and never the other way round.
    for event in atomic.read_lines(folder.events)[0]:
        ledger.apply(event)
    for event in corrections(folder, ledger):
        ledger.apply(event)
    return ledger


def entry(folder: RunFolder, ledger: CheckpointLedger, episode: int, pinned: Collection[int]) -> dict[str, Any]:
    """Return the item of `checkpoint_paths` for an episode that the ledger holds."""
    return checkpoint_entry(
        ledger.saved[episode],
        path=str(folder.model(episode).absolute()),
        uri=ledger.uris.get(episode),
        on_disk=episode not in ledger.pruned,
        pinned=episode in pinned,
    )


def read_curve(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the points of a run's learning curve, by time; a point that was written twice is there once."""
    points = curve_points(atomic.read_lines(folder.metrics)[0])
    # A database sorts numbers before strings; the order is the same here.
    return [points[key] for key in sorted(points, key=lambda key: (isinstance(key[0], str), *key))]


def curve_points(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, int], dict[str, Any]]:
    """Return the points of a learning curve by what identifies them in a run: `time` and `num_timesteps`.

    Rows that lack either are no points and are left out.
    """
    points = {}
    for row in rows:
        time, steps = row.get("time"), row.get("num_timesteps")
        if isinstance(time, (str, int, float)) and isinstance(steps, int):
            points[time, steps] = dict(row)
    return points


class FolderRuns:
    """The runs in a checkpoint folder; see `RunReader`.

    Args:
        checkpoint_dir: The folder of `<agent_id>/<run_id>` folders; it need not exist yet.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        self.checkpoint_dir = Path(checkpoint_dir).absolute()

    def get(self, run_id: str) -> Document:
        """Return a run's record with its derived status and its `checkpoint_paths`."""
        folder = self._find(run_id)
        try:
            return shown(folder, read_run(folder))
        except (OSError, CheckpointCorruptError) as error:
            logger.warning("A run is passed over: %s", error)
            raise RunNotFoundError(run_id, self.checkpoint_dir) from error

    def curve(self, run_id: str) -> Documents:
        """Return the points of a run's learning curve, by time."""
        return read_curve(self._find(run_id))

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        """Return the records that match, newest first; one that cannot be read is passed over with a warning."""
        found = [run for run in self._summaries(agent_id) if status in (None, run["status"])]
        found.sort(key=lambda run: (str(run.get("started_at") or ""), run["run_id"]), reverse=True)
        return [*islice(found, limit)]

    def _summaries(self, agent_id: str | None) -> Iterator[Document]:
        for folder in self._folders(agent_id):
            try:
                yield shown(folder, _checked_record(folder))
            except (OSError, CheckpointCorruptError) as error:
                logger.warning("A run is passed over: %s", error)

    def _folders(self, agent_id: str | None) -> Iterator[RunFolder]:
        agents = subfolders(self.checkpoint_dir) if agent_id is None else [agent_id]
        for agent in agents:
            try:
                check_id(agent, "agent_id")
            except InvalidIdError:
                continue
            for name in subfolders(self.checkpoint_dir / agent):
                folder = _folder(self.checkpoint_dir, agent, name)
                if folder is not None:
                    yield folder

    def _find(self, run_id: str) -> RunFolder:
        for agent in subfolders(self.checkpoint_dir):
            for spelling in spellings(run_id):
                folder = _folder(self.checkpoint_dir, agent, spelling)
                if folder is not None:
                    return folder
        raise RunNotFoundError(run_id, self.checkpoint_dir)


def shown(folder: RunFolder, record: dict[str, Any]) -> Document:
    """Return a folder's record as a reader shows it: with its derived status."""
    written = datetime.fromtimestamp(folder.record.stat().st_mtime, timezone.utc)
    return summary(record, seen=last_sign_of_life(record, written))


def _checked_record(folder: RunFolder) -> dict[str, Any]:
    record = read_record(folder)
    if record.get("run_id") not in id_spellings(folder.run_id):
        raise CheckpointCorruptError(folder.record, f"the run record is that of the run {record.get('run_id')!r}")
    return record


def _folder(checkpoint_dir: Path, agent_id: str, run_id: str) -> RunFolder | None:
    try:
        folder = RunFolder(checkpoint_dir, agent_id, run_id)
        return folder if folder.record.is_file() else None
    except (InvalidIdError, OSError):
        return None


def subfolders(path: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; what cannot be looked at is passed over with a warning."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if _is_folder(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        logger.warning("A folder is passed over: %s", error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself, say.
        return False
