"""Owns the copy of a run in MLflow: parameters, metrics, tags, status, and each checkpoint as an artifact.

Uses `MlflowClient` with an explicit run id throughout: the fluent API in a thread would silently make a stray run.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import ARTIFACT_FOLDER, REPLAY_FOLDER, chunk_entry
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.policies import KeepLastN
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

logger = logging.getLogger(__name__)

LATEST_TAG = "mlflow.latest_checkpoint_artifact"
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED")
"""MLflow's error codes of a server that answered, and said no."""
_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_METRICS_PER_BATCH = 900  # MLflow takes 1,000 of all kinds
_PARAMS_PER_BATCH = 100
# The runs that trainings of this process write to.
_claimed: set[str] = set()
# MLflow's own defaults retry for minutes; the replicator retries on its own schedule, off the training thread.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # It would print a line for every run that it ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}


@contextmanager
def quick_requests() -> Iterator[None]:
    """Make MLflow's requests fail within seconds: for the moments when a person waits."""
    before = {key: os.environ.get(key) for key in _IMPATIENCE}
    os.environ.update(_IMPATIENCE)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


class MLflowMirror:
    """Copies a run to MLflow.

    Continues the run that is active in this process or that `mlflow run` made; else makes one. A run that the
    caller's own `mlflow.start_run()` opened is left for the caller to end. A second training of the process does
    not mix with the first: it gets a run of its own below that one.

    Args:
        tracking_uri: MLflow's tracking URI; MLflow's own setting where it is None.
        experiment_name: The experiment of a new run; MLflow's own setting where it is None.
        run_id: An MLflow run to continue.
        keep_last_n: Checkpoints kept as artifacts; 0 keeps all.
    """

    name = "MLflow"
    stores_checkpoints = True

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        *,
        run_id: str | None = None,
        keep_last_n: int = 0,
    ) -> None:
        self._tracking_uri = tracking_uri
        self._experiment_name = experiment_name
        self._given_run_id = run_id
        self._retention = KeepLastN(keep_last_n)
        self._client: MlflowClient | None = None
        self._patience_set: list[str] = []
        self._trains = False
        # A request of an earlier training that still hangs must not meet one of the next.
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._run_id: str | None = None
        self._run: Run | None = None
        self._owned, self._created = True, False
        self._below: str | None = None
        self._sent_params = False
        self._sent_tags: dict[str, str] = {}
        self._sent_status: tuple[int, str] | None = None
        self._metrics_offset = 0
        self._metrics_until: int | None = None
        self._sent_chunks: set[str] | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it is known."""
        return self._run.info.run_id if self._run is not None else self._run_id

    def open(self, record: Mapping[str, Any]) -> str | None:
        """Find or make the MLflow run.

        Returns:
            Its id.

        Raises:
            MirrorUnavailableError: MLflow does not answer within seconds, or refuses.
        """
        self._be_patient()
        self._trains = True
        if self._run is None or not record.get("run_id"):
            self._forget()
            self._choose_run()
        try:
            with quick_requests():
                self._connect(record)
        except Exception as error:
            # mlflow raises its own, requests', sqlalchemy's and OS errors alike. Not chained: their messages may
            # quote the address with its password.
            raise unavailable(error, self._uri()) from None
        return self.run_id

    def describe(self) -> dict[str, Any]:
        """Return where the run is tracked, or is to be once MLflow answers; without credentials."""
        info = self._run.info if self._run is not None else None
        return {
            "mlflow": {
                "tracking_uri": redact(str(self._uri())),
                "experiment_name": self._experiment_name,
                "experiment_id": info.experiment_id if info is not None else None,
                "run_id": info.run_id if info is not None else None,
            }
        }

    def replicate(self, journal: RunJournal) -> None:
        """Send everything that MLflow lacks: the run, checkpoints, parameters, tags, metrics, then the status."""
        with self._lock:
            self._be_patient()
            self._replicate(journal)

    def _replicate(self, journal: RunJournal) -> None:
        record = journal.record
        client, run = self._connect(record)
        if (record.get("mlflow") or {}).get("run_id") != run.info.run_id:
            journal.update(**self.describe())
        self._send_tags(client, run, record)
        self._send_checkpoints(client, run, journal)
        self._send_params(client, run, record)
        self._send_metrics(client, run, journal)
        self._prune(client, run, journal)
        self._send_status(client, run, record)

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """End the MLflow run, beside a request that hangs."""
        from mlflow import MlflowClient

        status = str(record["status"])
        if self._run is not None and self._owned and status in TERMINAL_STATUSES:
            client = MlflowClient(tracking_uri=self._uri())
            end = naming.milliseconds(record.get("ended_at"))
            client.set_terminated(self._run.info.run_id, _STATUS[status], end_time=end)

    def cancel(self, status: str) -> None:
        """End a run that `open` made: nothing will be trained under it."""
        if self._created and self._client is not None and self._run is not None:
            try:
                with quick_requests():
                    self._client.set_terminated(self._run.info.run_id, _STATUS[status])
            except Exception as error:
                logger.debug("MLflow was not told that the run will not train", exc_info=error)
        self._forget()
        self.close()

    def close(self) -> None:
        """Give MLflow's settings back to the caller; its client keeps no connection."""
        while self._patience_set:
            os.environ.pop(self._patience_set.pop(), None)

    def _be_patient(self) -> None:
        for key, value in _PATIENCE.items():
            if key not in os.environ:
                os.environ[key] = value
                self._patience_set.append(key)

    def _choose_run(self) -> None:
        import mlflow

        active = mlflow.active_run()
        chosen: str | None = self._given_run_id
        if chosen is None and active is not None:
            chosen, self._owned = active.info.run_id, False
        elif chosen is None:
            chosen = os.environ.get("MLFLOW_RUN_ID") or None
        if chosen in _claimed and chosen != self._given_run_id:
            chosen, self._below, self._owned = None, chosen, True
        if chosen is not None:
            _claimed.add(chosen)
        self._run_id = chosen

    def _uri(self) -> str:
        import mlflow

        return self._tracking_uri or mlflow.get_tracking_uri()

    def _connect(self, record: Mapping[str, Any]) -> tuple[MlflowClient, Run]:
        from mlflow import MlflowClient

        if self._client is None:
            self._client = MlflowClient(tracking_uri=self._uri())
        if self._run is None:
            known = self._run_id or self._given_run_id or (record.get("mlflow") or {}).get("run_id")
            self._run = self._client.get_run(known) if known else self._run_of_folder(self._client, record)
            self._created = self._run is None
            if self._run is None:
                self._run = self._create_run(self._client, record)
        return self._client, self._run

    def _run_of_folder(self, client: MlflowClient, record: Mapping[str, Any]) -> Run | None:
        """Return the run that a folder is named after: a trainer may die before it has noted where it is tracked."""
        from mlflow.exceptions import MlflowException

        if not record.get("run_id"):
            return None
        try:
            return client.get_run(str(record["run_id"]))
        except MlflowException as error:
            if error.error_code in REFUSALS:
                return None
            raise

    def _create_run(self, client: MlflowClient, record: Mapping[str, Any]) -> Run:
        from mlflow.tracking.context.registry import resolve_tags

        tags = {str(key): str(value) for key, value in resolve_tags().items()}
        if self._below is not None:
            tags["mlflow.parentRunId"] = self._below
        git = record.get("git")
        if git:
            tags.setdefault("mlflow.source.git.commit", git["commit"])
        return client.create_run(
            self._experiment_id(client),
            start_time=naming.milliseconds(record.get("started_at")),
            tags=tags,
            run_name=record.get("name"),
        )

    def _experiment_id(self, client: MlflowClient) -> str:
        name = self._experiment_name
        if name is None:
            chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
            if chosen or not name:
                return chosen or "0"
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name))
            except Exception:
                # Another run that starts at the same moment may have made it.
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _send_params(self, client: MlflowClient, run: Run, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        if self._sent_params:
            return
        present = client.get_run(run.info.run_id).data.params
        params = []
        for key, value in naming.parameters(record.get("config") or {}).items():
            # Parameters cannot be changed: where `mlflow run` logged the text it was given (`inherit`, say),
            # what it came to stands beside it.
            name = key if key not in present or naming.same(present[key], value) else f"resolved.{key}"
            if name not in present:
                params.append(Param(name, value))
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=params[start : start + _PARAMS_PER_BATCH])
        self._sent_params = True

    def _send_tags(self, client: MlflowClient, run: Run, record: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = naming.tags(record)
        root = record.get("root_run_id")
        if root and root != record.get("run_id") and "mlflow.parentRunId" not in self._sent_tags:
            tags |= self._parent_tag(client, run, str(root))
        if not record.get("error") and naming.ERROR_TAG in run.data.tags:
            tags[naming.ERROR_TAG] = ""  # Of an attempt that failed before this one.
        fresh = {key: value for key, value in tags.items() if self._sent_tags.get(key) != value}
        if fresh:
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in fresh.items()])
            self._sent_tags |= fresh

    def _parent_tag(self, client: MlflowClient, run: Run, root: str) -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        if "mlflow.parentRunId" in run.data.tags:
            return {}
        try:
            client.get_run(root)
        except MlflowException as error:
            if error.error_code in REFUSALS:
                return {}  # The first run was trained without this server.
            raise
        # The root, not the parent: MLflow's list shows one level, so that a chain of resumes stays flat.
        return {"mlflow.parentRunId": root}

    def _send_metrics(self, client: MlflowClient, run: Run, journal: RunJournal) -> None:
        from sb3_mlflow_ckpt.atomic import read_lines

        if self._metrics_until is None:
            # An earlier process may have sent a part: what MLflow has says from where on to send.
            history = client.get_metric_history(run.info.run_id, naming.EPISODES_METRIC)
            self._metrics_until = max((metric.timestamp for metric in history), default=-1)
        points, offset = read_lines(journal.folder.metrics, self._metrics_offset)
        batch: list[Metric] = []
        for point in points:
            metrics = naming.metrics(point)
            if not metrics or metrics[0].timestamp <= self._metrics_until:
                continue
            if len(batch) + len(metrics) > _METRICS_PER_BATCH:
                client.log_batch(run.info.run_id, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            client.log_batch(run.info.run_id, metrics=batch)
        self._metrics_offset = offset
        if points:
            self._metrics_until = max(self._metrics_until, *(m.timestamp for m in naming.metrics(points[-1])[:1]), -1)

    def _send_checkpoints(self, client: MlflowClient, run: Run, journal: RunJournal) -> None:
        for episode in sorted(journal.waiting_for_mirror()):
            model, metadata = journal.folder.model(episode), journal.folder.metadata(episode)
            if not (model.exists() and metadata.exists()):
                continue  # Pruned meanwhile: the backlog was longer than its limit.
            saved = journal.ledger.saved[episode]
            sha256 = saved.get("sha256")
            self._send_chunks(client, run, journal, saved.get("replay", ()))
            # Zip first, metadata last, a file at a time: the mirror has the disk's commit protocol.
            client.log_artifact(run.info.run_id, str(model), ARTIFACT_FOLDER)
            client.log_artifact(run.info.run_id, str(metadata), ARTIFACT_FOLDER)
            artifact = f"{ARTIFACT_FOLDER}/{model.name}"
            client.set_tag(run.info.run_id, LATEST_TAG, artifact)
            journal.add_mirrored(episode, f"runs:/{run.info.run_id}/{artifact}", sha256)

    def _send_chunks(self, client: MlflowClient, run: Run, journal: RunJournal, names: Iterable[str]) -> None:
        for name in names:
            sent = self._known_chunks(client, run)
            if name not in sent:
                path = f"{ARTIFACT_FOLDER}/{chunk_entry(name)}"
                client.log_artifact(run.info.run_id, str(journal.folder.chunk(name)), path.rpartition("/")[0])
                sent.add(name)

    def _known_chunks(self, client: MlflowClient, run: Run) -> set[str]:
        """Return the chunks that MLflow has; an earlier process may have sent some."""
        if self._sent_chunks is None:
            files = client.list_artifacts(run.info.run_id, f"{ARTIFACT_FOLDER}/{REPLAY_FOLDER}")
            self._sent_chunks = {file.path.rpartition("/")[2] for file in files}
        return self._sent_chunks

    def _prune(self, client: MlflowClient, run: Run, journal: RunJournal) -> None:
        removable = self._retention.removable(list(journal.ledger.uris))
        if not removable:
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(run.info.artifact_uri, tracking_uri=self._uri())
        for episode in removable:
            for path in (journal.folder.metadata(episode), journal.folder.model(episode)):
                try:
                    repository.delete_artifacts(f"{ARTIFACT_FOLDER}/{path.name}")  # type: ignore[no-untyped-call]
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
            known = self._known_chunks(client, run)
            for name in known - kept:
                repository.delete_artifacts(f"{ARTIFACT_FOLDER}/{chunk_entry(name)}")  # type: ignore[no-untyped-call]
            known &= kept

    def _send_status(self, client: MlflowClient, run: Run, record: Mapping[str, Any]) -> None:
        status = str(record["status"])
        attempt_status = (int(record.get("attempt", 1)), status)
        if attempt_status == self._sent_status or not self._owned:
            return
        if status in TERMINAL_STATUSES:
            client.set_terminated(
                run.info.run_id, _STATUS[status], end_time=naming.milliseconds(record.get("ended_at"))
            )
        elif self._trains and (run.info.status != "RUNNING" or self._sent_status is not None):
            # Not by a sync: the record of a killed trainer says "running" for ever.
            client.update_run(run.info.run_id, status="RUNNING")
        self._sent_status = attempt_status


def unavailable(error: Exception, uri: str) -> MirrorUnavailableError:
    """Return the error for an MLflow that does not answer, or that says no."""
    refused = getattr(error, "error_code", None) in REFUSALS
    return MirrorUnavailableError("MLflow", redact(uri), redact(str(error)), refused=refused)
