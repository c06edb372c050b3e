"""Owns the MLflow run of a sweep, below which its trials' runs lie: it begins first and ends last."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sb3_mlflow_ckpt.config import flatten
from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.mirrors import naming
from sb3_mlflow_ckpt.mirrors.patience import quick_requests, unavailable
from sb3_mlflow_ckpt.mirrors.tracked_run import TrackedRun, absolute_uri, found_run
from sb3_mlflow_ckpt.provenance import hostname
from sb3_mlflow_ckpt.redaction import hidden_in
from sb3_mlflow_ckpt.runs.document import redact_all
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig

logger = logging.getLogger(__name__)


class SweepRun:
    """The MLflow run of a sweep, as long as its driver lives.

    Args:
        sweep: The sweep.
        sweep_id: Its id.
        known: What its record holds, where it was begun before.

    Attributes:
        run_id: The run's id; None where nothing is tracked, or MLflow was down and the sweep may start offline.
        tracking_uri: MLflow's address, the same from every folder; None where nothing is tracked.
    """

    def __init__(self, sweep: SweepConfig, sweep_id: str, known: Mapping[str, Any]) -> None:
        self._sweep = sweep
        self._sweep_id = sweep_id
        self._config = sweep.trial_config({})
        self.run_id: str | None = known.get("mlflow_run_id")
        uri = known.get("tracking_uri")
        self._known_uri = uri if uri and not hidden_in(uri) else None
        self.tracking_uri: str | None = None
        self._ended = False

    def __enter__(self) -> SweepRun:
        if self._config.mlflow:
            # Of a sweep that is resumed in another folder, where a path of its own may mean something else.
            before = self._known_uri if self._config.tracking_uri is None else None
            target = TrackedRun(before or self._config.tracking_uri, self._config.experiment_name, None)
            self.tracking_uri = absolute_uri(target.uri)
            try:
                with quick_requests():
                    self._open(target)
            except Exception as error:
                down = unavailable(error, target.uri)
                if not self._config.start_offline:
                    raise MirrorUnavailableError(
                        down.name, down.uri, down.cause, "with start_offline it trains at once", refused=down.refused
                    ) from None
                logger.warning("%s", down)
        return self

    def _open(self, target: TrackedRun) -> None:
        from mlflow.entities import Param, RunTag

        client = target.client
        driver = [RunTag(naming.SWEEP_HOST_TAG, hostname()), RunTag(naming.SWEEP_PID_TAG, str(os.getpid()))]
        before = found_run(client, self.run_id) if self.run_id is not None else None
        if before is not None:
            if before.info.lifecycle_stage == "deleted":
                client.restore_run(before.info.run_id)
            client.log_batch(before.info.run_id, tags=driver)
            client.update_run(before.info.run_id, status="RUNNING")
            return
        experiment = target.experiment_id()
        run = client.create_run(experiment, run_name=self._sweep_id, tags={naming.SWEEP_TAG: self._sweep_id})
        self.run_id = run.info.run_id
        described = flatten(redact_all(self._sweep.model_dump(mode="json")))
        params = [Param(key[:250], str(value)[:6000]) for key, value in described.items() if value is not None]
        client.log_batch(
            self.run_id, params=params[:100], tags=[RunTag(f"{naming.SWEEP_TAG}.name", self._sweep.name), *driver]
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._ended:
            self.end("failed" if isinstance(error, Exception) else "interrupted", {})

    def end(self, status: str, files: Mapping[str, Path], **metrics: float) -> None:
        """End the run.

        Args:
            status: completed, failed or interrupted.
            files: What is kept beside it.
            metrics: Numbers of the whole sweep.
        """
        self._ended = True
        if self.run_id is None or self.tracking_uri is None:
            return
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.tracking_uri)
        try:
            with quick_requests():
                for key, value in metrics.items():
                    client.log_metric(self.run_id, f"sweep/{key}", float(value))
                for path in files.values():
                    client.log_artifact(self.run_id, str(path))
        except Exception:
            logger.exception("What the sweep came to was not sent to MLflow")
        try:
            with quick_requests():
                client.set_terminated(self.run_id, naming.STATUS[status])
        except Exception:
            logger.exception("MLflow was not told that the sweep has ended")
