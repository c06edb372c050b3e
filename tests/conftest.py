from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow_server import MlflowServer
from servers import MongoServer, SilentServer, real_mongo_uri
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: threads that wait for one another are slow where servers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MongoServerFactory = Callable[[], MongoServer]


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


class OneRay(LoadScopeScheduling):
    """Gives all modules that start Ray to one worker: another would only wait for them."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0].rpartition("/")[2]
        return "ray" if module.startswith(("test_ray", "test_sweep")) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRay | None:
    return OneRay(config, log) if config.getoption("dist") == "loadscope" else None
