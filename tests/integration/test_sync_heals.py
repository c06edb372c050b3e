"""Mirrors that were wiped or edited, and the sync that makes them again from the folders alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from journals import add_point, commit, prune, save, start_run
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from processes import python
from pymongo import MongoClient

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.journal import RunJournal, read_record
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.metadata import FileEntry
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.runs.folder import FolderRuns, read_ledger
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.runs.mongo_database import CHECKPOINTS, METRICS, RUNS, UPDATED_AT
from sb3_mlflow_ckpt.sync import MirrorAddresses, SyncResult, sync_runs

CHUNK = "000000000000-000000000010-0a1b2c3d.zst"
ENDED = "2026-01-01T00:01:00.000Z"


class Tracking:
    """An MLflow server whose storage a test can reach behind its back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = MlflowServer(folder)
        self._server.start()
        self.uri = self._server.uri
        self.client = MlflowClient(self.uri)
        self.stop = self._server.stop

    def artifacts(self, run_id: str) -> Path:
        experiment = self.client.get_run(run_id).info.experiment_id
        return self._folder / "artifacts" / experiment / run_id / "artifacts" / "checkpoints"

    def execute(self, *statements: str) -> None:
        with sqlite3.connect(self._folder / "mlflow.db", timeout=30) as database:
            for statement in statements:
                database.execute(statement)
        database.close()

    def erase(self, run_id: str) -> None:
        """Make a run and its artifacts gone for good."""
        shutil.rmtree(self.artifacts(run_id).parents[1])
        tables = ("params", "tags", "metrics", "latest_metrics", "runs")
        self.execute(*(f"delete from {table} where run_uuid = '{run_id}'" for table in tables))

    def contents(self, run_id: str) -> dict[str, Any]:
        """Return all that it has of a run, each file's bytes included."""
        run = self.client.get_run(run_id)
        histories = {
            key: sorted((m.step, m.timestamp, m.value) for m in self.client.get_metric_history(run_id, key))
            for key in run.data.metrics
        }
        folder = self.artifacts(run_id)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return {**run.to_dictionary(), "histories": histories, "files": files}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    tracking = Tracking(tmp_path_factory.mktemp("tracking"))
    yield tracking
    tracking.stop()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _save_with_chunk(journal: RunJournal, episode: int) -> None:
    """Commit a checkpoint that needs a chunk of a replay buffer."""
    metadata = commit(journal.folder, episode)
    content = b"ten rows"
    path = journal.folder.chunk(CHUNK)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    chunk = FileEntry(name=f"replay/{CHUNK}", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    metadata = metadata.model_copy(update={"files": [*metadata.files, chunk]})
    atomic.write_bytes(journal.folder.metadata(episode), atomic.dump_json(metadata.to_json()))
    journal.add_saved(metadata)


def _mirrored_run(tracking: Tracking, **fields: Any) -> tuple[RunFolder, str]:
    """Return an ended run that MLflow has whole: three checkpoints, the oldest of which only MLflow still has."""
    mirror = MLflowMirror(tracking.uri, "healing")
    record = {"name": "a run", **fields}
    run_id = str(mirror.open(record))
    journal = start_run(Path("checkpoints"), run_id, config={"seed": 1}, mirrors=["MLflow"], **{**record, **mirror.describe()})
    for steps in (10, 20, 30):
        add_point(journal, steps, ep_rew_mean=steps / 3, **{"train/loss": 0.5})
    save(journal, 10)
    for episode in (20, 30):
        _save_with_chunk(journal, episode)
    mirror.replicate(journal)
    prune(journal, 10)
    journal.update(status="completed", ended_at=ENDED)
    mirror.replicate(journal)
    mirror.close()
    journal.close()
    return journal.folder, run_id


def _sync(folder: RunFolder, *, verify: bool = False) -> list[str]:
    [result] = sync_runs(folder.checkpoint_dir, run_id=folder.run_id, verify=verify)
    assert result.error is None, result.error
    return list(result.changes)


def _edit(path: Path, content: bytes) -> None:
    assert path.exists()
    path.write_bytes(content)


Damage = Callable[[Tracking, str, Path], object]
_DAMAGES: dict[str, tuple[Damage, str]] = {
    "zip-gone": (lambda t, r, f: (f / "ep000030.zip").unlink(), "ep000030.zip: it is missing"),
    "zip-cut": (lambda t, r, f: _edit(f / "ep000030.zip", b"a z"), "ep000030.zip has 3 bytes, not 5"),
    "metadata-gone": (lambda t, r, f: (f / "ep000020_metadata.json").unlink(), "ep000020_metadata.json is missing"),
    "metadata-edited": (
        lambda t, r, f: _edit(f / "ep000020_metadata.json", b"{}"),
        "ep000020_metadata.json has another content",
    ),
    "chunk-gone": (lambda t, r, f: (f / "replay" / CHUNK).unlink(), f"replay/{CHUNK} is missing"),
    "chunk-cut": (lambda t, r, f: _edit(f / "replay" / CHUNK, b"ten"), f"replay/{CHUNK} has 3 bytes, not 8"),
    "folder-gone": (lambda t, r, f: shutil.rmtree(f / "replay"), f"replay/{CHUNK} is missing"),
    "tags-edited": (
        lambda t, r, f: t.client.set_tag(r, "sb3_mlflow_ckpt.agent_id", "somebody"),
        "the tag sb3_mlflow_ckpt.agent_id is set",
    ),
    "latest-edited": (lambda t, r, f: t.client.set_tag(r, LATEST_TAG, "checkpoints/ep000020.zip"), LATEST_TAG),
    "tag-gone": (lambda t, r, f: t.client.delete_tag(r, "sb3_mlflow_ckpt.algo"), "sb3_mlflow_ckpt.algo is set"),
    "status-edited": (lambda t, r, f: t.client.set_terminated(r, "FAILED"), "the status is set to FINISHED"),
    "running-again": (lambda t, r, f: t.client.update_run(r, status="RUNNING"), "the status is set to FINISHED"),
    "run-deleted": (lambda t, r, f: t.client.delete_run(r), "was deleted: it is restored"),
    "experiment-deleted": (
        lambda t, r, f: t.client.delete_experiment(t.client.get_experiment_by_name("healing").experiment_id),
        "the experiment 'healing' was deleted: it is restored",
    ),
    "metrics-gone": (
        lambda t, r, f: t.execute(f"delete from metrics where run_uuid = '{r}' and step = 20"),
        "3 values of the learning curve were missing",
    ),
    "parameters-gone": (lambda t, r, f: t.execute(f"delete from params where run_uuid = '{r}'"), "parameter seed"),
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGES)
def test_what_was_deleted_or_edited_in_mlflow_is_made_good_and_told(tracking: Tracking, damage: str) -> None:
    folder, run_id = _mirrored_run(tracking)
    before = tracking.contents(run_id)
    assert _sync(folder) == []
    inflict, told = _DAMAGES[damage]
    inflict(tracking, run_id, tracking.artifacts(run_id))
    assert damage == "experiment-deleted" or tracking.contents(run_id) != before
    changes = _sync(folder)
    assert any(told in line for line in changes), changes
    assert tracking.contents(run_id) == before
    events = folder.events.read_bytes()
    assert _sync(folder, verify=True) == []
    assert tracking.contents(run_id) == before
    assert folder.events.read_bytes() == events


@pytest.mark.parametrize("name", ["ep000030.zip", f"replay/{CHUNK}"])
def test_other_bytes_of_the_same_length_are_found_by_hashing(tracking: Tracking, name: str) -> None:
    folder, run_id = _mirrored_run(tracking)
    before = tracking.contents(run_id)
    copy = tracking.artifacts(run_id) / name
    _edit(copy, copy.read_bytes()[::-1])
    assert _sync(folder) == []
    changes = _sync(folder, verify=True)
    assert any(f"{name} has other bytes" in line for line in changes), changes
    assert tracking.contents(run_id) == before
    assert _sync(folder, verify=True) == []


def test_a_copy_that_was_the_last_is_told_as_lost_and_known_again_when_it_is_back(tracking: Tracking) -> None:
    folder, run_id = _mirrored_run(tracking)
    zip_file = tracking.artifacts(run_id) / "ep000010.zip"
    aside = zip_file.rename(zip_file.with_name("aside"))
    [line] = _sync(folder)
    assert line.endswith("ep000010.zip: it is missing; the folder does not hold it any more, so it is lost")
    assert FolderRuns("checkpoints").get(run_id)["checkpoint_paths"][0]["state"] == "pruned"
    assert _sync(folder) == []
    aside.rename(zip_file)
    [line] = _sync(folder)
    assert line == "checkpoints/ep000010.zip is there, and was not known"
    assert FolderRuns("checkpoints").get(run_id)["checkpoint_paths"][0]["state"] == "mirrored"


def test_a_checkpoint_that_retention_removed_is_not_sent_again(tracking: Tracking) -> None:
    mirror = MLflowMirror(tracking.uri, "healing", keep_last_n=2)
    run_id = str(mirror.open({"name": None}))
    config = {"mlflow_keep_last_n_checkpoints": 2}
    journal = start_run(Path("checkpoints"), run_id, config=config, mirrors=["MLflow"], **mirror.describe())
    for episode in (10, 20, 30, 40):
        save(journal, episode)
    mirror.replicate(journal)
    journal.update(status="completed", ended_at=ENDED)
    mirror.replicate(journal)
    journal.close()
    before = tracking.contents(run_id)
    assert {name for name in before["files"] if name.endswith(".zip")} == {"ep000030.zip", "ep000040.zip"}
    assert _sync(journal.folder) == []
    # The older of the two is sent again, and does not become the newest by that.
    (tracking.artifacts(run_id) / "ep000030.zip").unlink()
    assert _sync(journal.folder)
    assert tracking.contents(run_id) == before
    assert read_ledger(journal.folder).retired == {10, 20}


@pytest.mark.parametrize("how", ["the run", "the experiment as well"])
def test_a_run_that_is_gone_for_good_is_made_anew_and_what_names_it_follows(tracking: Tracking, how: str) -> None:
    root, root_id = _mirrored_run(tracking, started_at="2026-01-01T00:00:00.000Z")
    parent = {"run_id": root_id, "checkpoint": "ep000030.zip", "episode": 30, "sha256": None}
    child, child_id = _mirrored_run(
        tracking, started_at="2026-01-02T00:00:00.000Z", root_run_id=root_id, parent=parent
    )
    assert tracking.client.get_run(child_id).data.tags["mlflow.parentRunId"] == root_id
    before = tracking.contents(root_id)
    tracking.erase(root_id)
    if how != "the run":
        tracking.erase(child_id)
        experiment = tracking.client.get_experiment_by_name("healing").experiment_id
        tables = ("tags", "params", "metrics", "latest_metrics", "runs")
        others = f"(select run_uuid from runs where experiment_id = {experiment})"
        tracking.execute(
            *(f"delete from {table} where run_uuid in {others}" for table in tables),
            f"delete from experiment_tags where experiment_id = {experiment}",
            f"delete from experiments where experiment_id = {experiment}",
        )
    results = sync_runs("checkpoints")
    assert [result.error for result in results] == [None, None]

    new_id = read_record(root)["mlflow"]["run_id"]
    new_child_id = read_record(child)["mlflow"]["run_id"]
    assert new_id != root_id
    assert (new_child_id == child_id) == (how == "the run")
    assert read_record(root)["run_id"] == root_id
    after = tracking.contents(new_id)
    # The one that only MLflow had is gone with it.
    lost = {name: content for name, content in before["files"].items() if not name.startswith("ep000010")}
    assert (after["files"], after["histories"]) == (lost, before["histories"])
    assert (after["data"]["params"], after["info"]["status"]) == (before["data"]["params"], "FINISHED")
    assert tracking.client.get_experiment(after["info"]["experiment_id"]).name == "healing"
    assert set(read_ledger(root).uris.values()) == {f"runs:/{new_id}/checkpoints/ep0000{e}.zip" for e in (20, 30)}
    assert tracking.client.get_run(new_child_id).data.tags["mlflow.parentRunId"] == new_id

    contents = tracking.contents(new_id), tracking.contents(new_child_id)
    assert [result.changes for result in sync_runs("checkpoints", verify=True)] == [(), ()]
    assert (tracking.contents(new_id), tracking.contents(new_child_id)) == contents


def _documents(uri: str, database: str) -> dict[str, list[dict[str, Any]]]:
    client: MongoClient[dict[str, Any]]
    with MongoClient(uri) as client:
        return {
            name: sorted(
                ({k: v for k, v in row.items() if k not in ("_id", UPDATED_AT)} for row in client[database][name].find()),
                key=lambda row: json.dumps(row, default=str, sort_keys=True),
            )
            for name in (RUNS, CHECKPOINTS, METRICS)
        }


def _sync_mongo(uri: str, database: str) -> list[SyncResult]:
    results = sync_runs("checkpoints", MirrorAddresses(mongo_uri=uri, mongo_db=database))
    assert {result.error for result in results} == {None}
    return results


def _folder_of_runs(number: int) -> None:
    for index in range(number):
        journal = start_run(Path("checkpoints"), f"run-{index}", agent_id=f"agent_{index % 2}", config={"seed": index})
        for step in range(1, 121):
            add_point(journal, 10 * step, ep_rew_mean=step / 3)
        for episode in (10, 20, 30):
            save(journal, episode)
        prune(journal, 10)
        journal.update(status="completed", ended_at=ENDED)
        journal.close()


def test_a_whole_database_is_made_again_from_a_folder_of_runs(mongo_uri: str, mongo_database: str) -> None:
    _folder_of_runs(3)
    assert len(_sync_mongo(mongo_uri, mongo_database)) == 3
    before = _documents(mongo_uri, mongo_database)
    assert [len(rows) for rows in before.values()] == [3, 9, 360]
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_uri) as client:
        client.drop_database(mongo_database)
    _sync_mongo(mongo_uri, mongo_database)
    assert _documents(mongo_uri, mongo_database) == before
    reader, folder = MongoRuns(mongo_uri, mongo_database), FolderRuns("checkpoints")
    assert reader.list() == folder.list()
    for run in folder.list():
        assert reader.get(run["run_id"]) == folder.get(run["run_id"])
        assert reader.curve(run["run_id"]) == folder.curve(run["run_id"])
    reader.close()
    assert {result.changes for result in _sync_mongo(mongo_uri, mongo_database)} == {()}


_EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "record-gone": (lambda db: db[RUNS].delete_one({"_id": "run-0"}), "the record was missing"),
    "record-edited": (
        lambda db: db[RUNS].update_one({"_id": "run-0"}, {"$set": {"status": "running", "config": 1, "foreign": 2}}),
        "the record had another config, foreign, status",
    ),
    "runs-dropped": (lambda db: db[RUNS].drop(), "the record was missing"),
    "checkpoints-dropped": (lambda db: db[CHECKPOINTS].drop(), "checkpoints: 3 missing or different sent"),
    "metrics-dropped": (lambda db: db[METRICS].drop(), "learning curve: 120 missing or different sent"),
    "entry-edited": (
        lambda db: db[CHECKPOINTS].update_one({"run_id": "run-0", "episode": 20}, {"$set": {"sha256": "f" * 64}}),
        "checkpoints: 1 missing or different sent",
    ),
    "entry-of-the-future": (
        lambda db: db[CHECKPOINTS].update_one({"run_id": "run-0", "episode": 20}, {"$set": {"attempt": 99}}),
        "checkpoints: 1 missing or different sent",
    ),
    "foreign-entries": (
        lambda db: db[CHECKPOINTS].insert_many([{"run_id": "run-0", "episode": e} for e in (40, None, "x", [1])]),
        "checkpoints: 4 that the folder does not know removed",
    ),
    "point-edited": (
        lambda db: db[METRICS].update_one({"run_id": "run-0", "num_timesteps": 20}, {"$set": {"ep_rew_mean": 9e9}}),
        "learning curve: 1 missing or different sent",
    ),
    "foreign-points": (
        lambda db: db[METRICS].insert_many([{"run_id": "run-0", "time": "x", "num_timesteps": n} for n in range(150)]),
        "learning curve: 150 that the folder does not know removed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", _EDITS)
def test_what_was_dropped_or_edited_in_mongodb_is_made_good_and_told(
    mongo_uri: str, mongo_database: str, edit: str
) -> None:
    _folder_of_runs(1)
    _sync_mongo(mongo_uri, mongo_database)
    before = _documents(mongo_uri, mongo_database)
    reader = MongoRuns(mongo_uri, mongo_database)
    shown = (reader.get("run-0"), reader.summaries(), reader.glances(["run-0"]), reader.version("run-0"))
    inflict, told = _EDITS[edit]
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_uri) as client:
        inflict(client[mongo_database])
    assert _documents(mongo_uri, mongo_database) != before
    [result] = _sync_mongo(mongo_uri, mongo_database)
    assert any(line.startswith(told) for line in result.changes), result.changes
    assert _documents(mongo_uri, mongo_database) == before
    # A reader that has kept what it read is told by the stamp.
    assert (reader.get("run-0"), reader.summaries(), reader.glances(["run-0"])) == shown[:3]
    assert reader.version("run-0") != shown[3]
    reader.close()
    [result] = _sync_mongo(mongo_uri, mongo_database)
    assert result.changes == ()


def test_the_command_tells_what_it_healed_as_lines_and_as_json(tracking: Tracking, tmp_path: Path) -> None:
    folder, run_id = _mirrored_run(tracking)

    def command(*words: str) -> str:
        done = python("-m", "sb3_mlflow_ckpt", "checkpoints", "sync", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    _edit(tracking.artifacts(run_id) / "ep000030.zip", b"other")
    lines = command("--verify").splitlines()
    where = f"{Path('checkpoints') / folder.agent_id / folder.run_id}: MLflow"
    assert lines == [
        f"{where}: checkpoints/ep000030.zip: ep000030.zip has other bytes",
        f"{where}: checkpoints/ep000030.zip is sent",
        f"{where}: ok",
    ]
    assert json.loads(command("--json")) == [
        {"folder": str(folder.path), "mirror": "MLflow", "error": None, "changes": []}
    ]


def test_what_was_done_is_told_though_what_came_after_it_failed(tracking: Tracking, tmp_path: Path) -> None:
    """The next sync finds the run made already, so that nobody would ever be told."""
    folder, run_id = _mirrored_run(tracking)
    uri = f"sqlite:///{tmp_path}/other.db"
    # Where the other MLflow would keep artifacts.
    (tmp_path / "mlruns").touch()
    command = ("-m", "sb3_mlflow_ckpt", "checkpoints", "sync", "--tracking-uri", uri)
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    where = f"{Path('checkpoints') / folder.agent_id / folder.run_id}: MLflow"
    made = read_record(folder)["mlflow"]["run_id"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{where}: the run is made as {made}: it was tracked at {tracking.uri}, as {run_id}"
    assert "Not a directory" in lines[-1]

    (tmp_path / "mlruns").unlink()
    done = python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {f"{where}: checkpoints/{name}.zip is sent" for name in ("ep000020", "ep000030")} <= {*lines}
    assert lines[-1] == f"{where}: ok"
