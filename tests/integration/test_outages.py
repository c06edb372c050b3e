"""MLflow and MongoDB stopped, silent or never there, under a real trainer: training goes on and nothing is missing."""

from __future__ import annotations

import re
import shlex
import sqlite3
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow_server import MlflowServer
from outage_scenes import DATABASE, FLAGS, Services, Training
from processes import python, trainer, wait_for
from servers import MongoServer, SilentServer

from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.mongo import MongoRuns

MongoServerFactory = Callable[[], MongoServer]

_SECRET = "hunter2"


@pytest.fixture
def services(mlflow_server: MlflowServer, mongo_server: MongoServerFactory) -> Services:
    return Services(mlflow_server, mongo_server())


@pytest.fixture
def services_at_rest(tmp_path: Path, mongo_server: MongoServerFactory) -> Iterator[Services]:
    """Both, at addresses where nobody answers yet."""
    mongo = mongo_server()
    mongo.stop()
    services = Services(MlflowServer(tmp_path / "mlflow-server"), mongo)
    yield services
    services.stop()


def test_services_that_are_killed_and_come_back_in_mid_training_miss_nothing(
    tmp_path: Path, services: Services
) -> None:
    training = Training(tmp_path, *services.flags, "--total-timesteps", 600)
    training.advance(100)
    training.add_point()
    wait_for(lambda: training.is_mirrored(services), "the first checkpoints in both", training.process)

    services.stop()
    mirrored = training.mirrored
    training.advance(350)
    training.add_point()
    assert training.mirrored == mirrored >= {10, 20}
    assert len(training.saved) >= 7, "an outage stopped the checkpoints"

    services.start()
    wait_for(lambda: training.is_mirrored(services), "catching up while it trains", training.process)
    training.add_point()
    training.release()
    log = training.end()
    training.assert_nothing_is_missing(services, tmp_path / "download")
    assert len(training.points) >= 4
    # What waited for MLflow has gone by now, as retention says.
    assert len(training.on_disk) == 3
    for name in ("MLflow", "MongoDB"):
        assert log.count(f"{name} is behind; training goes on") == 1
        assert log.count(f"{name} answers again") == 1
    assert "Traceback" not in log
    # An outage is told once, not at each attempt by the clients' own libraries.
    assert "Retrying (" not in log


def test_services_that_come_back_when_training_has_ended_miss_nothing(tmp_path: Path, services: Services) -> None:
    training = Training(tmp_path, *services.flags, "--total-timesteps", 400, "--sync-timeout-seconds", 300)
    training.advance(100)
    wait_for(lambda: training.is_mirrored(services), "the first checkpoints in both", training.process)
    services.stop()
    training.release()
    wait_for(lambda: training.record["status"] == "completed", "the end of training", training.process)
    assert training.mirrored == {10, 20}
    services.start()
    log = training.end()
    assert "checkpoints sync" not in log
    training.assert_nothing_is_missing(services, tmp_path / "download")
    assert len(training.on_disk) == 3


def test_services_that_stay_away_are_sent_everything_by_the_command_that_is_printed(
    tmp_path: Path, services: Services
) -> None:
    training = Training(tmp_path, *services.flags, "--total-timesteps", 300, "--sync-timeout-seconds", 1)
    training.advance(50)
    wait_for(lambda: training.is_mirrored(services), "the first checkpoint in both", training.process)
    services.stop()
    training.release()
    log = training.end()
    commands = dict(re.findall(r"(\w+) misses a part of this run; send it with: sb3-mlflow-ckpt (.+)", log))
    assert commands.keys() == {"MLflow", "MongoDB"}
    assert "Resume with: python -m sb3_mlflow_ckpt.trainer" in log
    assert training.mirrored == {10}
    # More than keep_last_n_checkpoints: none may go before it is mirrored.
    assert len(training.saved) > 5
    assert training.on_disk == training.saved.keys() - {10}

    words = shlex.split(commands["MongoDB"])
    assert words[:2] == ["checkpoints", "sync"]
    mongo = ["--mongo-uri", services.mongo_uri, "--mongo-db", DATABASE]
    failing = _cli(*words, *mongo, cwd=tmp_path)
    assert failing.returncode == 1
    assert all(f"{training.folder.path.name}: {name}: " in failing.stdout for name in ("MLflow", "MongoDB"))
    assert ": ok" not in failing.stdout
    assert "Traceback" not in failing.stdout + failing.stderr

    services.start()
    done = _cli(*words, *mongo, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r": (\w+): ok", done.stdout) == ["MLflow", "MongoDB"]
    assert ": MLflow: checkpoints/ep000020.zip is sent" in done.stdout
    training.assert_nothing_is_missing(services, tmp_path / "download")

    before, contents = _files(training.checkpoint_dir), services.contents(training.folder.run_id)
    again = _cli(*words, *mongo, cwd=tmp_path)
    assert (again.returncode, len(again.stdout.splitlines())) == (0, 2), again.stdout
    assert re.findall(r": (\w+): ok", again.stdout) == ["MLflow", "MongoDB"]
    assert _files(training.checkpoint_dir) == before
    assert services.contents(training.folder.run_id) == contents


def test_a_service_that_stays_away_does_not_make_the_other_one_miss_anything(
    tmp_path: Path, mlflow_server: MlflowServer, services: Services
) -> None:
    training = Training(tmp_path, *services.flags, "--total-timesteps", 64, "--sync-timeout-seconds", 10)
    mlflow_server.stop()
    training.release()
    log = training.end()
    assert re.findall(r"(\w+) misses a part of this run", log) == ["MLflow"]
    run_id = training.folder.run_id
    assert services.runs().get(run_id) == FolderRuns(training.checkpoint_dir).get(run_id)


def test_the_command_that_is_printed_for_mongodb_needs_nothing_added(
    tmp_path: Path, mongo_server: MongoServerFactory
) -> None:
    """An address without credentials is known: a command that leaves it out sends nothing and says ok."""
    server = mongo_server()
    training = Training(
        tmp_path, "--mlflow", "false", "--mongo-uri", server.uri, "--total-timesteps", 64, "--sync-timeout-seconds", 1
    )
    server.stop()
    training.release()
    [command] = re.findall(r"MongoDB misses a part of this run; send it with: sb3-mlflow-ckpt (.+)", training.end())
    server.start()
    done = _cli(*shlex.split(command), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run_id = training.folder.run_id
    assert MongoRuns(server.uri, DATABASE).get(run_id) == FolderRuns(training.checkpoint_dir).get(run_id)


@pytest.mark.parametrize("kind", ["dead", "silent"])
@pytest.mark.parametrize("name", ["MLflow", "MongoDB"])
def test_a_service_that_does_not_answer_at_the_start_is_one_clear_line(
    tmp_path: Path, silent_server: SilentServer, name: str, kind: str
) -> None:
    if kind == "dead":
        silent_server.close()
    address = f"127.0.0.1:{silent_server.port}"
    if name == "MLflow":
        flags, shown = ["--tracking-uri", f"http://user:{_SECRET}@{address}"], f"http://***@{address}"
    else:
        mongo_uri = f"mongodb://user:{_SECRET}@{address}/db?directConnection=true"
        flags, shown = ["--mlflow", "false", "--mongo-uri", mongo_uri], f"mongodb://***@{address}/db"
    done = trainer(*FLAGS, *flags, "--total-timesteps", 64, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"Error: {name} at {shown} does not answer: ")
    assert line.endswith(
        "Start it or correct the address; with start_offline it trains at once and sends the records when it is back"
    )
    assert _SECRET not in done.stdout + done.stderr
    assert not [*tmp_path.rglob("run.json"), *tmp_path.rglob("ep*")]
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_a_database_that_does_not_answer_at_the_start_leaves_no_running_run_in_mlflow(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    silent_server.close()
    done = trainer(
        *FLAGS, "--mongo-uri", f"mongodb://127.0.0.1:{silent_server.port}", "--total-timesteps", 64, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Error: MongoDB at " in done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    left = client.search_runs(["0"], run_view_type=ViewType.ALL)
    assert [run.info.status for run in left if run.info.status == "RUNNING"] == []


def test_a_training_that_starts_offline_is_sent_whole_later(tmp_path: Path, services_at_rest: Services) -> None:
    services = services_at_rest
    flags = ("--start-offline", "true", "--experiment-name", "at sea", "--sync-timeout-seconds", 1)
    training = Training(tmp_path, *services.flags, *flags, "--total-timesteps", 250)
    training.advance(50)
    training.add_point()
    training.release()
    log = training.end()
    for name, address in (("MLflow", services.tracking_uri), ("MongoDB", services.mongo_uri.partition("?")[0])):
        assert f"{name} at {address} does not answer" in log
        assert f"{name} misses a part of this run" in log
    assert "Traceback" not in log
    services.start()
    # Where MLflow is, the record knows: its address holds no credentials.
    done = _cli("checkpoints", "sync", "--mongo-uri", services.mongo_uri, "--mongo-db", DATABASE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert training.record["mlflow"]["tracking_uri"] == services.tracking_uri
    client = MlflowClient(services.tracking_uri)
    run = client.get_run(training.record["mlflow"]["run_id"])
    assert client.get_experiment(run.info.experiment_id).name == "at sea"
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    assert len(client.search_runs(everywhere)) == 1
    training.assert_nothing_is_missing(services, tmp_path / "download")


def test_credentials_are_in_nothing_that_is_written_or_printed(
    tmp_path: Path, mlflow_server: MlflowServer, silent_server: SilentServer
) -> None:
    silent_server.close()
    with_credentials = mlflow_server.uri.replace("http://", f"http://user:{_SECRET}@")
    mongo_uri = f"mongodb://user:{_SECRET}@127.0.0.1:{silent_server.port}/?directConnection=true&password={_SECRET}"
    training = Training(
        tmp_path, "--tracking-uri", with_credentials, "--mongo-uri", mongo_uri, "--start-offline", "true",
        "--total-timesteps", 200, "--sync-timeout-seconds", 3, "--heartbeat-seconds", 0.2,
    )  # fmt: skip
    training.advance(50)
    wait_for(lambda: training.mirrored == {10}, "the first checkpoint in MLflow", training.process)
    mlflow_server.stop()
    training.advance(100)
    # A failure to reach it is told with its address.
    wait_for(lambda: "MLflow is behind; training goes on" in training.log.read_text(), "the warning", training.process)
    mlflow_server.start()
    training.release()
    log = training.end()

    assert training.record["config"]["tracking_uri"] == mlflow_server.uri.replace("http://", "http://***@")
    assert training.record["mlflow"]["tracking_uri"] == mlflow_server.uri.replace("http://", "http://***@")
    assert "Resume with: python -m sb3_mlflow_ckpt.trainer" in log
    for name, content in _all_content(tmp_path):
        assert _SECRET.encode() not in content, name
    client = MlflowClient(mlflow_server.uri)
    run = client.get_run(training.folder.run_id)
    assert _SECRET not in str(run.to_dictionary())
    # The server's own tables, whatever of them its client shows.
    with sqlite3.connect(tmp_path / "mlflow-server" / "mlflow.db") as database:
        assert not [row for row in database.iterdump() if _SECRET in row]


def test_a_server_whose_credentials_were_removed_must_be_named_to_be_sent_to(
    tmp_path: Path, silent_server: SilentServer
) -> None:
    """Sent to MLflow's default store instead, it would count as mirrored and never reach the server."""
    silent_server.close()
    uri = f"http://user:{_SECRET}@127.0.0.1:{silent_server.port}"
    done = trainer(
        *FLAGS, "--tracking-uri", uri, "--start-offline", "true", "--sync-timeout-seconds", 0,
        "--total-timesteps", 64, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sent = _cli("checkpoints", "sync", cwd=tmp_path)
    assert sent.returncode == 1, sent.stdout
    assert not (tmp_path / "mlflow.db").exists()


def _cli(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "sb3_mlflow_ckpt", *words, cwd=cwd)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _all_content(folder: Path) -> list[tuple[str, bytes]]:
    """Return every file below a folder, and every member of every zip."""
    found = [*_files(folder).items()]
    for path in folder.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            found += [(f"{path}!{name}", archive.read(name)) for name in archive.namelist()]
    return found
