"""Owns the driver of a Ray job, which runs on the cluster's head: one retried task, and how the MLflow run ends.

`python -m sb3_mlflow_ckpt.scale.ray_job`, as `ray_backend` submits it; what it is to do is in its environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from sb3_mlflow_ckpt.printable import printable
from sb3_mlflow_ckpt.scale.ray_task import STOPPED, StopFlag, TrainerDied, run_command

VARIABLE = "_SB3_MLFLOW_CKPT_RAY_JOB"
_POLL_SECONDS = 0.5
# Beyond the grace period: until the task has heard of it, and told how it ended.
_ANSWER_SECONDS = 10.0
_FAILED = 1


@dataclass(frozen=True)
class RayJob:
    """What a job runs.

    Attributes:
        command: The project's command.
        cwd: Where it runs; the job's own `working_dir` where it is None.
        max_retries: How often it is started again.
        num_cpus: CPUs that it takes.
        num_gpus: GPUs that it takes.
        resources: Other resources that it takes.
        grace_seconds: How long a cancelled command may take to end.
    """

    command: str
    cwd: str | None
    max_retries: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]
    grace_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    """Run the job of the environment; return its exit code."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    job = RayJob(**json.loads(os.environ[VARIABLE]))
    ray.init()
    stopped = threading.Event()
    # After Ray has set its own, which would leave the trainer no time.
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    task = ray.remote(run_command).options(
        name="trainer",
        max_retries=job.max_retries,
        retry_exceptions=[TrainerDied],
        num_cpus=job.num_cpus,
        num_gpus=job.num_gpus,
        resources=job.resources,
    )
    # Here, on the head: any other node may go.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    flag = ray.remote(StopFlag).options(num_cpus=0, scheduling_strategy=here).remote()
    result = task.remote(job.command, job.cwd, job.grace_seconds, flag)
    code = _outcome(result, stopped, flag, job.grace_seconds)
    end_mlflow_run("FINISHED" if code == 0 else "KILLED" if stopped.is_set() else "FAILED")
    return code


def _outcome(result: Any, stopped: threading.Event, flag: Any, grace_seconds: float) -> int:
    """Wait for the task, and have it end the trainer when the job is stopped; return the trainer's exit code."""
    import ray
    from ray.exceptions import RayError

    deadline: float | None = None
    while not ray.wait([result], timeout=_POLL_SECONDS)[0]:
        if stopped.is_set() and deadline is None:
            deadline = time.monotonic() + grace_seconds + _ANSWER_SECONDS
            print("The job is stopped: the trainer saves a last checkpoint", flush=True)
            flag.hoist.remote()
        if deadline is not None and time.monotonic() > deadline:
            return STOPPED  # It waits for a node, say, and trains nothing.
    try:
        return int(ray.get(result))
    except TrainerDied as error:
        print(f"{error}; no retry is left", flush=True)
        return error.code
    except RayError as error:
        print(printable(f"The training was lost, and no retry is left: {' '.join(str(error).split())}"), flush=True)
        return _FAILED


def end_mlflow_run(status: str) -> None:
    """End the job's MLflow run, unless the trainer has done that: whoever was killed could not."""
    from mlflow import MlflowClient
    from mlflow.entities import RunStatus

    client, run_id = MlflowClient(), os.environ["MLFLOW_RUN_ID"]
    try:
        if not RunStatus.is_terminated(client.get_run(run_id).info.status):
            client.set_terminated(run_id, status)
    except Exception as error:
        # mlflow raises its own, requests' and OS errors alike.
        print(printable(f"MLflow was not told that its run {run_id} is {status}: {error}"), flush=True)


if __name__ == "__main__":
    # Under its own name: what a worker is to import is not `__main__` there.
    from sb3_mlflow_ckpt.scale import ray_job

    sys.exit(ray_job.main())
