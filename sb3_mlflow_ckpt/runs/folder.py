"""Owns the reading of runs from their folders: the embedded store. Never imports a database's client."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt import json_lines
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, InvalidIdError, RunNotFoundError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import RunFolder, check_id, id_spellings
from sb3_mlflow_ckpt.ledger import CheckpointLedger, corrections
from sb3_mlflow_ckpt.pins import pinned_episodes
from sb3_mlflow_ckpt.runs.curve import read_curve
from sb3_mlflow_ckpt.runs.document import checkpoint_entry, last_sign_of_life
from sb3_mlflow_ckpt.runs.folder_index import FolderIndex, checkpoint_stamps, run_stamps, subfolders
from sb3_mlflow_ckpt.runs.kept import Kept
from sb3_mlflow_ckpt.runs.reader import (
    RUNS_WITH_GLANCES,
    RUNS_WITH_ITEMS,
    SPARKLINE_POINTS,
    Document,
    Documents,
    Glance,
    glance,
    part_of,
    spellings,
    summary,
)

logger = logging.getLogger(__name__)


def read_run(folder: RunFolder) -> dict[str, Any]:
    """Return a run's whole document: its record and `checkpoint_paths`, ascending by episode.

    The status is the stored one.

    Raises:
        CheckpointNotFoundError: The folder holds no record.
        CheckpointCorruptError: The record cannot be understood, or is another run's.
    """
    return {**_checked_record(folder), "checkpoint_paths": _read_items(folder)}


def read_ledger(folder: RunFolder) -> CheckpointLedger:
    """Return the state of a run's checkpoints: what `checkpoints.jsonl` tells, corrected by what is on disk."""
    ledger = CheckpointLedger()
    # The lines first: what is committed after they were read is found on disk, and never the other way round.
    for event in json_lines.read_lines(folder.events)[0]:
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


class FolderRuns:
    """The runs in a checkpoint folder; see `RunReader`. Safe to use from any thread.

    Args:
        checkpoint_dir: The folder of `<agent_id>/<run_id>` folders; it need not exist yet.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        self.checkpoint_dir = Path(checkpoint_dir).absolute()
        self._index = FolderIndex(self.checkpoint_dir, _checked_record)
        self._items: Kept[RunFolder, Documents] = Kept(RUNS_WITH_ITEMS)
        self._seen: Kept[RunFolder, Glance] = Kept(RUNS_WITH_GLANCES)

    def __str__(self) -> str:
        return str(self.checkpoint_dir)

    def get(self, run_id: str) -> Document:
        """Return a run's record with its derived status and its `checkpoint_paths`."""
        with self._found(run_id) as folder:
            return {**shown(folder, _checked_record(folder)), "checkpoint_paths": [*self._items_of(folder)]}

    def record(self, run_id: str) -> Document:
        """Return a run's record with its derived status."""
        with self._found(run_id) as folder:
            return shown(folder, _checked_record(folder))

    def checkpoints(self, run_id: str, *, before: int | None = None, limit: int | None = None) -> Documents:
        """Return items of `checkpoint_paths`, ascending by episode."""
        with self._found(run_id) as folder:
            _checked_record(folder)
            return part_of(self._items_of(folder), before, limit)

    def curve(self, run_id: str, points: int | None = None) -> Documents:
        """Return the points of a run's learning curve, by time."""
        with self._found(run_id) as folder:
            return read_curve(folder, points)

    def version(self, run_id: str) -> str:
        """Return a text that is another one whenever what is shown of the run is."""
        with self._found(run_id) as folder:
            stamps = run_stamps(folder)
            return f"{stamps} {shown(folder, _checked_record(folder))['status']}"

    def list(self, *, agent_id: str | None = None, status: str | None = None, limit: int | None = None) -> Documents:
        """Return the records that match, newest first; one that cannot be read is passed over with a warning."""
        found = [run for run in self._records(agent_id) if status in (None, run["status"])]
        found.sort(key=lambda run: (str(run.get("started_at") or ""), run["run_id"]), reverse=True)
        return [*islice(found, limit)]

    def summaries(self) -> Documents:
        """Return the summary of every run; what has not changed since the last call is not read again."""
        return self._index.summaries()

    def glances(self, run_ids: Sequence[str]) -> dict[str, Glance]:
        """Return what a list shows beside the summaries of some runs."""
        found = {}
        for run_id in run_ids:
            with suppress(RunNotFoundError), self._found(run_id) as folder:
                found[run_id] = self._seen.get(folder, run_stamps(folder), partial(self._glance, folder))
        return found

    def _items_of(self, folder: RunFolder) -> Documents:
        return self._items.get(folder, checkpoint_stamps(folder), partial(_read_items, folder))

    def _glance(self, folder: RunFolder) -> Glance:
        return glance(_checked_record(folder), self._items_of(folder), read_curve(folder, SPARKLINE_POINTS))

    def _records(self, agent_id: str | None) -> Iterator[Document]:
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

    @contextmanager
    def _found(self, run_id: str) -> Iterator[RunFolder]:
        """Find a run's folder; what cannot be read of it, or is gone meanwhile, is not found."""
        folder = self._find(run_id)
        try:
            yield folder
        except (OSError, CheckpointCorruptError) as error:
            logger.warning("A run is passed over: %s", error)
            raise RunNotFoundError(run_id, self.checkpoint_dir) from error

    def _find(self, run_id: str) -> RunFolder:
        known = self._index.folder(run_id)
        if known is not None and known.record.is_file():
            return known
        for agent in subfolders(self.checkpoint_dir):
            for spelling in spellings(run_id):
                folder = _folder(self.checkpoint_dir, agent, spelling)
                if folder is not None:
                    return folder
        raise RunNotFoundError(run_id, self.checkpoint_dir)


def _read_items(folder: RunFolder) -> Documents:
    ledger, pinned = read_ledger(folder), pinned_episodes(folder)
    return [entry(folder, ledger, episode, pinned) for episode in sorted(ledger.saved)]


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
