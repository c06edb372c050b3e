"""`mlflow run --backend ray` before a cluster with a token, and before one of another version."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ports import free_port
from processes import DEADLINE, environment, wait_for

ray = pytest.importorskip("ray", reason="NOT TESTED: the extra [ray] is not installed")

from sb3_mlflow_ckpt.errors import ClusterError  # noqa: E402
from sb3_mlflow_ckpt.scale import ray_cluster  # noqa: E402

pytestmark = pytest.mark.usefixtures("only_ray")

TOKEN = "0123456789abcdef" * 4
PROJECT = """
name: cartpole
entry_points:
  main:
    command: python -m sb3_mlflow_ckpt.trainer --total-timesteps 64
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, only_ray: None) -> Iterator[str]:
    """The dashboard's address of a cluster that wants a token, as `ray start` makes it."""
    folder, port = tmp_path_factory.mktemp("head"), free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=1"]
    ports = ("port", "ray-client-server-port", "node-manager-port", "object-manager-port", "dashboard-agent-listen-port")
    options = [f"--{name}={free_port()}" for name in ports]
    options += [f"--dashboard-port={port}", "--include-dashboard=true", f"--object-store-memory={100 * 2**20}"]
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED="0", HOME=str(folder))
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], env=env, cwd=folder, stdout=log, stderr=log, text=True, start_new_session=True
        )
    wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), "a cluster", process)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(DEADLINE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "MLproject").write_text(PROJECT)
    return tmp_path


def tracking(project: Path) -> str:
    return f"sqlite:///{project}/mlflow.db"


def mlflow_run(project: Path, address: str, **env: str) -> subprocess.CompletedProcess[str]:
    (project / "ray.json").write_text(json.dumps({"address": address}))
    command = [str(Path(sys.executable).with_name("mlflow")), "run", ".", "--backend", "ray"]
    return subprocess.run(
        [*command, "--backend-config", "ray.json", "--env-manager", "local"],
        cwd=project, capture_output=True, text=True, timeout=DEADLINE,
        env=environment(MLFLOW_TRACKING_URI=tracking(project), HOME=str(project), RAY_USAGE_STATS_ENABLED="0", **env),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({}, "asks for a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN[::-1]}, "does not take the token"),
    ],
    ids=["none", "wrong"],
)
def test_without_the_clusters_token_it_is_told_in_one_line(
    head: str, project: Path, env: dict[str, str], told: str
) -> None:
    done = mlflow_run(project, head, **env)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].partition(" ERROR mlflow.cli: ")[2] == (
        f"=== The Ray cluster at {head} {told}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, "
        "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the cluster's token ==="
    )
    assert "Traceback" not in done.stderr and TOKEN[::-1] not in done.stdout + done.stderr


def test_with_the_clusters_token_the_project_is_trained(head: str, project: Path) -> None:
    (project / "token").write_text(f"{TOKEN}\n")
    done = mlflow_run(project, head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(project / "token"))
    assert done.returncode == 0, done.stderr
    client = MlflowClient(tracking(project))
    [run] = client.search_runs(["0"])
    wait_for(lambda: client.get_run(run.info.run_id).info.status == "FINISHED", "the end of the training")


@contextmanager
def dashboard(metadata: object = None, /, **versions: str) -> Iterator[str]:
    """What answers as the dashboard of a cluster of other versions does: they cannot be installed beside."""
    versions = {"rayVersion": ray.__version__, "pythonVersion": platform.python_version(), **versions}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = {"/api/version": {"version": "4", "ray_version": versions["rayVersion"], "ray_commit": "0" * 40}}
            body = json.dumps(told.get(self.path, {"result": True, "msg": "", "data": metadata or versions})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({"rayVersion": "2.9.3"}, f"runs Ray 2.9.3, this machine Ray {ray.__version__}. Install the same Ray on both"),
        (
            {"pythonVersion": "3.8.20"},
            f"runs Python 3.8.20, this machine Python {platform.python_version()}. Install the same Python on both",
        ),
    ],
    ids=["ray", "python"],
)
def test_a_cluster_of_another_version_is_told_in_one_line(versions: dict[str, str], told: str) -> None:
    with dashboard(**versions) as address, pytest.raises(ClusterError) as raised:
        ray_cluster.connect(address)
    assert str(raised.value) == f"The cluster at {address} {told}, and on every node"


def test_the_last_number_of_a_version_may_differ_and_a_proper_one_is_let_in() -> None:
    near = ".".join([*ray.__version__.split(".")[:2], "999"])
    with dashboard(rayVersion=near) as address:
        assert ray_cluster.connect(address).get_version() == "4"


def test_a_dashboard_that_does_not_tell_its_versions_is_told_in_one_line() -> None:
    with dashboard({"clusterId": "1"}) as address, pytest.raises(ClusterError) as raised:
        ray_cluster.connect(address)
    assert str(raised.value).startswith(f"What answers at {address} is not the dashboard of a Ray cluster")
    assert "\n" not in str(raised.value)
