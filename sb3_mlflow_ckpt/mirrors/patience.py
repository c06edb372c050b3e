"""Owns how long MLflow's requests may take, and what their errors mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.runs.document import redact

REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED")
"""MLflow's error codes of a server that answered, and said no."""
# MLflow's own defaults retry for minutes; the replicator retries on its own schedule, off the training thread.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # It would print a line for every run that it ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}


class Patience:
    """Bounds MLflow's requests by its settings in the environment, where the caller has not set them."""

    def __init__(self) -> None:
        self._set: list[str] = []

    def take(self) -> None:
        """Set what is not set; the same again does nothing."""
        for key, value in _PATIENCE.items():
            if key not in os.environ:
                os.environ[key] = value
                self._set.append(key)

    def give_back(self) -> None:
        """Leave the caller's settings as they were."""
        while self._set:
            os.environ.pop(self._set.pop(), None)


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


def unavailable(error: Exception, uri: str) -> MirrorUnavailableError:
    """Return the error for an MLflow that does not answer, or that says no."""
    refused = getattr(error, "error_code", None) in REFUSALS
    return MirrorUnavailableError("MLflow", redact(uri), redact(str(error)), refused=refused)


def is_there(address: str) -> bool:
    """Return whether there is anything to ask: MLflow would make a database file that is not there."""
    scheme, separator, path = address.partition(":///")
    return not (separator and scheme.startswith("sqlite")) or path in ("", ":memory:") or Path(path).exists()


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turn what MLflow's client raises of a server into MirrorUnavailableError, which says what to do."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        raise unavailable(error, address) from None
