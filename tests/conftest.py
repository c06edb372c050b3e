from __future__ import annotations

import functools
import math
import os
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from mlflow_server import MlflowServer
from servers import MongoServer, SilentServer, real_mongo_uri
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: threads that wait for one another are slow where servers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

MongoServerFactory = Callable[[], MongoServer]

_RAY_WORKER = "gw0"
# Modules whose tests take long, with about their seconds: what decides is their order.
_SECONDS = {
    "ray": 900,
    "test_matrix.py": 400,
    "test_outages.py": 260,
    "test_documents.py": 240,
    "test_mlflow_project.py": 190,
    "test_preemption.py": 180,
    "test_mirror_process.py": 155,
    "test_campaign.py": 110,
    "test_ownership.py": 110,
    "test_signals.py": 105,
    "test_algorithms.py": 95,
    "test_sync_heals.py": 95,
    "test_faulty_services.py": 90,
    "test_mlflow_mirror.py": 85,
    "test_history_access.py": 80,
    "test_resumes.py": 75,
    "test_own_run.py": 65,
    "test_resume_commands_run.py": 65,
    "test_env_exactness.py": 60,
    "test_sweep_settings.py": 55,
    "test_history_live.py": 55,
    "test_history_pages.py": 45,
    "test_cli_errors.py": 45,
    "test_mongo_mirror.py": 40,
    "test_kill.py": 40,
    "test_scripts.py": 40,
}


@pytest.fixture(autouse=True)
def lists_are_never_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a list of runs read anew at each look, also where a busy machine made the last one a slow one."""
    monkeypatch.setattr("sb3_mlflow_ckpt.runs.folder_index._QUICK_SECONDS", math.inf)


@pytest.fixture(scope="session")
def mongo_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a MongoDB-compatible server that lives as long as the session."""
    _need_mongo_server()
    server = MongoServer(tmp_path_factory.mktemp("mongo"))
    server.start()
    yield server.uri
    server.stop()


@pytest.fixture(scope="session")
def real_mongo() -> str:
    """The address of a real MongoDB."""
    uri = real_mongo_uri()
    if uri is None:
        pytest.skip("NOT TESTED AGAINST MONGODB: set SB3_MLFLOW_CKPT_TEST_MONGO_URI to the address of one")
    return uri


@pytest.fixture
def mongo_database() -> str:
    """The name of a database that no other test uses."""
    return f"test_{uuid.uuid4().hex}"


@pytest.fixture
def mongo_server(tmp_path: Path) -> Iterator[MongoServerFactory]:
    """Makes servers, started, that a test may stop and start at the same address with the same storage."""
    _need_mongo_server()
    servers: list[MongoServer] = []

    def make() -> MongoServer:
        server = MongoServer(tmp_path / f"mongo-{len(servers)}")
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    """A server that accepts connections and never answers."""
    server = SilentServer()
    yield server
    server.close()


def _need_mongo_server() -> None:
    if MongoServer.program() is None:
        pytest.skip("NOT TESTED: secantusd-py is not installed beside this Python; install the extra [test]")


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server that lives as long as the session."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server.uri
    server.stop()


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """An MLflow server, started, that a test may stop and start at the same address with the same storage."""
    server = MlflowServer(tmp_path / "mlflow-server")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def only_ray() -> Iterator[None]:
    """Has nobody else's Ray run at the same time: on one machine, nodes of two clusters take each other's jobs."""
    with FileLock(Path(tempfile.gettempdir()) / "sb3_mlflow_ckpt-tests-ray.lock"):
        yield


class LongestFirst(LoadScopeScheduling):
    """Gives all modules that start Ray to one worker, as others would only wait for it, and the longest ones first."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _starts_ray(nodeid.partition("::")[0]) else str(super()._split_scope(nodeid))

    def _assign_work_unit(self, node: Any) -> None:
        # What takes long and comes last is waited for by all: in the order of their weight, as far as it is known.
        units = sorted(self.workqueue.items(), key=lambda unit: -_weight(*unit))
        self.workqueue = OrderedDict(sorted(units, key=lambda unit: unit[0] == "ray" and node.gateway.id != _RAY_WORKER))
        super()._assign_work_unit(node)


def pytest_configure() -> None:
    # Ray's tests are the longest of all, and take several times as long where its many processes wait for others.
    if os.environ.get("PYTEST_XDIST_WORKER", _RAY_WORKER) != _RAY_WORKER:
        os.nice(10)


@functools.cache
def _starts_ray(module: str) -> bool:
    return '"only_ray"' in (Path(__file__).parents[1] / module).read_text()


def _weight(scope: str, tests: Collection[str]) -> float:
    """Return about how many seconds the tests of a module take."""
    return _SECONDS.get(scope.rpartition("/")[2], 0.2 * len(tests))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst | None:
    return LongestFirst(config, log) if config.getoption("dist") == "loadscope" else None
