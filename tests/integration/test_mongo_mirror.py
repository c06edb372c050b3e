from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from journals import add_point, prune, save, start_run
from journals import mirror as note_mirrored
from processes import TESTS, environment
from pymongo import MongoClient
from pymongo.monitoring import CommandListener
from servers import MongoServer, SilentServer

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.replication import Mirror, Replicator
from sb3_mlflow_ckpt.runs import mongo_database
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.runs.mongo_database import LazyDatabase, connect, open_database

RUN = "0123456789abcdef0123456789abcdef"


class Commands(CommandListener):
    """Counts the documents of each write."""

    def __init__(self) -> None:
        self.written: dict[str, int] = {}

    def started(self, event: Any) -> None:
        if event.command_name in ("update", "insert"):
            collection = event.command[event.command_name]
            count = len(event.command.get("updates", event.command.get("documents", ())))
            self.written[collection] = self.written.get(collection, 0) + count
            assert event.command["writeConcern"]["w"] == "majority"
            assert event.command["writeConcern"]["j"] is True

    def succeeded(self, event: Any) -> None:
        pass

    def failed(self, event: Any) -> None:
        pass

    def take(self) -> dict[str, int]:
        written, self.written = self.written, {}
        return written


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """What the clients that are made from here on write."""
    listener = Commands()

    def client(*args: Any, **options: Any) -> MongoClient[dict[str, Any]]:
        return MongoClient(*args, event_listeners=[listener], **options)

    monkeypatch.setattr(mongo_database, "MongoClient", client)
    return listener


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[RunJournal]:
    journal = start_run(tmp_path, RUN)
    yield journal
    journal.close()


@pytest.fixture
def opened() -> Iterator[Callable[[str, str], tuple[MongoMirror, MongoRuns]]]:
    """Makes a mirror and a reader of the same database."""
    closing: list[MongoMirror | MongoRuns] = []

    def make(uri: str, database: str) -> tuple[MongoMirror, MongoRuns]:
        mirror, reader = MongoMirror(uri, database), MongoRuns(uri, database)
        closing.extend((mirror, reader))
        return mirror, reader

    yield make
    for each in closing:
        each.close()


Opened = Callable[[str, str], tuple[MongoMirror, MongoRuns]]


def assert_same(reader: MongoRuns, journal: RunJournal) -> None:
    folder = FolderRuns(journal.folder.checkpoint_dir)
    assert reader.get(RUN) == folder.get(RUN)
    assert reader.curve(RUN) == folder.curve(RUN)


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_opening_answers_with_no_id_and_can_be_repeated(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    mirror: Mirror = opened(mongo_uri, mongo_database)[0]
    assert (mirror.name, mirror.stores_checkpoints) == ("MongoDB", False)
    assert mirror.open(journal.record) is None
    assert mirror.open(journal.record) is None


def test_only_what_changed_is_sent(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened, commands: Commands
) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    for episode in range(1, 6):
        save(journal, episode)
        add_point(journal, 10 * episode)
    mirror.replicate(journal)
    # The record, and the stamp behind all the rest.
    assert commands.take() == {"training_runs": 2, "training_checkpoints": 5, "training_metrics": 5}
    mirror.replicate(journal)
    assert commands.take() == {}

    journal.update(heartbeat_at="2099-01-01T00:00:00.000Z")
    mirror.replicate(journal)
    assert commands.take() == {"training_runs": 1}

    save(journal, 6)
    prune(journal, 1)
    note_mirrored(journal, 2, "runs:/1/ep000002.zip")
    mirror.replicate(journal)
    assert commands.take() == {"training_runs": 1, "training_checkpoints": 3}

    add_point(journal, 60)
    mirror.replicate(journal)
    assert commands.take() == {"training_runs": 1, "training_metrics": 1}
    assert_same(reader, journal)


def test_a_heartbeat_changes_only_its_own_field(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    mirror.replicate(journal)
    database = open_database(mongo_uri, mongo_database)
    database["training_runs"].update_one({"_id": RUN}, {"$set": {"config": "left alone"}})
    database.client.close()
    journal.update(heartbeat_at="2099-01-01T00:00:00.000Z")
    mirror.replicate(journal)
    run = reader.get(RUN)
    assert (run["heartbeat_at"], run["config"]) == ("2099-01-01T00:00:00.000Z", "left alone")


def test_a_field_that_a_new_attempt_lacks_is_gone(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    record = journal.record
    journal.update(error={"type": "OSError"}, note="of the first attempt")
    mirror.replicate(journal)
    journal.start(record)
    mirror.replicate(journal)
    assert reader.get(RUN)["attempt"] == 2
    assert "note" not in reader.get(RUN)
    assert_same(reader, journal)


def test_a_second_mirror_sends_everything_and_doubles_nothing(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened, commands: Commands
) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    for episode in range(1, 4):
        save(journal, episode)
        add_point(journal, 10 * episode)
    mirror.replicate(journal)
    commands.take()
    database = open_database(mongo_uri, mongo_database)
    database["training_checkpoints"].delete_one({"episode": 2})
    database["training_metrics"].delete_many({})
    database.client.close()
    opened(mongo_uri, mongo_database)[0].replicate(journal)
    assert commands.take() == {"training_runs": 2, "training_checkpoints": 3, "training_metrics": 3}
    assert_same(reader, journal)


def test_a_database_that_was_dropped_is_filled_again(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    save(journal, 50)
    add_point(journal, 10)
    mirror.replicate(journal)
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_uri) as client:
        client.drop_database(mongo_database)
    journal.update(heartbeat_at="2099-01-01T00:00:00.000Z")
    mirror.replicate(journal)
    assert_same(reader, journal)


def test_every_document_says_its_schema_version(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    save(journal, 50)
    add_point(journal, 10)
    opened(mongo_uri, mongo_database)[0].replicate(journal)
    database = open_database(mongo_uri, mongo_database)
    for name in ("training_runs", "training_checkpoints", "training_metrics"):
        assert [document["schema_version"] for document in database[name].find()] == [1]
    database.client.close()


def test_the_keys_of_checkpoints_and_points_are_unique(mongo_uri: str, mongo_database: str) -> None:
    for _ in range(2):
        database = open_database(mongo_uri, mongo_database)
        unique = {
            tuple(key for key, _ in index["key"])
            for name in ("training_checkpoints", "training_metrics")
            for index in database[name].index_information().values()
            if index.get("unique")
        }
        database.client.close()
        assert {frozenset(keys) for keys in unique} == {
            frozenset({"run_id", "episode"}),
            frozenset({"run_id", "num_timesteps", "time"}),
        }


def test_an_older_attempt_does_not_overwrite_its_successor(
    tmp_path: Path, mongo_uri: str, mongo_database: str, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = (start_run(tmp_path / host, RUN, host=host) for host in ("older", "newer"))
    mirror, reader = opened(mongo_uri, mongo_database)
    mirror.replicate(older)
    newer.start(newer.record)
    save(newer, 50, b"by the newer")
    mirror.replicate(newer)

    older.update(status="failed")
    save(older, 50, b"by the older one")
    add_point(older, 10)
    for each in (mirror, opened(mongo_uri, mongo_database)[0]):
        caplog.clear()
        each.replicate(older)
        each.replicate(older)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert_same(reader, newer)
    older.close()
    newer.close()


class Attempt:
    """A process of its own on its own copy of a run folder."""

    def __init__(self, folder: RunFolder, uri: str, database: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "zombie.py", folder.path, uri, database],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def tell(self, *words: object) -> None:
        self.begin(*words)
        self.finish()

    def begin(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def finish(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "done\n"

    def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(300)
        if self._process.stdout is not None:
            self._process.stdout.close()


@pytest.fixture
def attempts(tmp_path: Path, mongo_uri: str, mongo_database: str) -> Iterator[tuple[Attempt, Attempt]]:
    """An attempt, and a later one that goes on from a copy of its folder."""
    journal = start_run(tmp_path / "older", RUN)
    save(journal, 1)
    add_point(journal, 10, by=1)
    journal.close()
    shutil.copytree(tmp_path / "older", tmp_path / "newer")
    pair = tuple(
        Attempt(RunFolder(tmp_path / name, "ppo_agent", RUN), mongo_uri, mongo_database) for name in ("older", "newer")
    )
    yield pair[0], pair[1]
    for attempt in pair:
        attempt.end()


def test_a_zombie_on_a_copy_of_the_folder_changes_nothing_of_its_successors(
    tmp_path: Path, mongo_uri: str, mongo_database: str, opened: Opened, attempts: tuple[Attempt, Attempt]
) -> None:
    zombie, newer = attempts
    # What only the older one knows is not the newer one's past.
    zombie.tell("save", 2, "by-the-zombie")
    zombie.tell("point", 20, 1)
    newer.tell("start")
    reader, folder = opened(mongo_uri, mongo_database)[1], FolderRuns(tmp_path / "newer")
    for words in (("save", 3, "zombie"), ("save", 1, "zombie"), ("point", 30, 1), ("beat", "zombie"), ("point", 40, 1)):
        zombie.tell(*words)
        assert reader.get(RUN) == folder.get(RUN)
        assert reader.curve(RUN) == folder.curve(RUN)
    newer.tell("save", 2, "by-the-newer")
    newer.tell("point", 20, 2)
    zombie.tell("save", 4, "zombie")
    assert reader.get(RUN) == folder.get(RUN)
    assert [point["by"] for point in reader.curve(RUN)] == [1, 2]


def test_a_zombie_that_slept_in_the_middle_of_its_writes_leaves_nothing(
    tmp_path: Path, mongo_uri: str, mongo_database: str, opened: Opened, attempts: tuple[Attempt, Attempt]
) -> None:
    zombie, newer = attempts
    reader, folder = opened(mongo_uri, mongo_database)[1], FolderRuns(tmp_path / "newer")
    zombie.tell("beat", "zombie")
    for episode in range(2, 12):
        zombie.begin("save", episode, "zombie")
        zombie.begin("point", 10 * episode, 1)
    # Wherever it was: a signal that stops it does not ask.
    os.kill(zombie.pid, signal.SIGSTOP)
    newer.tell("start")
    newer.tell("save", 2, "by-the-newer")
    newer.tell("point", 20, 2)
    os.kill(zombie.pid, signal.SIGCONT)
    for _ in range(20):
        zombie.finish()
    assert reader.get(RUN) == folder.get(RUN)
    assert reader.curve(RUN) == folder.curve(RUN)


@pytest.mark.parametrize("days", [-3, 3])
def test_a_run_on_a_host_with_a_wrong_clock_is_judged_by_the_servers(
    mongo_uri: str, mongo_database: str, journal: RunJournal, opened: Opened, days: int
) -> None:
    wrong = (datetime.now(timezone.utc) + timedelta(days=days)).isoformat()
    journal.update(heartbeat_at=wrong)
    mirror, reader = opened(mongo_uri, mongo_database)
    mirror.open(journal.record)
    mirror.replicate(journal)
    assert reader.get(RUN)["status"] == "running"
    assert [run["run_id"] for run in reader.list(status="running")] == [RUN]
    assert reader.get(RUN)["heartbeat_at"] == wrong
    database = open_database(mongo_uri, mongo_database)
    database["training_runs"].update_one({"_id": RUN}, {"$set": {"seen_at": datetime.now(timezone.utc) - timedelta(hours=1)}})
    assert reader.get(RUN)["status"] == "lost"
    # A sync of a dead run's folder is no sign of life.
    opened(mongo_uri, mongo_database)[0].heal(journal)
    assert reader.get(RUN)["status"] == "lost"
    journal.update(heartbeat_at=wrong, progress={"num_timesteps": 1})
    mirror.replicate(journal)
    assert reader.get(RUN)["status"] == "running"
    database.client.close()


def test_one_mirror_sends_many_runs(tmp_path: Path, mongo_uri: str, mongo_database: str, opened: Opened) -> None:
    mirror, reader = opened(mongo_uri, mongo_database)
    for number in range(3):
        journal = start_run(tmp_path, f"run-{number}")
        save(journal, number)
        mirror.replicate(journal)
        journal.close()
    assert reader.list() == FolderRuns(tmp_path).list()
    for number in range(3):
        assert [item["episode"] for item in reader.get(f"run-{number}")["checkpoint_paths"]] == [number]


def test_a_folder_without_a_record_sends_nothing(
    tmp_path: Path, mongo_uri: str, mongo_database: str, opened: Opened
) -> None:
    journal = RunJournal(RunFolder(tmp_path, "ppo_agent", RUN))
    save(journal, 50)
    mirror, reader = opened(mongo_uri, mongo_database)
    mirror.replicate(journal)
    journal.close()
    assert reader.list() == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_missing_after_an_outage(
    mongo_server: Callable[[], MongoServer], mongo_database: str, journal: RunJournal, opened: Opened, signum: int
) -> None:
    server = mongo_server()
    mirror, reader = opened(server.uri, mongo_database)
    mirror.open(journal.record)
    save(journal, 50)
    add_point(journal, 10)
    mirror.replicate(journal)

    server.stop(signum)
    save(journal, 100)
    prune(journal, 50)
    add_point(journal, 20)
    journal.update(progress={"num_timesteps": 20})
    with pytest.raises(MirrorUnavailableError):
        mirror.replicate(journal)

    server.start()
    add_point(journal, 30)
    mirror.replicate(journal)
    assert_same(reader, journal)


def test_a_run_that_started_during_an_outage_is_sent_after_it(
    mongo_server: Callable[[], MongoServer], mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    server = mongo_server()
    server.stop()
    mirror, reader = opened(server.uri, mongo_database)
    save(journal, 50)
    with pytest.raises(MirrorUnavailableError):
        mirror.replicate(journal)
    server.start()
    mirror.replicate(journal)
    assert_same(reader, journal)


def test_the_replicators_thread_heals_an_outage(
    mongo_server: Callable[[], MongoServer], mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    server = mongo_server()
    mirror, reader = opened(server.uri, mongo_database)
    replicator = Replicator(mirror, journal)
    replicator.start()
    for episode in range(1, 31):
        save(journal, episode)
        add_point(journal, 10 * episode)
        journal.update(progress={"episode": episode})
        if episode == 10:
            server.stop()
            eventually(lambda: replicator.failure is not None)
        if episode == 20:
            server.start()
            eventually(lambda: replicator.failure is None)
    journal.update(status="completed")
    assert replicator.close(timeout=300)
    assert len(reader.get(RUN)["checkpoint_paths"]) == 30
    assert_same(reader, journal)


# Without limits of its own, pymongo waits 30 s to find a server and for ever for an answer.
@pytest.mark.timeout(25)
def test_a_server_that_accepts_and_never_answers_is_given_up(
    silent_server: SilentServer, mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    mirror, reader = opened(f"mongodb://127.0.0.1:{silent_server.port}/?serverSelectionTimeoutMS=99000", mongo_database)
    with pytest.raises(MirrorUnavailableError):
        mirror.open(journal.record)
    with pytest.raises(MirrorUnavailableError):
        reader.list()


@pytest.mark.timeout(60)
def test_a_server_that_stops_answering_is_given_up_and_taken_up_again(
    mongo_server: Callable[[], MongoServer], mongo_database: str, journal: RunJournal, opened: Opened
) -> None:
    server = mongo_server()
    # The client's own look-out for dead servers is too rare here to help.
    mirror, reader = opened(f"{server.uri}&heartbeatFrequencyMS=600000", mongo_database)
    mirror.replicate(journal)
    os.kill(server.pid, signal.SIGSTOP)
    save(journal, 50)
    try:
        with pytest.raises(MirrorUnavailableError):
            mirror.replicate(journal)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    mirror.replicate(journal)
    assert_same(reader, journal)


def test_credentials_are_not_in_the_error(journal: RunJournal, silent_server: SilentServer) -> None:
    silent_server.close()
    uri = f"mongodb://me:hunter2@127.0.0.1:{silent_server.port}/db?directConnection=true"
    with pytest.raises(MirrorUnavailableError) as caught:
        MongoMirror(uri, "db").open(journal.record)
    assert "hunter2" not in str(caught.value)
    assert f"MongoDB at mongodb://***@127.0.0.1:{silent_server.port}/db does not answer" in str(caught.value)


def _use_in_child(lazy: LazyDatabase, parents: Any, results: Any) -> None:
    database = lazy.get()
    results.put((database is parents, database.command("ping")["ok"]))
    lazy.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_makes_a_client_of_its_own(mongo_uri: str, mongo_database: str) -> None:
    lazy = LazyDatabase(mongo_uri, mongo_database, connect)
    parents = lazy.get()
    parents.command("ping")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=_use_in_child, args=(lazy, parents, results))
    child.start()
    assert results.get(timeout=300) == (False, 1.0)
    child.join(60)
    assert child.exitcode == 0
    assert lazy.get() is parents
    assert parents.command("ping")["ok"] == 1.0
    lazy.close()
