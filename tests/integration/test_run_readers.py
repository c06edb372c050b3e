"""One suite over every store of runs: what holds for folders holds for MongoDB."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from journals import add_point, commit, mirror, prune, save, start_run, unmirror
from processes import wait_for
from pymongo import MongoClient

from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointNotFoundError, RunNotFoundError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.json_lines import append_line
from sb3_mlflow_ckpt.layout import RunFolder, pin_path
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.pins import pin_checkpoint, unpin_checkpoint
from sb3_mlflow_ckpt.runs import folder_index
from sb3_mlflow_ckpt.runs.folder import FolderRuns, read_run
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.runs.mongo_database import RUNS
from sb3_mlflow_ckpt.runs.reader import RunReader

RUN = "0123456789abcdef0123456789abcdef"
HOSTILE = ["..", ".", "", "../x", "a/b", "/etc", "..\\x", "a\0b", "con", "{$gt: 1}", "x" * 300]
STALE = "2020-01-01T00:00:00.000Z"


class Store:
    """A reader and a way to bring a journal before it."""

    def __init__(self, reader: RunReader, publish: Callable[[RunJournal], None]) -> None:
        self.reader = reader
        self._publish = publish

    def add(self, journal: RunJournal) -> None:
        self._publish(journal)
        journal.close()
        if journal.record["heartbeat_at"] == STALE:
            # The file that a dead run left is as old as its last heartbeat.
            os.utime(journal.folder.record, (0, 0))


def mongo_store(uri: str, database: str) -> Iterator[Store]:
    mirror, reader = MongoMirror(uri, database), MongoRuns(uri, database)
    yield Store(reader, mirror.replicate)
    mirror.close()
    reader.close()
    client: MongoClient[dict[str, Any]]
    with MongoClient(uri) as client:
        client.drop_database(database)


@pytest.fixture(params=["folder", "mongo-compatible", "mongodb"])
def store(request: pytest.FixtureRequest, tmp_path: Path, mongo_database: str) -> Iterator[Store]:
    if request.param == "folder":
        yield Store(FolderRuns(tmp_path), lambda journal: None)
        return
    uri = request.getfixturevalue("mongo_uri" if request.param == "mongo-compatible" else "real_mongo")
    yield from mongo_store(uri, mongo_database)


def eventful_run(checkpoint_dir: Path, run_id: str = RUN) -> RunJournal:
    config = {"wrappers": {"gym.Wrapper": {"$size": 84, "": None, "50%": [{"a.b": 1}]}}, "seed": 2**70, "lr": 1e-4}
    journal = start_run(checkpoint_dir, run_id, config=config)
    for episode in (50, 100, 150, 200, 1_000_000):
        save(journal, episode)
    mirror(journal, 50, "runs:/1/checkpoints/ep000050.zip")
    mirror(journal, 150, "runs:/1/checkpoints/ep000150.zip")
    unmirror(journal, 150)
    prune(journal, 50)
    prune(journal, 100)
    save(journal, 200, b"saved again")
    for step in (10, 20, 30):
        add_point(journal, step, ep_rew_mean=step / 3, **{"train/a.b": None})
    pin_checkpoint(journal.folder.model(150))
    pin_path(journal.folder.model(100)).touch()
    journal.update(progress={"num_timesteps": 30, "total_timesteps": 1000}, mlflow={"run_id": run_id})
    return journal


def test_a_run_shows_its_record_and_its_checkpoints_ascending(store: Store, tmp_path: Path) -> None:
    store.add(eventful_run(tmp_path))
    run = store.reader.get(RUN)
    states = [(item["episode"], item["state"], item["on_disk"]) for item in run["checkpoint_paths"]]
    assert states == [
        (50, "mirrored", False),
        (100, "pruned", False),
        (150, "local", True),
        (200, "local", True),
        (1_000_000, "local", True),
    ]
    # The marker of a checkpoint that is gone says nothing.
    assert [item["episode"] for item in run["checkpoint_paths"] if item["pinned"]] == [150]
    assert run["checkpoint_paths"][2]["path"] == str(tmp_path / "ppo_agent" / RUN / "ep000150.zip")
    assert run["checkpoint_paths"][3]["bytes"] == len(b"saved again")
    assert (run["run_id"], run["status"], run["schema_version"]) == (RUN, "running", 1)
    json.dumps(run, allow_nan=False)


def _publishes(store: Store, journal: RunJournal, pinned: bool) -> bool:
    # Pins are looked for in a part of the time only.
    store._publish(journal)
    return store.reader.get(RUN)["checkpoint_paths"][0]["pinned"] is pinned


def test_a_pin_that_comes_and_goes_reaches_the_database(mongo_uri: str, mongo_database: str, tmp_path: Path) -> None:
    for store in mongo_store(mongo_uri, mongo_database):
        journal = start_run(tmp_path, RUN)
        save(journal, 50)
        for change, pinned in ((pin_checkpoint, True), (unpin_checkpoint, False)):
            change(journal.folder.model(50))
            wait_for(partial(_publishes, store, journal, pinned), "the pin")
        journal.close()


def test_every_store_returns_the_same_document(store: Store, tmp_path: Path) -> None:
    store.add(eventful_run(tmp_path))
    folder = FolderRuns(tmp_path)
    assert store.reader.get(RUN) == folder.get(RUN)
    assert store.reader.list() == folder.list()
    assert store.reader.curve(RUN) == folder.curve(RUN)


def test_keys_with_dots_dollars_and_percents_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    config = {"a.b": {"$set": 1, "$": 2, ".": 3, "%2E": 4, "%int": "5", "": 6, "a\0b": 7}, "$where": [{"$x.y": None}]}
    store.add(start_run(tmp_path, RUN, config=config))
    assert store.reader.get(RUN)["config"] == config


def test_a_summary_has_no_checkpoints(store: Store, tmp_path: Path) -> None:
    store.add(eventful_run(tmp_path))
    (summary,) = store.reader.list()
    assert "checkpoint_paths" not in summary
    assert {**summary, "checkpoint_paths": store.reader.get(RUN)["checkpoint_paths"]} == store.reader.get(RUN)


def test_an_id_is_accepted_with_and_without_dashes(store: Store, tmp_path: Path) -> None:
    dashed = str(uuid.UUID(int=7))
    store.add(start_run(tmp_path, RUN))
    store.add(start_run(tmp_path, dashed))
    for run_id in (RUN, str(uuid.UUID(RUN)), RUN.upper()):
        assert store.reader.get(run_id)["run_id"] == RUN
        assert store.reader.curve(run_id) == []
    for run_id in (dashed, dashed.replace("-", "")):
        assert store.reader.get(run_id)["run_id"] == dashed


@pytest.mark.parametrize("run_id", ["unknown", "f00d" * 8, *HOSTILE])
def test_an_id_that_no_run_has_is_not_found(store: Store, tmp_path: Path, run_id: str) -> None:
    store.add(start_run(tmp_path / "checkpoints", RUN))
    for read in (store.reader.get, store.reader.curve):
        with pytest.raises(RunNotFoundError) as caught:
            read(run_id)
        assert caught.value.run_id == run_id


@pytest.mark.parametrize("agent_id", ["unknown", *HOSTILE])
def test_an_agent_that_has_no_runs_lists_none(store: Store, tmp_path: Path, agent_id: str) -> None:
    store.add(start_run(tmp_path, RUN))
    assert store.reader.list(agent_id=agent_id) == []


def test_an_empty_store_lists_no_runs(store: Store) -> None:
    assert store.reader.list() == []


def ids(runs: list[dict[str, Any]]) -> list[str]:
    return [run["run_id"] for run in runs]


def test_the_list_is_newest_first_by_agent_and_no_longer_than_asked(store: Store, tmp_path: Path) -> None:
    for number, agent_id in enumerate(["b", "a", "b", "a"]):
        started = f"2026-01-0{number + 1}T00:00:00.000Z"
        store.add(start_run(tmp_path, f"run-{number}", agent_id=agent_id, started_at=started))
    assert ids(store.reader.list()) == ["run-3", "run-2", "run-1", "run-0"]
    assert ids(store.reader.list(agent_id="a")) == ["run-3", "run-1"]
    assert ids(store.reader.list(limit=2)) == ["run-3", "run-2"]
    assert ids(store.reader.list(agent_id="b", limit=1)) == ["run-2"]
    assert store.reader.list(limit=0) == []
    assert len(store.reader.list(limit=100)) == 4


def test_runs_that_started_at_once_have_one_order(store: Store, tmp_path: Path) -> None:
    for run_id in ("run-b", "run-c", "run-a"):
        store.add(start_run(tmp_path, run_id, started_at=STALE))
    assert ids(store.reader.list()) == ["run-c", "run-b", "run-a"]


def test_a_status_is_the_derived_one_everywhere(store: Store, tmp_path: Path) -> None:
    for status in ("running", "completed", "failed", "interrupted"):
        store.add(start_run(tmp_path, f"run-{status}", status=status))
    for status in ("running", "completed"):
        store.add(start_run(tmp_path, f"stale-{status}", status=status, heartbeat_at=STALE))
    assert ids(store.reader.list(status="running")) == ["run-running"]
    assert ids(store.reader.list(status="lost")) == ["stale-running"]
    assert ids(store.reader.list(status="lost", limit=1)) == ["stale-running"]
    assert sorted(ids(store.reader.list(status="completed"))) == ["run-completed", "stale-completed"]
    assert ids(store.reader.list(status="failed")) == ["run-failed"]
    assert ids(store.reader.list(status="interrupted")) == ["run-interrupted"]
    assert store.reader.list(status="unheard-of") == []
    assert store.reader.get("stale-running")["status"] == "lost"
    assert store.reader.get("stale-completed")["status"] == "completed"


def test_a_late_heartbeat_makes_a_lost_run_running_again(store: Store, tmp_path: Path) -> None:
    store.add(start_run(tmp_path, RUN, heartbeat_at=STALE))
    assert store.reader.get(RUN)["status"] == "lost"
    journal = RunJournal(RunFolder(tmp_path, "ppo_agent", RUN))
    soon = datetime.now(timezone.utc) + timedelta(hours=1)
    journal.update(heartbeat_at=soon.isoformat(timespec="milliseconds").replace("+00:00", "Z"))
    store.add(journal)
    assert store.reader.get(RUN)["status"] == "running"


def test_a_curve_is_in_the_order_of_time_even_where_steps_went_back(store: Store, tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    points = [
        {"num_timesteps": 300, "episode": 3, "time": "2026-01-01T00:00:02.000Z", "ep_rew_mean": 3.0},
        {"num_timesteps": 100, "episode": 1, "time": "2026-01-01T00:00:01.000Z", "ep_rew_mean": None},
        # Resumed from an older checkpoint in the same folder.
        {"num_timesteps": 200, "episode": 2, "time": "2026-01-01T00:00:03.000Z", "ep_rew_mean": 2.5},
        {"num_timesteps": 200, "episode": 2, "time": "2026-01-01T00:00:03.000Z", "ep_rew_mean": 2.6},
    ]
    # As lines, since a journal lets times only go forward.
    for line in (*points, {"note": "no point"}):
        append_line(journal.folder.metrics, line)
    store.add(journal)
    assert store.reader.curve(RUN) == [points[1], points[0], points[3]]


def test_a_curve_of_many_points_is_whole(store: Store, tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    with journal.folder.metrics.open("w") as file:
        for step in range(1001):
            time = f"2026-01-01T00:{step // 60:02d}:{step % 60:02d}.000Z"
            file.write(json.dumps({"num_timesteps": step, "time": time, "run_id": "a scalar of this name"}) + "\n")
        file.write('{"num_timesteps": 1001, "ti')
    store.add(journal)
    assert [point["num_timesteps"] for point in store.reader.curve(RUN)] == list(range(1001))


# What only a folder can meet: files that a crash, a person or another program left.


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"run_id": "another"}', '{"run_id": ["x"]}', "[" * 99_999]
)
def test_a_corrupt_record_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    for run_id in ("good", "bad"):
        start_run(tmp_path, run_id).close()
    bad = RunFolder(tmp_path, "ppo_agent", "bad")
    bad.record.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert ids(FolderRuns(tmp_path).list()) == ["good"]
    assert str(bad.record) in caplog.text
    with pytest.raises(RunNotFoundError):
        FolderRuns(tmp_path).get("bad")
    with pytest.raises(CheckpointCorruptError):
        read_run(bad)


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "ppo_agent", RUN)
    folder.path.mkdir(parents=True)
    (tmp_path / "ppo_agent" / "a file").touch()
    (tmp_path / "another file").touch()
    (tmp_path / ".git" / RUN).mkdir(parents=True)
    assert FolderRuns(tmp_path).list() == []
    with pytest.raises(RunNotFoundError):
        FolderRuns(tmp_path).get(RUN)
    with pytest.raises(CheckpointNotFoundError):
        read_run(folder)


def test_a_checkpoint_folder_that_does_not_exist_yet_has_no_runs(tmp_path: Path) -> None:
    assert FolderRuns(tmp_path / "later").list() == []


def test_a_commit_whose_line_is_missing_counts(tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    save(journal, 50)
    commit(journal.folder, 100)
    journal.close()
    assert [item["episode"] for item in FolderRuns(tmp_path).get(RUN)["checkpoint_paths"]] == [50, 100]


def test_a_removal_whose_line_is_missing_counts(tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    save(journal, 50)
    journal.folder.metadata(50).unlink()
    journal.close()
    (item,) = FolderRuns(tmp_path).get(RUN)["checkpoint_paths"]
    assert (item["state"], item["on_disk"]) == ("pruned", False)


def test_a_checkpoint_that_was_saved_after_its_removal_is_there_again(tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    save(journal, 50)
    mirror(journal, 50, "runs:/1/old")
    prune(journal, 50)
    commit(journal.folder, 50, b"new")
    journal.close()
    (item,) = FolderRuns(tmp_path).get(RUN)["checkpoint_paths"]
    assert (item["state"], item["uri"], item["bytes"]) == ("local", None, 3)


def test_a_commit_whose_metadata_is_corrupt_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = start_run(tmp_path, RUN)
    save(journal, 50)
    commit(journal.folder, 100)
    journal.folder.metadata(100).write_text("{")
    journal.close()
    assert [item["episode"] for item in FolderRuns(tmp_path).get(RUN)["checkpoint_paths"]] == [50]
    assert "ep000100_metadata.json" in caplog.text


def test_reading_changes_nothing_in_a_folder(tmp_path: Path) -> None:
    journal = eventful_run(tmp_path)
    commit(journal.folder, 300)
    journal.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    FolderRuns(tmp_path).get(RUN)
    FolderRuns(tmp_path).list()
    FolderRuns(tmp_path).curve(RUN)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_paths_are_absolute_where_the_folder_was_named_relatively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = start_run(tmp_path / "my runs", RUN)
    save(journal, 50)
    journal.close()
    monkeypatch.chdir(tmp_path)
    (item,) = FolderRuns("my runs").get(RUN)["checkpoint_paths"]
    assert item["path"] == str(tmp_path / "my runs" / "ppo_agent" / RUN / "ep000050.zip")


@pytest.mark.parametrize(
    ("heartbeat_hours", "file_hours", "status"),
    [
        (0, 0, "running"),
        (-5, 0, "running"),  # The trainer's clock is behind.
        (0, -5, "running"),  # The file server's is.
        (48, 0, "running"),  # The trainer's clock is ahead ...
        (48, -5, "lost"),  # ... which must not keep a dead run alive.
        (-5, -5, "lost"),
    ],
)
def test_the_clock_of_the_file_system_is_asked_as_well(
    tmp_path: Path, heartbeat_hours: int, file_hours: int, status: str
) -> None:
    now = datetime.now(timezone.utc)
    journal = start_run(tmp_path, RUN, heartbeat_at=(now + timedelta(hours=heartbeat_hours)).isoformat())
    journal.close()
    written = (now + timedelta(hours=file_hours)).timestamp()
    os.utime(journal.folder.record, (written, written))
    assert FolderRuns(tmp_path).get(RUN)["status"] == status
    assert [run["status"] for run in FolderRuns(tmp_path).list()] == [status]


def test_every_store_returns_the_same_summaries_glances_and_parts(store: Store, tmp_path: Path) -> None:
    store.add(eventful_run(tmp_path))
    store.add(start_run(tmp_path, "bare", agent_id="other", error={"type": "E", "message": "m", "traceback": "t"}))
    folder = FolderRuns(tmp_path)
    by_id = {run["run_id"]: run for run in store.reader.summaries()}
    assert by_id == {run["run_id"]: run for run in folder.summaries()}
    assert by_id["bare"]["error"] == {"type": "E", "message": "m"}
    assert (by_id[RUN]["seed"], by_id[RUN]["progress"]["num_timesteps"]) == (2**70, 30)
    assert "config" not in by_id[RUN]
    glances = store.reader.glances([RUN, "bare", "unknown"])
    assert glances == folder.glances([RUN, "bare", "unknown"])
    seen = glances[RUN]
    assert (seen.checkpoints, seen.resumable, seen.waiting) == (5, 4, 0)
    assert seen.latest is not None and seen.latest["episode"] == 50  # By the time in its metadata, not by its number.
    assert [steps for steps, _ in seen.rewards] == [10, 20, 30]
    assert store.reader.record(RUN) == {k: v for k, v in store.reader.get(RUN).items() if k != "checkpoint_paths"}
    paths = store.reader.get(RUN)["checkpoint_paths"]
    assert store.reader.checkpoints(RUN) == paths
    assert store.reader.checkpoints(RUN, limit=2) == paths[-2:]
    assert store.reader.checkpoints(RUN, before=200, limit=2) == paths[1:3]
    assert store.reader.checkpoints(RUN, before=50) == []


def test_summaries_and_glances_follow_what_changes(store: Store, tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN, mirrors=["MLflow"])
    save(journal, 1)
    store.add(journal)
    assert [run["status"] for run in store.reader.summaries()] == ["running"]
    assert store.reader.glances([RUN])[RUN].waiting == 1
    versions = [store.reader.version(RUN)]
    assert store.reader.version(RUN) == versions[0]

    def change(do: Callable[[RunJournal], None]) -> None:
        journal = RunJournal(RunFolder(tmp_path, "ppo_agent", RUN))
        do(journal)
        store.add(journal)
        versions.append(store.reader.version(RUN))

    change(lambda journal: save(journal, 2))
    store.reader.summaries()
    assert store.reader.glances([RUN])[RUN].checkpoints == 2
    change(lambda journal: mirror(journal, 2, "runs:/1/2.zip"))
    store.reader.summaries()
    assert store.reader.glances([RUN])[RUN].waiting == 1
    change(lambda journal: add_point(journal, 10, ep_rew_mean=1.5))
    store.reader.summaries()
    assert store.reader.glances([RUN])[RUN].rewards == ((10, 1.5),)
    change(lambda journal: journal.update(status="completed"))
    assert [run["status"] for run in store.reader.summaries()] == ["completed"]
    assert len(set(versions)) == 5
    store.add(start_run(tmp_path, "second"))
    assert {run["run_id"] for run in store.reader.summaries()} == {RUN, "second"}


def test_a_folder_that_is_slow_to_look_at_is_looked_at_a_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pages ask for the list: none may make a slow disk the only thing that is done."""
    monkeypatch.setattr(folder_index, "_QUICK_SECONDS", 0.0)
    monkeypatch.setattr(folder_index, "_PAUSE_PER_LOOK", 1e9)
    folder = FolderRuns(tmp_path)
    start_run(tmp_path, "a").close()
    assert len(folder.summaries()) == 1
    start_run(tmp_path, "b").close()
    assert len(folder.summaries()) == 1
    monkeypatch.setattr(folder_index, "_PAUSE_PER_LOOK", 0)
    assert len(folder.summaries()) == 2


def test_runs_that_are_removed_are_summarized_no_more(store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        store.add(start_run(tmp_path, name))
    assert len(store.reader.summaries()) == 2
    if isinstance(store.reader, FolderRuns):
        shutil.rmtree(tmp_path / "ppo_agent" / "a")
    else:
        assert isinstance(store.reader, MongoRuns)
        store.reader._lazy.get()[RUNS].delete_one({"_id": "a"})
    # A database is asked now and then only.
    wait_for(lambda: [run["run_id"] for run in store.reader.summaries()] == ["b"], "it is gone")


def test_time_alone_makes_a_summary_lost_or_stalled(store: Store, tmp_path: Path) -> None:
    store.add(start_run(tmp_path, "lost", heartbeat_at=STALE))
    store.add(start_run(tmp_path, "stalled", last_step_at=STALE))
    assert {run["run_id"]: run["status"] for run in store.reader.summaries()} == {"lost": "lost", "stalled": "stalled"}
    assert ids(store.reader.list(status="stalled")) == ["stalled"]


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 333])
def test_every_store_picks_the_same_few_points_of_a_curve(store: Store, tmp_path: Path, count: int) -> None:
    journal = start_run(tmp_path, RUN)
    for step in range(1, count + 1):
        add_point(journal, 10 * step, ep_rew_mean=step / 7, **({"train/loss": 0.1} if step % 3 else {}))
    with journal.folder.metrics.open("ab") as file:
        file.write(b'{"num_timesteps": 999999, "time": "20')  # Torn by a crash.
    store.add(journal)
    whole = store.reader.curve(RUN)
    assert len(whole) == count
    for points in (1, 2, 10, 100, 1000):
        few = store.reader.curve(RUN, points)
        assert few == FolderRuns(tmp_path).curve(RUN, points)
        assert len(few) <= points
        assert all(point in whole for point in few)
        assert few == whole if count <= points else (points == 1 or few[0] == whole[0]) and few[-1] == whole[-1]
        # Evenly: no gap is many times as wide as another.
        assert len(few) >= min(count, points / 4)


def test_points_that_are_added_change_nothing_of_those_that_were_picked(store: Store, tmp_path: Path) -> None:
    journal = start_run(tmp_path, RUN)
    picked: set[int] = set()
    for step in range(1, 200):
        add_point(journal, 10 * step, ep_rew_mean=1.0)
        few = [point["num_timesteps"] for point in FolderRuns(tmp_path).curve(RUN, 20)]
        # Those that stay: points only go where all are thinned.
        assert set(few[:-1]) <= picked | {10 * step, 10 * (step - 1)}
        picked |= set(few)
    store.add(journal)
    assert [point["num_timesteps"] for point in store.reader.curve(RUN, 20)] == few
