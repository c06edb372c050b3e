"""Owns a job that was submitted: waiting for it, its status in MLflow's words, and cancelling it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.entities import RunStatus
from mlflow.projects.submitted_run import SubmittedRun

from sb3_mlflow_ckpt.errors import ClusterUnavailableError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_POLL_SECONDS = 1.0
_OUTAGE_SECONDS = 60.0
_STATUS = {
    "PENDING": "SCHEDULED", "RUNNING": "RUNNING", "SUCCEEDED": "FINISHED", "FAILED": "FAILED", "STOPPED": "KILLED",
}  # fmt: skip


class RaySubmittedRun(SubmittedRun):
    """An MLflow run that a Ray job trains.

    Args:
        client: The cluster's.
        job_id: The job.
        run_id: The MLflow run.
        stop_seconds: How long a cancelled job may take to end.
    """

    def __init__(self, client: JobSubmissionClient, job_id: str, run_id: str, *, stop_seconds: float) -> None:
        super().__init__()
        self.job_id = job_id
        self._client = client
        self._run_id = run_id
        self._stop_seconds = stop_seconds

    @property
    def run_id(self) -> str:
        """The MLflow run's id."""
        return self._run_id

    def get_status(self) -> str:
        """Return the job's status as MLflow names it."""
        return _STATUS[str(self._client.get_job_status(self.job_id).value)]

    def wait(self) -> bool:
        """Wait for the end of the job; return whether the training has reached its target.

        Raises:
            ClusterUnavailableError: The cluster has not answered for a minute.
        """
        return self._wait() == "FINISHED"

    def cancel(self) -> None:
        """Stop the job, and wait until the trainer has saved and ended; the MLflow run is `KILLED` then."""
        self._client.stop_job(self.job_id)
        self._wait(self._stop_seconds)

    def follow(self) -> bool:
        """Print what the job prints until it ends, as `wait` does; Ctrl-C or SIGTERM cancels it."""
        with _interrupting():
            try:
                with contextlib.suppress(RuntimeError):
                    # The connection may end before the job does.
                    asyncio.run(self._print_logs())
                return self.wait()
            except KeyboardInterrupt:
                self.cancel()
                raise

    async def _print_logs(self) -> None:
        async for lines in self._client.tail_job_logs(self.job_id):
            sys.stdout.write(lines)
            sys.stdout.flush()

    def _wait(self, seconds: float | None = None) -> str:
        """Wait for the end of the job; return the status, which the MLflow run has, too."""
        answered = started = time.monotonic()
        while seconds is None or time.monotonic() - started < seconds:
            try:
                status = self.get_status()
                answered = time.monotonic()
            except (OSError, RuntimeError) as error:
                # A head node may be away for a moment; requests' errors are OSErrors.
                if time.monotonic() - answered > _OUTAGE_SECONDS:
                    raise ClusterUnavailableError(
                        f"The cluster of the job {self.job_id} has not answered for {_OUTAGE_SECONDS:.0f} s: {error}",
                        "The job may go on; its MLflow run tells",
                    ) from error
                status = ""
            if status and RunStatus.is_terminated(RunStatus.from_string(status)):
                return self._ended(status)
            time.sleep(_POLL_SECONDS)
        return self.get_status()

    def _ended(self, status: str) -> str:
        """End the MLflow run where nobody in the cluster could."""
        client = MlflowClient()
        if not RunStatus.is_terminated(RunStatus.from_string(client.get_run(self._run_id).info.status)):
            client.set_terminated(self._run_id, status)
        return status


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
