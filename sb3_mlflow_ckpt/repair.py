"""Owns bringing run folders in order that no live process holds: each defect is named, and mended or set aside.

Nothing that is damaged is deleted. Each step is one rename or one atomic write, in an order in which a death between
two of them leaves what the next repair takes up; doing it twice changes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from sb3_mlflow_ckpt import atomic, json_lines
from sb3_mlflow_ckpt.dead_writers import discard_temporary, temporaries
from sb3_mlflow_ckpt.errors import CheckpointError, ForeignCheckpointError, MirrorUnavailableError
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.layout import FETCH_PREFIX, RunFolder, chunk_entry, entry_chunk, metadata_episode, model_episode
from sb3_mlflow_ckpt.leases import nobody_saves, sweep_leases
from sb3_mlflow_ckpt.ledger import CheckpointLedger, committed_episodes, saved_facts
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, timestamp_now
from sb3_mlflow_ckpt.pins import sweep_pins
from sb3_mlflow_ckpt.rebuilding import rebuilt_record
from sb3_mlflow_ckpt.replay_sweep import ChunkSweeper
from sb3_mlflow_ckpt.state.embedded import read_embedded_metadata, read_part
from sb3_mlflow_ckpt.verification import read_metadata, replacement_of, verify_checkpoint

_DAMAGE = (CheckpointError, OSError)
# Not what a disk says that fails: nothing, or something else, lies there.
_NOT_THERE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EFBIG)

LEFT_ALONE = "left alone"
"""The action on a folder that somebody uses: nothing was looked at."""


@dataclass(frozen=True)
class Repair:
    """One defect of a run folder, or that it was left alone.

    Attributes:
        folder: The run folder.
        defect: What is wrong.
        action: What was done, or would be in a dry run.
        mended: Whether it is in order now: what stays broken is left as it was.
    """

    folder: Path
    defect: str
    action: str
    mended: bool = True


def repair_runs(
    folders: Iterable[RunFolder], *, tracking_uri: str | None = None, dry_run: bool = False
) -> Iterator[Repair]:
    """Repair run folders, and yield each defect when it is dealt with; a folder that is in use is left alone.

    Args:
        folders: The run folders.
        tracking_uri: Where MLflow's copies are fetched from; the run's own where it is None.
        dry_run: Change nothing.
    """
    for folder in folders:
        try:
            with FileLock(folder.lock, timeout=0), nobody_saves(folder) as free:
                if not free:
                    raise Timeout(str(folder.saving))
                if not dry_run:
                    yield from _Repairer(folder, tracking_uri, dry_run=False).run()
            if dry_run:
                # A run that is about to start must not find the folder taken by somebody who only looks.
                yield from _Repairer(folder, tracking_uri, dry_run=True).run()
        except Timeout:
            yield Repair(folder.path, "a process holds its lock: it trains, or another command works on it", LEFT_ALONE)
        except OSError as error:
            yield Repair(folder.path, f"it cannot be repaired: {error}", "left as it is", mended=False)


class _Repairer:
    """Repairs one run folder, whose lock the caller holds."""

    def __init__(self, folder: RunFolder, tracking_uri: str | None, *, dry_run: bool) -> None:
        self._folder = folder
        self._tracking_uri = tracking_uri
        self._dry_run = dry_run

    def run(self) -> Iterator[Repair]:
        yield from self._temporaries()
        yield from self._torn_lines()
        self._ledger = CheckpointLedger()
        for event in json_lines.read_lines(self._folder.events)[0]:
            self._ledger.apply(event)
        for episode in self._episodes():
            yield from self._checkpoint(episode)
        yield from self._record()
        yield from self._agreement()
        yield from self._orphans()

    def _do(self, defect: str, action: str, step: Callable[[], object]) -> Repair:
        if not self._dry_run:
            step()
        return Repair(self._folder.path, defect, f"would be {action}" if self._dry_run else action)

    def _temporaries(self) -> Iterator[Repair]:
        for path in temporaries(self._folder.path):
            yield self._do(f"{path.name} was never finished", "removed", partial(discard_temporary, self._folder, path))
        for path in self._folder.path.glob(f"{FETCH_PREFIX}*"):
            if path.is_dir() and not path.is_symlink():
                yield self._do(f"{path.name} was never finished", "removed", partial(shutil.rmtree, path))

    def _torn_lines(self) -> Iterator[Repair]:
        for path in (self._folder.metrics, self._folder.events):
            if json_lines.is_torn(path):
                yield self._do(f"the last line of {path.name} is torn", "closed", partial(json_lines.close_line, path))

    def _episodes(self) -> list[int]:
        names = os.listdir(self._folder.path)
        found = {episode for name in names for episode in (model_episode(name), metadata_episode(name))}
        return sorted(episode for episode in found if episode is not None)

    def _checkpoint(self, episode: int) -> Iterator[Repair]:
        zip_path, metadata_file = self._folder.model(episode), self._folder.metadata(episode)
        if not metadata_file.exists():
            yield from self._adopt(episode, f"{zip_path.name} has no metadata")
            return
        try:
            described = read_metadata(zip_path, settle=False)
        except _DAMAGE as error:
            if _unreadable(error):
                yield self._left(error)
            elif zip_path.is_file():
                yield from self._adopt(episode, f"the metadata of {zip_path.name} is damaged ({_cause(error)})")
            else:
                yield self._aside(f"{metadata_file.name} is damaged and has no zip", [metadata_file])
            return
        try:
            metadata = verify_checkpoint(zip_path)
        except _DAMAGE as error:
            if _unreadable(error):
                yield self._left(error)
                return
            yield from self._fetch(episode, described, f"{zip_path.name}: {_cause(error)}")
            return
        if replacement_of(described) is not None:
            content = metadata.to_bytes()
            yield self._do(
                f"{zip_path.name} was being replaced", "settled", lambda: atomic.write_bytes(metadata_file, content)
            )

    def _adopt(self, episode: int, defect: str) -> Iterator[Repair]:
        zip_path, metadata_file = self._folder.model(episode), self._folder.metadata(episode)
        try:
            metadata = self._metadata_of_zip(episode)
        except _DAMAGE as error:
            if _unreadable(error):
                yield self._left(error)
                return
            if isinstance(error, ForeignCheckpointError) and _is_of_sb3(zip_path):
                return  # Somebody put it there: nothing lists it.
            # The metadata first: that withdraws the commit.
            there = [path for path in (metadata_file, zip_path) if path.exists()]
            yield self._aside(f"{defect}, and it does not verify ({_cause(error)})", there)
            return

        def adopt() -> None:
            if metadata_file.exists():
                self._move_aside([metadata_file])
            # Not under the temporary name of metadata, which says that its zip is nobody's.
            with atomic.staged(self._folder.adopted) as (file, temporary):
                file.write(metadata.to_bytes())
            atomic.commit(temporary, metadata_file)

        yield self._do(defect, "taken up: its metadata is written from what the zip holds", adopt)

    def _metadata_of_zip(self, episode: int) -> CheckpointMetadata:
        zip_path = self._folder.model(episode)
        metadata = read_embedded_metadata(zip_path, check_members=True)
        if (metadata.agent_id, metadata.run_id, metadata.episode) != (
            self._folder.agent_id,
            self._folder.run_id,
            episode,
        ):
            raise CheckpointError("it belongs to another checkpoint")
        files = [FileEntry(name=zip_path.name, bytes=zip_path.stat().st_size, sha256=atomic.sha256(zip_path))]
        chunks = (read_part(zip_path, "replay") or {}).get("chunks") or ()
        for chunk in chunks:
            try:
                entry = FileEntry(name=chunk_entry(chunk["name"]), bytes=chunk["bytes"], sha256=chunk["sha256"])
            except (TypeError, KeyError, ValueError) as error:
                raise CheckpointError("its replay buffer is described wrongly") from error
            path = self._folder.chunk(chunk["name"])
            if not path.is_file() or atomic.sha256(path) != entry.sha256:
                raise CheckpointError(f"its file {entry.name} is missing or altered")
            files.append(entry)
        return metadata.model_copy(update={"files": files})

    def _fetch(self, episode: int, metadata: CheckpointMetadata, defect: str) -> Iterator[Repair]:
        """Fetch what a checkpoint lacks from MLflow where it has that very content; set it aside where it has not."""
        uri = self._ledger.uris.get(episode)
        there = [path for path in (self._folder.metadata(episode), self._folder.model(episode)) if path.exists()]
        if uri is None:
            yield self._aside(f"{defect}, and MLflow has no copy", there)
            return
        if self._dry_run:
            yield Repair(self._folder.path, defect, f"would be fetched from {uri}")
            return
        from sb3_mlflow_ckpt.mirrors.artifacts import download_checkpoint

        # Within the run folder: what was fetched is put in place by a rename.
        with tempfile.TemporaryDirectory(prefix=FETCH_PREFIX, dir=self._folder.path) as download:
            try:
                found = download_checkpoint(uri, Path(download), self._address()).path
            except MirrorUnavailableError as error:
                if not error.refused:
                    yield Repair(self._folder.path, defect, f"left as it is: {error}", mended=False)
                    return
                yield self._aside(f"{defect}, and MLflow has no copy", there)
                return
            except _DAMAGE as error:
                yield self._aside(f"{defect}, and MLflow's copy is of no use ({_cause(error)})", there)
                return
            if read_metadata(found).files != metadata.files:
                yield self._aside(f"{defect}, and MLflow's copy is another one", there)
                return
            yield self._do(defect, f"fetched from {uri}", lambda: self._put(found, metadata))

    def _put(self, found: Path, metadata: CheckpointMetadata) -> None:
        for entry in metadata.files:
            chunk = entry_chunk(entry.name)
            path = self._folder.model(metadata.episode) if chunk is None else self._folder.chunk(chunk)
            if path.is_file() and atomic.sha256(path) == entry.sha256:
                continue
            if path.exists():
                self._move_aside([path])
            path.parent.mkdir(exist_ok=True)
            source = found if chunk is None else found.parent / entry.name
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            atomic.commit(source, path)

    def _address(self) -> str | None:
        if self._tracking_uri is not None:
            return self._tracking_uri
        try:
            known = (read_record(self._folder).get("mlflow") or {}).get("tracking_uri")
        except (CheckpointError, AttributeError):
            return None
        return known if known and "***" not in known else None

    def _record(self) -> Iterator[Repair]:
        record = self._folder.record
        try:
            if read_record(self._folder).get("run_id"):
                return
            defect = "run.json does not say whose it is"
        except CheckpointError as error:
            if _unreadable(error):
                yield self._left(error)
                return
            defect = f"run.json: {_cause(error)}" if record.exists() else "run.json is missing"
        rebuilt = rebuilt_record(self._folder, self._ledger, damaged=os.path.lexists(record))
        if rebuilt is None:
            # Checkpoints of `save_checkpoint` have no run; without any there is nothing to make a record from.
            if os.path.lexists(record):
                yield self._aside(f"{defect}, and no checkpoint is there to rebuild it from", [record])
            return

        def write() -> None:
            if os.path.lexists(record):
                self._move_aside([record])
            atomic.write_bytes(record, atomic.dump_json(rebuilt))

        yield self._do(defect, "rebuilt from the checkpoints and the learning curve", write)

    def _agreement(self) -> Iterator[Repair]:
        """Make the ledger agree with the folder."""
        if not self._folder.record.exists():
            return
        on_disk = committed_episodes(self._folder)
        for episode in on_disk:
            try:
                facts = saved_facts(read_metadata(self._folder.model(episode)))
            except _DAMAGE:
                continue  # It was told of already.
            known = self._ledger.saved.get(episode)
            if known is None or episode in self._ledger.pruned or known.get("sha256") != facts["sha256"]:
                # `adopted`: its place among the commits is by its timestamp, not by this line's.
                event = {"event": "saved", **facts, "adopted": True}
                yield self._note(f"checkpoints.jsonl does not tell of episode {episode}", event)
        for episode in sorted(set(self._ledger.saved) - set(on_disk) - self._ledger.pruned):
            event = {"event": "pruned", "episode": episode, "time": timestamp_now()}
            yield self._note(f"checkpoints.jsonl still tells of episode {episode}", event)

    def _note(self, defect: str, event: dict[str, object]) -> Repair:
        def write() -> None:
            json_lines.append_line(self._folder.events, event)
            self._ledger.apply(event)

        return self._do(defect, "noted", write)

    def _orphans(self) -> Iterator[Repair]:
        if self._dry_run:
            names = ChunkSweeper(self._folder).orphans()
            yield from (Repair(self._folder.path, f"no checkpoint needs {name}", "would be removed") for name in names)
            return
        swept = [*ChunkSweeper(self._folder).sweep()]
        yield from (Repair(self._folder.path, f"no checkpoint needs {name}", "removed") for name in swept)
        for episode in (*sweep_pins(self._folder), *sweep_leases(self._folder)):
            yield Repair(self._folder.path, f"a marker of episode {episode}, which is gone", "removed")

    def _left(self, error: BaseException) -> Repair:
        """What cannot be read now may be whole: only what was read and is wrong is taken out of use."""
        return Repair(self._folder.path, f"it cannot be read: {_cause(error)}", "left as it is", mended=False)

    def _aside(self, defect: str, paths: list[Path]) -> Repair:
        return self._do(defect, f"set aside in {self._folder.set_aside.name}", lambda: self._move_aside(paths))

    def _move_aside(self, paths: list[Path]) -> None:
        aside = self._folder.set_aside
        if aside.is_symlink():
            raise OSError(f"{aside} is a symbolic link")
        aside.mkdir(exist_ok=True)
        for path in paths:
            number, target = 0, self._folder.aside(path.name)
            while os.path.lexists(target):
                number += 1
                target = self._folder.aside(path.name, number)
            path.replace(target)
            atomic.fsync_dir(aside)
            atomic.fsync_dir(path.parent)


def _unreadable(error: BaseException) -> bool:
    """Return whether the disk or a right refused the reading; what it holds is not known then."""
    beneath = error.__cause__ if isinstance(error, CheckpointError) else error
    return isinstance(beneath, OSError) and beneath.errno not in _NOT_THERE


def _is_of_sb3(path: Path) -> bool:
    """Return whether a zip is one of SB3's `save`; of a torn one, a member that is a zip itself may be found."""
    try:
        with zipfile.ZipFile(path) as file:
            return "data" in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _cause(error: BaseException) -> str:
    return str(getattr(error, "cause", None) or error)
