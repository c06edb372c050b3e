"""Owns `mlflow run . --backend ray`: submits a project as a Ray job. Importing it imports no Ray."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.utils import (
    PROJECT_BUILD_IMAGE,
    PROJECT_DOCKER_ARGS,
    PROJECT_DOCKER_AUTH,
    PROJECT_ENV_MANAGER,
    PROJECT_STORAGE_DIR,
    PROJECT_SYNCHRONOUS,
    fetch_and_validate_project,
    get_entry_point_command,
    get_or_create_run,
    get_run_env_vars,
    load_project,
)

from sb3_mlflow_ckpt.errors import ClusterError, ConfigError
from sb3_mlflow_ckpt.redaction import redact
from sb3_mlflow_ckpt.scale import ray_cluster
from sb3_mlflow_ckpt.scale.ray_job import VARIABLE, RayJob
from sb3_mlflow_ckpt.scale.ray_settings import RaySettings, parse_settings
from sb3_mlflow_ckpt.scale.ray_submitted_run import RaySubmittedRun

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Below MLflow's own, which shows what `mlflow run` tells a person.
logger = logging.getLogger("mlflow.projects.backend.ray")

EXCLUDES = ("/.git/", "/checkpoints/", "/mlruns/", "/mlartifacts/", "/mlflow.db", "/.venv/", "__pycache__/")
"""What of the project's folder is not sent to the cluster."""
# How long a stopped driver may take beyond the trainer's grace period.
_STOP_SECONDS = 15
_MLFLOW_KEYS = (
    PROJECT_ENV_MANAGER, PROJECT_SYNCHRONOUS, PROJECT_DOCKER_ARGS, PROJECT_STORAGE_DIR, PROJECT_BUILD_IMAGE,
    PROJECT_DOCKER_AUTH,
)  # fmt: skip


class RayLaunchError(ClusterError, ExecutionException):
    """A project cannot be run on Ray; `mlflow run` prints it as one line. `__cause__` says what it was."""

    def __init__(self, line: str) -> None:
        ExecutionException.__init__(self, line)


@dataclass(frozen=True)
class _Cluster:
    """Where a job goes.

    Attributes:
        client: Submits it.
        address: The dashboard's.
        is_own: Whether it was started for this job, on this machine.
    """

    client: JobSubmissionClient
    address: str
    is_own: bool


class RayBackend(AbstractBackend):
    """Runs MLflow projects as Ray jobs: `mlflow.project_backend` names it `ray`."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: dict[str, Any],
        version: str | None,
        backend_config: Any,
        tracking_uri: str,
        experiment_id: str,
    ) -> RaySubmittedRun:
        """Submit a project; return once the cluster has it, or, with a cluster of its own, once it has ended.

        Raises:
            RayLaunchError: It cannot be submitted; or `mlflow run` started the cluster, and the run has failed.
        """
        try:
            given = backend_config if isinstance(backend_config, Mapping) else {}
            own = {key: value for key, value in given.items() if key not in _MLFLOW_KEYS}
            settings = parse_settings(own if isinstance(backend_config, Mapping) else backend_config)
            _check_environment(given.get(PROJECT_ENV_MANAGER))
            work_dir = fetch_and_validate_project(project_uri, version, entry_point, params)
            project = load_project(work_dir)
            [command] = get_entry_point_command(project, entry_point, params, given.get(PROJECT_STORAGE_DIR))
            cluster = _cluster(settings, tracking_uri)
            run = get_or_create_run(None, project_uri, experiment_id, work_dir, version, entry_point, params)
            submitted = _submit(settings, cluster, command, work_dir, run.info.run_id, experiment_id)
        except (ClusterError, ConfigError) as error:
            raise RayLaunchError(str(error)) from error
        if cluster.is_own and not given.get(PROJECT_SYNCHRONOUS, True) and not submitted.follow():
            # `mlflow run` does not wait for other backends, and the cluster ends with it.
            raise RayLaunchError(f"Run (ID '{submitted.run_id}') ended as {submitted.get_status()}")
        return submitted


def _check_environment(manager: str | None) -> None:
    if manager not in (None, "local"):
        raise ConfigError(
            "env_manager",
            f"{manager!r} is not possible on Ray: a job runs with the cluster's own Python",
            "--env-manager",
            "Write --env-manager local, and give packages with `runtime_env` in the backend configuration",
        )


def _cluster(settings: RaySettings, tracking_uri: str) -> _Cluster:
    address = ray_cluster.given_address(settings.address)
    if address is None:
        address = ray_cluster.start_local()
        return _Cluster(ray_cluster.connect(address), address, True)
    client = ray_cluster.connect(address)
    here = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    if not here and urlsplit(tracking_uri).scheme not in ("http", "https", "databricks"):
        raise ClusterError(
            f"The cluster's nodes cannot reach MLflow at {redact(tracking_uri)}",
            "Start `mlflow server`, and set MLFLOW_TRACKING_URI to its http:// address",
        )
    return _Cluster(client, address, False)


def _submit(
    settings: RaySettings, cluster: _Cluster, command: str, work_dir: str, run_id: str, experiment_id: str
) -> RaySubmittedRun:
    environment = dict(settings.runtime_env)
    in_place = cluster.is_own and "working_dir" not in environment
    if not in_place and "working_dir" not in environment:
        environment["working_dir"] = work_dir
        environment["excludes"] = [*EXCLUDES, *environment.get("excludes", ())]
    job = RayJob(
        command=command,
        cwd=work_dir if in_place else None,
        **settings.model_dump(exclude={"address", "runtime_env"}),
    )
    environment["env_vars"] = {
        **(environment.get("env_vars") or {}),
        **get_run_env_vars(run_id, experiment_id),
        VARIABLE: job.to_json(),
        # Ray would kill the driver after 3 s, and the trainer with it.
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(settings.grace_seconds) + _STOP_SECONDS),
    }
    python = shlex.quote(sys.executable) if cluster.is_own else "python"
    try:
        job_id = cluster.client.submit_job(
            entrypoint=f"{python} -m sb3_mlflow_ckpt.scale.ray_job",
            submission_id=f"mlflow-{run_id}",
            runtime_env=environment,
            metadata={"mlflow_run_id": run_id},
        )
    except BaseException as error:
        MlflowClient().set_terminated(run_id, "FAILED")
        if not isinstance(error, Exception):
            raise
        # Ray's own, requests' and OS errors alike.
        raise ClusterError(
            f"The cluster at {redact(cluster.address)} does not take the job: {' '.join(str(error).split())[:500]}",
            "Correct `runtime_env`; what need not be sent of the project's folder goes under its `excludes`",
        ) from error
    submitted = RaySubmittedRun(cluster.client, job_id, run_id, stop_seconds=settings.grace_seconds + 2 * _STOP_SECONDS)
    _announce(cluster, job_id, run_id)
    return submitted


def _announce(cluster: _Cluster, job_id: str, run_id: str) -> None:
    address = redact(cluster.address)
    logger.info("=== Ray job %s runs the MLflow run %s; dashboard: %s ===", job_id, run_id, address)
    if not cluster.is_own:
        logger.info("=== Follow it: ray job logs %s --follow --address %s ===", job_id, address)
        logger.info("=== Stop it, with a last checkpoint: ray job stop %s --address %s ===", job_id, address)
