"""Owns the comparison of MLflow with a run folder, for `checkpoints sync`: training itself believes its ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sb3_mlflow_ckpt import atomic, json_lines
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import ARTIFACT_FOLDER, REPLAY_FOLDER
from sb3_mlflow_ckpt.leaving import temporary_folder
from sb3_mlflow_ckpt.ledger import CheckpointLedger
from sb3_mlflow_ckpt.metadata import FileEntry, parse_metadata
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.uploads import Uploads

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


class Inspection:
    """Finds which of a run's checkpoints MLflow does not have as the folder's ledger says, and notes that there.

    Args:
        uploads: The checkpoints in MLflow.
        journal: The run.
        verify: Whether to download and hash zips and chunks; sizes and the metadata's content are always compared.
        moved: Whether the run was tracked elsewhere before: what the folder does not hold may still be there.
    """

    def __init__(self, uploads: Uploads, journal: RunJournal, *, verify: bool, moved: bool = False) -> None:
        self._uploads = uploads
        self._journal = journal
        self._verify = verify
        self._moved = moved
        # A chunk is shared by checkpoints and is looked at once.
        self._problems: dict[str, str | None] = {}

    def run(self) -> list[str]:
        """Make the ledger say what is so; return what it had wrong, a line each."""
        lines, ledger = [], self._journal.snapshot()
        for episode, uri in ledger.uris.items():
            if self._moved and episode in ledger.pruned:
                continue
            problem = self._problem_of(ledger, episode, uri)
            if problem is not None:
                lines.append(self._forget(ledger, episode, problem))
        for episode in sorted((set(ledger.saved) & ledger.pruned) - set(ledger.uris) - ledger.retired):
            # A crash came between the upload and its line, or the artifacts were away for a while.
            artifact = f"{ARTIFACT_FOLDER}/{self._journal.folder.model(episode).name}"
            uri = f"runs:/{self._uploads.run_id}/{artifact}"
            if self._problem_of(ledger, episode, uri) is None:
                self._journal.add_mirrored(episode, uri, ledger.saved[episode].get("sha256"))
                lines.append(f"{artifact} is there, and was not known")
        return lines

    def _forget(self, ledger: CheckpointLedger, episode: int, problem: str) -> str:
        folder, uploads = self._journal.folder, self._uploads
        if episode not in ledger.pruned:
            # It is sent again: what no longer counts must not stand where the new is expected.
            uploads.withdraw(folder.metadata(episode).name)
            for name, found in self._problems.items():
                if found is not None and name.startswith(f"{REPLAY_FOLDER}/"):
                    uploads.files.pop(name, None)
        self._journal.add_missing(episode)
        line = f"{ARTIFACT_FOLDER}/{folder.model(episode).name}: {problem}"
        return line if episode not in ledger.pruned else f"{line}; the folder does not hold it any more, so it is lost"

    def _problem_of(self, ledger: CheckpointLedger, episode: int, uri: str) -> str | None:
        if not uri.startswith(f"runs:/{self._uploads.run_id}/"):
            return "it is in another run"
        saved, local = ledger.saved.get(episode, {}), self._journal.folder.metadata(episode)
        name, metadata_name = self._journal.folder.model(episode).name, local.name
        for file in (name, metadata_name):
            if file not in self._uploads.files:
                return f"{file} is missing" if file != name else "it is missing"
        with temporary_folder() as folder:
            content = self._uploads.get(metadata_name, folder).read_bytes()
        if episode not in ledger.pruned and local.exists() and content != local.read_bytes():
            return f"{metadata_name} has another content"
        try:
            files = parse_metadata(content, metadata_name).files
        except CheckpointError:
            return f"{metadata_name} is not the metadata of a checkpoint"
        if saved.get("sha256") is not None and (not files or files[0].sha256 != saved["sha256"]):
            return f"{metadata_name} is that of another content"
        return next(self._file_problems(files), None)

    def _file_problems(self, files: Iterable[FileEntry]) -> Iterator[str]:
        for entry in files:
            if entry.name not in self._problems:
                self._problems[entry.name] = self._file_problem(entry)
            problem = self._problems[entry.name]
            if problem is not None:
                yield problem

    def _file_problem(self, entry: FileEntry) -> str | None:
        if entry.name not in self._uploads.files:
            return f"{entry.name} is missing"
        size = self._uploads.files[entry.name]
        if size is not None and size != entry.bytes:
            return f"{entry.name} has {size} bytes, not {entry.bytes}"
        if self._verify:
            with temporary_folder() as folder:
                if atomic.sha256(self._uploads.get(entry.name, folder)) != entry.sha256:
                    return f"{entry.name} has other bytes"
        return None


def missing_metrics(client: MlflowClient, run_id: str, journal: RunJournal) -> list[Metric]:
    """Return the values of the learning curve that a run in MLflow lacks, in their order."""
    expected = [m for point in json_lines.read_lines(journal.folder.metrics)[0] for m in naming.metrics(point)]
    present = {
        (key, metric.step, metric.timestamp, metric.value)
        for key in {metric.key for metric in expected}
        for metric in client.get_metric_history(run_id, key)
    }
    return [m for m in expected if (m.key, m.step, m.timestamp, m.value) not in present]
