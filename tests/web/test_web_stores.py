"""The API over MongoDB says what it says over folders, also when the database goes and comes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from processes import wait_for
from servers import SilentServer
from web_runs import EDITED, FAILED, FIRST, ORPHAN, SECOND, write_runs

from sb3_mlflow_ckpt.errors import MirrorUnavailableError, RunNotFoundError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.web.outages import PatientRuns

RUNS = "/api/training-runs"
PATHS = [
    f"{RUNS}?status=completed,failed,interrupted", f"{RUNS}?status=completed,failed,interrupted&limit=2&sort=name",
    f"{RUNS}?q=first", f"{RUNS}/{FIRST}", f"{RUNS}/{FAILED}", f"{RUNS}/{SECOND}", f"{RUNS}/{FIRST}/metrics",
    f"{RUNS}/{FIRST}/metrics?points=20", f"{RUNS}/{FIRST}/checkpoints?limit=2", f"{RUNS}/{FIRST}/checkpoints?before=100",
    f"{RUNS}/{SECOND}/metrics?stitched=true", f"{RUNS}/{SECOND}/lineage", f"{RUNS}/{ORPHAN}/lineage",
    f"{RUNS}/{FIRST}/checkpoints/50", f"{RUNS}/{FIRST}/checkpoints/50/download", f"/api/compare?run={FIRST}&run={SECOND}",
    f"{RUNS}/{'8' * 32}", f"{RUNS}/{FIRST}/checkpoints/51",
]  # fmt: skip


def replicate(journals: list[RunJournal], uri: str, database: str) -> None:
    mirror = MongoMirror(uri, database)
    for journal in journals:
        mirror.replicate(RunJournal(journal.folder))
    mirror.close()


def test_a_database_and_folders_give_the_same_bytes(serve, mongo_uri: str, mongo_database: str, tmp_path: Path) -> None:
    journals = write_runs(tmp_path / "checkpoints")
    # What somebody edits in a folder is in the folder alone.
    edited = next(journal for journal in journals if journal.folder.run_id == EDITED)
    journals.remove(edited)
    shutil.rmtree(edited.folder.path)
    replicate(journals, mongo_uri, mongo_database)
    store = MongoRuns(mongo_uri, mongo_database)
    folders, mongo = serve(), serve(store)
    for path in PATHS:
        one, other = folders.ask(path), mongo.ask(path)
        assert one.status == other.status and one.headers["content-type"] == other.headers["content-type"]
        if one.status == 200:
            assert one.body == other.body, path
            assert other.status == 200
    tag = mongo.ask(f"{RUNS}/{FIRST}").headers["etag"]
    assert mongo.ask(f"{RUNS}/{FIRST}", headers={"If-None-Match": tag}).status == 304
    store.close()


def test_what_somebody_wrote_into_the_database_is_no_fault(serve, mongo_uri: str, mongo_database: str) -> None:
    from datetime import datetime

    from pymongo import MongoClient

    hostile = [
        {"_id": "a" * 32, "run_id": "a" * 32, "status": "running", "name": float("nan"), "started_at": datetime(2026, 1, 1)},
        {"_id": "b" * 32, "run_id": "b" * 32, "seed": {"$numberLong": "1"}, "config": {"x": b"bytes", "y": float("inf")}},
        {"_id": "c" * 32, "run_id": "c" * 32, "status": None, "config": {"x": {"%int": "9" * 6000}, "y": {"%text": "[1]"}, "z": {"%int": None}}, "heartbeat_at": 5},
        {"_id": "d" * 32, "run_id": "d" * 32, "status": 5, "mirrors": 7, "progress": [], "agent_id": {"x": 1}, "algo": ["x"]},
    ]  # fmt: skip
    with MongoClient(mongo_uri) as client:
        client[mongo_database]["training_runs"].insert_many(hostile)
        client[mongo_database]["training_checkpoints"].insert_many(
            [{"run_id": row["_id"], "episode": episode} for row in hostile for episode in (5, 10**12)]
        )
        client[mongo_database]["training_metrics"].insert_one({"run_id": "a" * 32, "time": "x", "num_timesteps": 5, "ep_rew_mean": float("nan")})
    store = MongoRuns(mongo_uri, mongo_database)
    app = serve(store)
    for path in ("", *(f"/{row['_id']}{rest}" for row in hostile for rest in ("", "/metrics", "/lineage", "/checkpoints", "/checkpoints/5"))):
        answer = app.ask(RUNS + path)
        assert answer.status == 200, (path, answer.body)
        assert b"NaN" not in answer.body and b"Infinity" not in answer.body
    for path in ("", *(f"/{row['_id']}" for row in hostile), f"/compare?run={'a' * 32}&run={'d' * 32}"):
        assert app.ask(f"/training{path}").status == 200, path
    store.close()


def test_a_database_that_goes_is_503_and_one_that_comes_back_200(serve, mongo_server, tmp_path: Path) -> None:
    server = mongo_server()
    replicate(write_runs(tmp_path / "checkpoints")[:2], server.uri, "runs")
    store = MongoRuns(server.uri, "runs")
    app = serve(store)
    before = app.ask(f"{RUNS}/{FIRST}")
    assert before.status == 200 and app.ask("/healthz").status == 200
    server.stop()
    for path in (f"{RUNS}/{FIRST}", RUNS, "/healthz", f"{RUNS}/{FIRST}/checkpoints/50/download"):
        answer = app.ask(path, headers={"If-None-Match": before.headers["etag"]})
        assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
        assert answer.headers["retry-after"] == "5" and answer.json["store"] == "MongoDB" and "mongodb://" in answer.json["uri"]
    server.start()
    wait_for(lambda: app.ask("/healthz").status == 200, "the database's return")
    after = app.ask(f"{RUNS}/{FIRST}", headers={"If-None-Match": before.headers["etag"]})
    assert after.status == 304
    store.close()


class Down:
    """A store that is down, or not."""

    def __init__(self) -> None:
        self.asked, self.is_down, self.waits = 0, True, threading.Event()
        self.waits.set()

    def version(self, run_id: str) -> str:
        self.asked += 1
        assert self.waits.wait(300)
        if self.is_down:
            raise MirrorUnavailableError("MongoDB", "mongodb://x", "it is down")
        if run_id == "0":
            raise RunNotFoundError(run_id, "here")
        return "1"


def test_one_request_finds_out_that_a_store_is_down_and_the_others_are_told_at_once() -> None:
    store, now = Down(), [0.0]
    runs = PatientRuns(store, pause_seconds=2, clock=lambda: now[0])  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(MirrorUnavailableError, match="it is down"):
            runs.version("1")
    assert store.asked == 1
    now[0] = 3
    store.waits.clear()

    def probe() -> None:
        with pytest.raises(MirrorUnavailableError):
            runs.version("1")

    prober = threading.Thread(target=probe)
    prober.start()
    wait_for(lambda: store.asked == 2, "the second question")
    with pytest.raises(MirrorUnavailableError):
        runs.version("1")
    assert store.asked == 2
    store.waits.set()
    prober.join(30)
    store.is_down, now[0] = False, 6
    with pytest.raises(RunNotFoundError):
        runs.version("0")
    assert runs.version("1") == "1" and store.asked == 4


def test_a_store_that_refuses_is_asked_every_time() -> None:
    store = Down()
    asked = []

    def refuse(run_id: str) -> str:
        asked.append(run_id)
        raise MirrorUnavailableError("MongoDB", "mongodb://x", "no", refused=True)

    store.version = refuse  # type: ignore[method-assign]
    runs = PatientRuns(store)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(MirrorUnavailableError, match="refuses"):
            runs.version("1")
    assert len(asked) == 3


def test_pages_of_a_database_that_is_silent_do_not_hold_up_what_needs_none(serve, silent_server: SilentServer) -> None:
    store = MongoRuns(f"mongodb://127.0.0.1:{silent_server.port}/?directConnection=true")
    app = serve(store)
    statuses: list[int] = []
    asking = [threading.Thread(target=lambda: statuses.append(app.ask(RUNS).status)) for _ in range(60)]
    for thread in asking:
        thread.start()
    wait_for(lambda: silent_server.accepted, "the question to the database")
    assert app.ask("/nothing").status == 404
    for thread in asking:
        thread.join()
    assert statuses == [503] * 60
    store.close()
