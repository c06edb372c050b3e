"""Owns checkpoints as artifacts of an MLflow run: what is sent, in which order, and what retention removes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.atomic import is_own_file
from sb3_mlflow_ckpt.layout import ARTIFACT_FOLDER, REPLAY_FOLDER, chunk_entry
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.pins import is_pinned
from sb3_mlflow_ckpt.policies import Retention, SavedCheckpoint
from sb3_mlflow_ckpt.replication import MirroredJournal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

logger = logging.getLogger(__name__)


class Uploads:
    """The checkpoints of one MLflow run.

    Args:
        client: Its server's client.
        run: The run.
        uri: The tracking URI.
        retention: Which copies stay.

    Attributes:
        files: What MLflow has, names as metadata gives them -> bytes; asked for once, since an earlier process may
            have sent some, and kept up to date by what is sent and removed here.
    """

    def __init__(self, client: MlflowClient, run: Run, uri: str, retention: Retention) -> None:
        self.run_id = str(run.info.run_id)
        self._client = client
        self._artifact_uri = run.info.artifact_uri
        self._uri = uri
        self._retention = retention
        # Whether something was sent since the newest was last named.
        self._untagged = False

    @cached_property
    def files(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for folder in (ARTIFACT_FOLDER, f"{ARTIFACT_FOLDER}/{REPLAY_FOLDER}"):
            for file in self._client.list_artifacts(self.run_id, folder):
                if not file.is_dir:
                    found[file.path.removeprefix(f"{ARTIFACT_FOLDER}/")] = file.file_size
        return found

    def send(self, journal: MirroredJournal) -> Iterator[str]:
        """Send the checkpoints that wait; yield the name of each."""
        for episode in sorted(journal.waiting_for_mirror()):
            model, metadata = journal.folder.model(episode), journal.folder.metadata(episode)
            if not (model.exists() and metadata.exists()):
                continue  # Pruned meanwhile: the backlog was longer than its limit.
            if not all(is_own_file(path) for path in (model, metadata)):
                logger.warning("%s is not sent: it, or its metadata, is a link to something else", model)
                continue
            saved = journal.ledger.saved[episode]
            sha256 = saved.get("sha256")
            # Of another content under this name: while the zip is sent, nobody must take it for whole.
            self.withdraw(metadata.name)
            try:
                for name in saved.get("replay", ()):
                    if not self._has(journal.folder.chunk(name), chunk_entry(name)) and _is_own_chunk(journal, name):
                        self.withdraw(chunk_entry(name))
                        self._put(journal.folder.chunk(name), chunk_entry(name))
                # Zip first, metadata last, a file at a time: the mirror has the disk's commit protocol.
                self._put(model, model.name)
                self._put(metadata, metadata.name)
            except FileNotFoundError:
                if metadata.exists():
                    raise
                self.withdraw(model.name)
                continue  # Pruned while it was sent.
            journal.add_mirrored(episode, f"runs:/{self.run_id}/{ARTIFACT_FOLDER}/{model.name}", sha256)
            self._untagged = True
            yield model.name
        if self._untagged and (latest := latest_artifact(journal)) is not None:
            self._client.set_tag(self.run_id, LATEST_TAG, latest)
            self._untagged = False

    def prune(self, journal: MirroredJournal) -> None:
        """Remove the copies that are too old, and the chunks that no copy needs any more."""
        if self._retention.keeps_all:
            return
        before = journal.in_mirror()
        copies = [SavedCheckpoint(e, before.saved[e].get("mean_reward")) for e in before.saved if e in before.uris]
        # Asked of those alone that are to go: a folder may hold thousands.
        removable = [e for e in self._retention.removable(copies) if not is_pinned(journal.folder.model(e))]
        if not removable:
            return
        for episode in removable:
            try:
                self._remove(path.name for path in (journal.folder.metadata(episode), journal.folder.model(episode)))
            except NotImplementedError:
                logger.warning("This artifact store cannot delete: mlflow_keep_last_n_checkpoints keeps all")
                self._retention = Retention(0)
                return
            journal.add_unmirrored(episode, before.saved[episode].get("sha256"))
        gone = _chunks(before.saved[episode] for episode in removable)
        if not gone:
            return
        kept = _chunks(journal.in_mirror().saved.values())
        if gone - kept:
            chunks = {name for name in self.files if name.startswith(f"{REPLAY_FOLDER}/")}
            self._remove(sorted(chunks - {chunk_entry(name) for name in kept}))

    def withdraw(self, name: str) -> None:
        """Remove a file if MLflow has it and the store can; what is sent next takes its place."""
        if name in self.files:
            with suppress(NotImplementedError):
                self._remove([name])

    def get(self, name: str, folder: Path) -> Path:
        """Download a file into a folder."""
        return Path(self._client.download_artifacts(self.run_id, f"{ARTIFACT_FOLDER}/{name}", str(folder)))

    def _has(self, path: Path, name: str) -> bool:
        """Tell whether MLflow has a file that never changes, and not what an upload that was cut left of it."""
        if name not in self.files:
            return False
        try:
            # Some stores do not say how much they have.
            return self.files[name] in (None, path.lstat().st_size)
        except FileNotFoundError:
            return True

    def _put(self, path: Path, name: str) -> None:
        folder = f"{ARTIFACT_FOLDER}/{name}".rpartition("/")[0]
        self._link(path, folder)
        self._client.log_artifact(self.run_id, str(path), folder)
        self.files[name] = path.stat().st_size if path.exists() else None

    def _link(self, path: Path, folder: str) -> None:
        """Give a file a second name in a store on the same file system, where MLflow finds that it has it.

        Neither side ever writes to a file in place: each replaces it by another, or removes its own name of it.
        """
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        if not isinstance(self._repository, LocalArtifactRepository):
            return
        target = Path(self._repository.artifact_dir) / folder / path.name
        # Another file system, or one without links, or the name is taken: then MLflow copies.
        with suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target, follow_symlinks=False)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._repository.delete_artifacts(f"{ARTIFACT_FOLDER}/{name}")  # type: ignore[no-untyped-call]
            self.files.pop(name, None)

    @cached_property
    def _repository(self) -> ArtifactRepository:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self._artifact_uri, tracking_uri=self._uri)


def _is_own_chunk(journal: MirroredJournal, name: str) -> bool:
    return is_own_file(journal.folder.chunk(name)) and not journal.folder.replay.is_symlink()


def latest_artifact(journal: MirroredJournal) -> str | None:
    """Return the artifact of the newest checkpoint that MLflow has."""
    episode = journal.newest_mirrored()
    return None if episode is None else f"{ARTIFACT_FOLDER}/{journal.folder.model(episode).name}"


def _chunks(saved: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the replay chunks that some checkpoints need."""
    return {name for facts in saved for name in facts.get("replay", ())}
