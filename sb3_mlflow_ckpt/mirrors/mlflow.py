"""Owns the copy of a run in MLflow: parameters, metrics, tags, status, and each checkpoint as an artifact.

Uses `MlflowClient` with an explicit run id throughout: the fluent API in a thread would silently make a stray run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.patience import Patience, quick_requests, unavailable
from sb3_mlflow_ckpt.mirrors.tracked_run import TrackedRun, found_run
from sb3_mlflow_ckpt.mirrors.uploads import Uploads
from sb3_mlflow_ckpt.policies import KeepLastN
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

logger = logging.getLogger(__name__)

_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_METRICS_PER_BATCH = 900  # MLflow takes 1,000 of all kinds
_PARAMS_PER_BATCH = 100


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
        self._target = TrackedRun(tracking_uri, experiment_name, run_id)
        self._keep_last_n = keep_last_n
        self._patience = Patience()
        self._trains = False
        # A request of an earlier training that still hangs must not meet one of the next.
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._target.forget()
        self._uploads: Uploads | None = None
        self._sent_params = False
        self._sent_tags: dict[str, str] = {}
        self._sent_status: tuple[int, str] | None = None
        self._metrics_offset = 0
        self._metrics_until: int | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it is known."""
        return self._target.run_id

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
        info = self._target.run.info if self._target.run is not None else None
        return {
            "mlflow": {
                "tracking_uri": redact(self._target.uri),
                "experiment_name": self._target.experiment_name,
                "experiment_id": info.experiment_id if info is not None else None,
                "run_id": info.run_id if info is not None else None,
            }
        }

    def replicate(self, journal: RunJournal) -> None:
        """Send everything that MLflow lacks: the run, checkpoints, parameters, tags, metrics, then the status."""
        with self._lock:
            self._patience.take()
            self._replicate(journal)

    def _replicate(self, journal: RunJournal) -> None:
        record = journal.record
        client, run = self._target.connect(record)
        if (record.get("mlflow") or {}).get("run_id") != run.info.run_id:
            journal.update(**self.describe())
        if self._uploads is None:
            self._uploads = Uploads(client, run, self._target.uri, KeepLastN(self._keep_last_n))
        self._send_tags(client, run, record)
        self._uploads.send(journal)
        self._send_params(client, run, record)
        self._send_metrics(client, run, journal)
        self._uploads.prune(journal)
        self._send_status(client, run, record)

    def cancel(self) -> None:
        """End a run that `open` made as failed: nothing will be trained under it."""
        if self._target.created and self._target.run is not None:
            try:
                with quick_requests():
                    self._target.client.set_terminated(self._target.run.info.run_id, "FAILED")
            except Exception as error:
                logger.debug("MLflow was not told that the run will not train", exc_info=error)
        self._forget()
        self.close()

    def close(self) -> None:
        """Give MLflow's settings back to the caller; its client keeps no connection."""
        self._patience.give_back()

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
        if "mlflow.parentRunId" in run.data.tags or found_run(client, root) is None:
            return {}  # It has one, or the first run was trained without this server.
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

    def _send_status(self, client: MlflowClient, run: Run, record: Mapping[str, Any]) -> None:
        status = str(record["status"])
        attempt_status = (int(record.get("attempt", 1)), status)
        if attempt_status == self._sent_status or not self._target.owned:
            return
        if status in TERMINAL_STATUSES:
            client.set_terminated(
                run.info.run_id, _STATUS[status], end_time=naming.milliseconds(record.get("ended_at"))
            )
        elif self._trains and (run.info.status != "RUNNING" or self._sent_status is not None):
            # Not by a sync: the record of a killed trainer says "running" for ever.
            client.update_run(run.info.run_id, status="RUNNING")
        self._sent_status = attempt_status
