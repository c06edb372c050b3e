"""Owns what of a run's record and curve is sent to its MLflow run: tags, parameters, metrics, status."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sb3_mlflow_ckpt.json_lines import read_lines
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.naming import PARENT_TAG
from sb3_mlflow_ckpt.mirrors.tracked_run import found_run, run_of
from sb3_mlflow_ckpt.replication import MirroredJournal
from sb3_mlflow_ckpt.runs.document import TERMINAL_STATUSES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

logger = logging.getLogger(__name__)

_METRICS_PER_BATCH = 900  # MLflow takes 1,000 of all kinds
_PARAMS_PER_BATCH = 100
_BYTES_PER_SLICE = 1 << 18
_BELIEVED_SECONDS = 10.0


class RecordCopy:
    """Sends a run's record and curve, each thing once.

    Args:
        client: Reaches MLflow.
        run: The MLflow run, as it stood when it was looked up.
        owned: Whether it is ours to end.
        trains: Whether the training is of this process, and not caught up with.
    """

    def __init__(self, client: MlflowClient, run: Run, *, owned: bool, trains: bool) -> None:
        self._client, self._run = client, run
        self._owned, self._trains = owned, trains
        self._sent_params = False
        self._sent_tags = {str(key): str(value) for key, value in run.data.tags.items()}
        self._sent_status: tuple[int, str] | None = None
        self._attempt: int | None = None
        self._looked_at = 0.0
        self._metrics_offset = 0
        self._metrics_until: int | None = None
        self._warned = False

    def superseded(self, record: Mapping[str, Any]) -> bool:
        """Tell whether a later attempt, at another machine, has taken over the MLflow run: nothing is sent then.

        MLflow is asked anew before the run is ended, and where the last answer is older than some seconds: a machine
        that slept, or was cut off, wakes up beside its replacement.
        """
        age = time.time() - self._looked_at
        ending = str(record["status"]) in TERMINAL_STATUSES and self._sent_status != _status_of(record)
        if ending or not 0 <= age < _BELIEVED_SECONDS:
            self._attempt = naming.attempt_of(self._client.get_run(self._run.info.run_id).data.tags)
            self._looked_at = time.time()
        if not naming.is_later(self._attempt, record):
            return False
        if not self._warned:
            logger.warning(
                "MLflow holds a later attempt of the run %s; attempt %s is not sent",
                record.get("run_id"),
                record.get("attempt", 1),
            )
        self._warned = True
        return True

    def send_params(self, record: Mapping[str, Any]) -> list[str]:
        """Send parameters that are not there; return their names."""
        from mlflow.entities import Param

        if self._sent_params:
            return []
        present = self._client.get_run(self._run.info.run_id).data.params
        varied = (record.get("sweep") or {}).get("hyperparameters") or {}
        params = []
        for key, value in naming.parameters(record.get("config") or {}).items():
            # Parameters cannot be changed: where `mlflow run` logged the text it was given (`inherit`, say),
            # what it came to stands beside it.
            if key in present and key in varied:
                continue  # A value that a sweep has changed since is a field of the record, and a metric.
            name = key if key not in present or naming.same(present[key], value) else f"resolved.{key}"
            if name not in present:
                params.append(Param(name, value))
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            self._client.log_batch(self._run.info.run_id, params=params[start : start + _PARAMS_PER_BATCH])
        self._sent_params = True
        return [param.key for param in params]

    def send_tags(self, record: Mapping[str, Any], healing: bool) -> list[str]:
        """Send tags that changed; return their names."""
        from mlflow.entities import RunTag

        tags = naming.tags(record)
        root = record.get("root_run_id")
        if root and root != record.get("run_id"):
            tags |= self._parent_tag(str(root), healing)
        if not record.get("error") and naming.ERROR_TAG in self._run.data.tags:
            tags[naming.ERROR_TAG] = ""  # Of an attempt that failed before this one.
        fresh = {key: value for key, value in tags.items() if self._sent_tags.get(key) != value}
        if fresh:
            self._client.log_batch(self._run.info.run_id, tags=[RunTag(key, value) for key, value in fresh.items()])
            self._sent_tags |= fresh
        return [*fresh]

    def _parent_tag(self, root: str, healing: bool) -> dict[str, str]:
        present = self._sent_tags.get(PARENT_TAG)
        if present is not None and not (healing and found_run(self._client, present) is None):
            return {}
        # The root, not the parent: MLflow's list shows one level, so that a chain of resumes stays flat.
        found = run_of(self._client, root)
        return {} if found is None else {PARENT_TAG: found.info.run_id}  # It may have been trained without this server.

    def send_metrics(self, journal: MirroredJournal) -> None:
        """Send the points of the curve that are not there."""
        if self._metrics_until is None:
            # An earlier process may have sent a part. Steps only grow; a clock may be set back.
            history = self._client.get_metric_history(self._run.info.run_id, naming.EPISODES_METRIC)
            self._metrics_until = max((metric.step for metric in history), default=-1)
        while True:
            # In slices: how long an outage was must not show in the memory that its end takes.
            points, offset = read_lines(journal.folder.metrics, self._metrics_offset, _BYTES_PER_SLICE)
            if offset == self._metrics_offset:
                return
            fresh = [m for m in map(naming.metrics, points) if m and m[0].step > self._metrics_until]
            self.log_metrics(fresh)
            self._metrics_until = max([self._metrics_until, *(metrics[0].step for metrics in fresh)])
            self._metrics_offset = offset

    def log_metrics(self, points: Iterable[Sequence[Metric]]) -> None:
        """Send points in batches that cut none, so that one which is there is there whole.

        What is sent twice, where an answer was lost, MLflow has once: it knows a value by its step and time.
        """
        batch: list[Metric] = []
        for metrics in points:
            if batch and len(batch) + len(metrics) > _METRICS_PER_BATCH:
                self._client.log_batch(self._run.info.run_id, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(self._run.info.run_id, metrics=batch)

    def send_status(self, record: Mapping[str, Any]) -> str | None:
        """Send the status if it changed; return it where it was sent."""
        status = str(record["status"])
        attempt_status = _status_of(record)
        if attempt_status == self._sent_status or not self._owned:
            return None
        before, changed = self._sent_status, None
        if status in TERMINAL_STATUSES:
            changed, ended = naming.STATUS[status], naming.milliseconds(record.get("ended_at"))
            if before is None and (self._run.info.status, self._run.info.end_time) == (changed, ended):
                changed = None
            else:
                self._client.set_terminated(self._run.info.run_id, changed, end_time=ended)
        elif self._trains and (self._run.info.status != "RUNNING" or before is not None):
            # Not by a sync: the record of a killed trainer says "running" for ever.
            changed = "RUNNING"
            self._client.update_run(self._run.info.run_id, status=changed)
        self._sent_status = attempt_status
        return changed


def _status_of(record: Mapping[str, Any]) -> tuple[int, str]:
    return int(record.get("attempt", 1)), str(record["status"])
