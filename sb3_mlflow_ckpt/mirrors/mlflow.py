"""Owns the copy of a run in MLflow: parameters, metrics, tags, status, and each checkpoint as an artifact.

Uses `MlflowClient` with an explicit run id throughout: the fluent API in a thread would silently make a stray run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import ARTIFACT_FOLDER
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.inspection import Inspection, missing_metrics
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.mirrors.patience import Patience, answering, quick_requests, unavailable
from sb3_mlflow_ckpt.mirrors.record_copy import RecordCopy
from sb3_mlflow_ckpt.mirrors.tracked_run import TrackedRun
from sb3_mlflow_ckpt.mirrors.uploads import Uploads, latest_artifact
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.replication import MirroredJournal
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)


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
        keep_best_n: Checkpoints of the highest mean reward that are kept beside them.
        keep_every_n_episodes: The first checkpoint at or after each multiple of it is kept as well; 0 is none.
        parent_run_id: An MLflow run below which the training's own is made, or found where it was made before; the
            run that is active in this process is no concern of it then.
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
        keep_best_n: int = 0,
        keep_every_n_episodes: int = 0,
        parent_run_id: str | None = None,
    ) -> None:
        self._target = TrackedRun(tracking_uri, experiment_name, run_id, parent_run_id)
        self._retention = Retention(keep_last_n, keep_best_n, keep_every_n_episodes)
        self._patience = Patience()
        self._trains = False
        # A request of an earlier training that still hangs must not meet one of the next.
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._target.forget()
        self._forget_sent()

    def _forget_sent(self) -> None:
        self._uploads: Uploads | None = None
        self._copy: RecordCopy | None = None

    def blueprint(self) -> dict[str, Any] | None:
        """Return what makes this mirror in another process, once its run is known (`mirror_process`)."""
        # A class of the user's own does what that process knows nothing of; a database in memory is nobody else's.
        uri = self._target.uri_elsewhere
        if type(self) is not MLflowMirror or self._target.run is None or uri is None:
            return None
        kept = self._retention
        return {
            "kind": "mlflow",
            "tracking_uri": uri,
            "experiment_name": self._target.experiment_name,
            "run_id": self._target.run.info.run_id,
            "owned": self._target.owned,
            "keep": [kept.last_n, kept.best_n, kept.every_n_episodes],
        }

    @classmethod
    def from_blueprint(cls, blueprint: Mapping[str, Any]) -> MLflowMirror:
        """Return the mirror of a run that another process has opened."""
        last, best, every = blueprint["keep"]
        mirror = cls(
            blueprint["tracking_uri"],
            blueprint["experiment_name"],
            run_id=blueprint["run_id"],
            keep_last_n=last,
            keep_best_n=best,
            keep_every_n_episodes=every,
        )
        mirror._trains, mirror._target.owned = True, bool(blueprint["owned"])
        return mirror

    def take_back(self) -> None:
        """Forget what was sent from here, not which run it is: another process has sent since."""
        with self._lock:
            self._forget_sent()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it is known."""
        return self._target.run_id

    @property
    def address(self) -> str:
        """Where MLflow is, without credentials."""
        return redact(self._target.uri)

    def open(self, record: Mapping[str, Any]) -> str | None:
        """Find or make the MLflow run.

        Returns:
            Its id.

        Raises:
            MirrorUnavailableError: MLflow does not answer within seconds, or refuses.
        """
        self._patience.take()
        self._trains = True
        if self._target.run is None or not record.get("run_id"):
            self._forget()
            self._target.choose()
        try:
            with quick_requests():
                self._target.connect(record)
        except Exception as error:
            # mlflow raises its own, requests', sqlalchemy's and OS errors alike. Not chained: their messages may
            # quote the address with its password.
            raise unavailable(error, self._target.uri) from None
        return self.run_id

    def describe(self) -> dict[str, Any]:
        """Return where the run is tracked, or is to be once MLflow answers; without credentials."""
        return {"mlflow": self._target.describe()}

    def earlier(self) -> dict[str, Any]:
        """Return the number that follows the one of the attempt that MLflow knows, and when that run began."""
        tags = self._target.run.data.tags if self._target.run is not None else {}
        attempt = naming.attempt_of(tags)
        if attempt is None:
            return {}
        known = {"attempt": attempt + 1}
        started = tags.get(naming.STARTED_TAG)
        return known | {"started_at": started} if naming.milliseconds(started) is not None else known

    def replicate(self, journal: MirroredJournal) -> None:
        """Send everything that MLflow lacks: the run, checkpoints, parameters, tags, metrics, then the status."""
        with self._lock:
            self._patience.take()
            for _ in self._replicate(journal):
                pass

    def heal(self, journal: RunJournal, *, verify: bool = False) -> Iterator[str]:
        """Compare MLflow with the folder, and send what it lacks or has otherwise, whatever the ledger says.

        A run that was deleted is restored; one that is gone for good is made anew. Copies that retention removed are
        not sent again. What a later attempt at another machine has taken over is left as it is there.

        Args:
            journal: The run.
            verify: Whether to download and hash zips and chunks.

        Yields:
            What was changed, a line each, when it is done: what comes after it may fail.
        """
        with self._lock, answering(self._target.uri):
            self._patience.take()
            self._forget()
            yield from self._target.heal(journal.record)
            client, run, uploads, copy = self._connect(journal)
            if copy.superseded(journal.record):
                return
            yield from Inspection(uploads, journal, verify=verify, moved=self._target.moved).run()
            if missing := missing_metrics(client, run.info.run_id, journal):
                copy.log_metrics([[metric] for metric in missing])
                yield f"{len(missing)} values of the learning curve were missing: they are sent"
            yield from self._replicate(journal, healing=True)
            latest = latest_artifact(journal)
            if latest is not None and client.get_run(run.info.run_id).data.tags.get(LATEST_TAG) != latest:
                client.set_tag(run.info.run_id, LATEST_TAG, latest)
                yield f"the tag {LATEST_TAG} is set"

    def _connect(self, journal: MirroredJournal) -> tuple[MlflowClient, Run, Uploads, RecordCopy]:
        record = journal.record
        client, run = self._target.connect(record)
        known = record.get("mlflow") or {}
        if known.get("run_id") != run.info.run_id:
            # Where copies may lie that the folder does not hold any more.
            before = {"mlflow_before": known} if known.get("run_id") else {}
            journal.update(**before, **self.describe())
        if self._uploads is None or self._copy is None:
            self._uploads = Uploads(client, run, self._target.uri, self._retention)
            self._copy = RecordCopy(client, run, owned=self._target.owned, trains=self._trains)
        return client, run, self._uploads, self._copy

    def _replicate(self, journal: MirroredJournal, *, healing: bool = False) -> Iterator[str]:
        """Send what MLflow is not known to have; yield what that was, a line each."""
        _, _, uploads, copy = self._connect(journal)
        record = journal.record
        if copy.superseded(record):
            return
        for name in copy.send_tags(record, healing):
            yield f"the tag {name} is set"
        for name in uploads.send(journal):
            yield f"{ARTIFACT_FOLDER}/{name} is sent"
        for name in copy.send_params(record):
            yield f"the parameter {name} is sent"
        copy.send_metrics(journal)
        uploads.prune(journal)
        if status := copy.send_status(record):
            yield f"the status is set to {status}"

    def tell_end(self, record: Mapping[str, Any]) -> None:
        """End the MLflow run, beside a request that hangs."""
        from mlflow import MlflowClient

        status, run = str(record["status"]), self._target.run
        if run is not None and self._target.owned and status in TERMINAL_STATUSES:
            client = MlflowClient(tracking_uri=self._target.uri)
            if naming.is_later(naming.attempt_of(client.get_run(run.info.run_id).data.tags), record):
                return
            end = naming.milliseconds(record.get("ended_at"))
            client.set_terminated(run.info.run_id, naming.STATUS[status], end_time=end)

    def cancel(self, status: str) -> None:
        """End a run that `open` made: nothing will be trained under it."""
        if self._target.created and self._target.run is not None:
            try:
                with quick_requests():
                    self._target.client.set_terminated(self._target.run.info.run_id, naming.STATUS[status])
            except Exception as error:
                logger.debug("MLflow was not told that the run will not train", exc_info=error)
        self._forget()
        self.close()

    def close(self) -> None:
        """Give MLflow's settings back to the caller; its client keeps no connection."""
        self._patience.give_back()
