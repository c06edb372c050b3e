"""Owns reaching a Ray cluster: its address, its token, its versions, and errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sb3_mlflow_ckpt.errors import ClusterError, ClusterUnavailableError, ConfigError, MissingRayError
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.scale.local_ray import start_ray

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CONNECT_SECONDS = 5.0
_HOW_TO_GIVE_A_TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the cluster's token"
)


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        MissingRayError: It is not installed.
    """
    try:
        import ray
        import ray.job_submission
    except ImportError as error:
        raise MissingRayError(error) from error
    return ray


def given_address(address: str | None) -> str | None:
    """Return the address of the cluster that is meant: as given, else from the environment; None where none is."""
    return address or next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the cluster whose dashboard is at an address.

    Raises:
        ClusterError: It is not reached, wants a token, or runs other versions.
        ConfigError: The address is none.
        MissingRayError: Ray is not installed.
    """
    ray = import_ray()
    _check_reachable(address)
    _check_token_file()
    from ray.exceptions import AuthenticationError

    shown = redact(address)
    try:
        with _alone():
            client: JobSubmissionClient = ray.job_submission.JobSubmissionClient(address)
            metadata = client._do_request("GET", "/api/v0/cluster_metadata").json()["data"]
            versions = str(metadata["rayVersion"]), str(metadata["pythonVersion"])
    except AuthenticationError as error:
        wrong = "invalid" in str(error)
        cause = "does not take the token" if wrong else "asks for a token"
        raise ClusterError(f"The Ray cluster at {shown} {cause}", _HOW_TO_GIVE_A_TOKEN) from error
    except Exception as error:
        # requests', Ray's and JSON's errors alike.
        raise ClusterUnavailableError(
            f"What answers at {shown} is not the dashboard of a Ray cluster: {' '.join(str(error).split())[:200]}",
            "Give the address that `ray start --head` prints for the dashboard, such as http://head:8265",
        ) from error
    _check_versions(shown, *versions, ray.__version__)
    return client


def start_local() -> str:
    """Start a cluster of this machine alone, which ends with this process; return its dashboard's address.

    Raises:
        MissingRayError: Ray is not installed.
        ClusterError: It does not start.
    """
    import_ray()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        with _alone():
            context = start_ray(dashboard=True)
    except Exception as error:
        raise ClusterError(
            f"No Ray cluster could be started here: {' '.join(str(error).split())[:300]}",
            "Name one that is running: RAY_ADDRESS=http://host:8265",
        ) from error
    return f"http://{context.dashboard_url}"


def _check_reachable(address: str) -> None:
    """Raise where nothing listens: Ray's own client would wait for minutes."""
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "address",
            f"{redact(address)!r} is not the address of a Ray dashboard",
            hint="It begins with http:// or https://, and ends with the port, such as http://head:8265",
        )
    try:
        socket.create_connection((parts.hostname, port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterUnavailableError(
            f"No Ray cluster answers at {redact(address)}: {error.strerror or error}",
            "Start it with `ray start --head`, or correct `address` or RAY_ADDRESS; with neither, a cluster of this "
            "machine alone is started",
        ) from error


def _check_token_file() -> None:
    """Raise for a token file that cannot be read: Ray ends the process."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN") or not path:
        return
    try:
        problem = "" if Path(path).read_text().strip() else "it is empty"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH names {path}, which holds no token: {problem}", _HOW_TO_GIVE_A_TOKEN)


def _check_versions(address: str, ray_there: str, python_there: str, ray_here: str) -> None:
    """Raise where another Ray or Python runs there, but for the last number of either."""
    for name, there, here in (("Ray", ray_there, ray_here), ("Python", python_there, platform.python_version())):
        if there.split(".")[:2] != here.split(".")[:2]:
            raise ClusterError(
                f"The cluster at {address} runs {name} {there}, this machine {name} {here}",
                f"Install the same {name} on both, and on every node",
            )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide addresses in the environment, which win over the one that Ray is given."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
