"""Owns checkpoints as artifacts of an MLflow run: what is sent, in which order, and what retention removes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import ARTIFACT_FOLDER, REPLAY_FOLDER, chunk_entry
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.policies import KeepLastN

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
    """

    def __init__(self, client: MlflowClient, run: Run, uri: str, retention: KeepLastN) -> None:
        self._client = client
        self._run = run
        self._uri = uri
        self._retention = retention
        self._sent_chunks: set[str] | None = None

    def send(self, journal: RunJournal) -> None:
        """Send the checkpoints that wait."""
        client, run_id = self._client, self._run.info.run_id
        for episode in sorted(journal.waiting_for_mirror()):
            model, metadata = journal.folder.model(episode), journal.folder.metadata(episode)
            if not (model.exists() and metadata.exists()):
                continue  # Pruned meanwhile: the backlog was longer than its limit.
            saved = journal.ledger.saved[episode]
            sha256 = saved.get("sha256")
            self._send_chunks(journal, saved.get("replay", ()))
            # Zip first, metadata last, a file at a time: the mirror has the disk's commit protocol.
            client.log_artifact(run_id, str(model), ARTIFACT_FOLDER)
            client.log_artifact(run_id, str(metadata), ARTIFACT_FOLDER)
            artifact = f"{ARTIFACT_FOLDER}/{model.name}"
            client.set_tag(run_id, LATEST_TAG, artifact)
            journal.add_mirrored(episode, f"runs:/{run_id}/{artifact}", sha256)

    def prune(self, journal: RunJournal) -> None:
        """Remove the copies that are too old, and the chunks that no copy needs any more."""
        removable = self._retention.removable(list(journal.ledger.uris))
        if not removable:
            return
        repository = self._repository()
        for episode in removable:
            for path in (journal.folder.metadata(episode), journal.folder.model(episode)):
                try:
                    _delete(repository, path.name)
                except NotImplementedError:
                    logger.warning("This artifact store cannot delete: mlflow_keep_last_n_checkpoints keeps all")
                    self._retention = KeepLastN(0)
                    return
            journal.add_unmirrored(episode)
        ledger = journal.snapshot()
        named = {e: set(ledger.saved[e].get("replay", ())) for e in ledger.saved}
        gone = set().union(*(named[episode] for episode in removable if episode in named))
        kept = set().union(*(named[e] for e in {*ledger.uris, *ledger.waiting} if e in named))
        if gone - kept:
            known = self._known_chunks()
            for name in known - kept:
                _delete(repository, chunk_entry(name))
            known &= kept

    def _send_chunks(self, journal: RunJournal, names: Iterable[str]) -> None:
        for name in names:
            sent = self._known_chunks()
            if name not in sent:
                path = f"{ARTIFACT_FOLDER}/{chunk_entry(name)}"
                chunk = str(journal.folder.chunk(name))
                self._client.log_artifact(self._run.info.run_id, chunk, path.rpartition("/")[0])
                sent.add(name)

    def _known_chunks(self) -> set[str]:
        """Return the chunks that MLflow has; an earlier process may have sent some."""
        if self._sent_chunks is None:
            files = self._client.list_artifacts(self._run.info.run_id, f"{ARTIFACT_FOLDER}/{REPLAY_FOLDER}")
            self._sent_chunks = {file.path.rpartition("/")[2] for file in files}
        return self._sent_chunks

    def _repository(self) -> ArtifactRepository:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(self._run.info.artifact_uri, tracking_uri=self._uri)


def _delete(repository: ArtifactRepository, file: str) -> None:
    repository.delete_artifacts(f"{ARTIFACT_FOLDER}/{file}")  # type: ignore[no-untyped-call]
