"""`runs reap`: trainers that were really killed are settled, on disk and in their mirrors; living ones are not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from journals import start_run
from mlflow import MlflowClient
from processes import ROOT, Leash, python, start_trainer, wait_for

from sb3_mlflow_ckpt.atomic import temporary_sibling
from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.journal import read_record
from sb3_mlflow_ckpt.mirrors.naming import SWEEP_HOST_TAG, SWEEP_PID_TAG, SWEEP_TAG, milliseconds
from sb3_mlflow_ckpt.reap import reap_runs
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.mongo import MongoRuns

STALE = "2020-01-01T00:00:00.000Z"


def reap(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "sb3_mlflow_ckpt", "runs", "reap", "--json", *words, cwd=cwd)


def actions(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what was done, without the orphans: runs of other tests on the same MLflow server may look like such."""
    return [item["action"] for item in json.loads(done.stdout) if item["action"] != "orphan"]


def test_a_killed_trainer_is_settled_everywhere_and_a_living_one_is_not_touched(
    tmp_path: Path, mlflow_uri: str, mongo_uri: str, mongo_database: str
) -> None:
    leash = Leash(tmp_path, 300)
    trainer = start_trainer(
        *("--tracking-uri", mlflow_uri, "--mongo-uri", mongo_uri, "--mongo-db", mongo_database, "--agent-id", "a"),
        *("--env-wrappers", leash.wrapper, "--checkpoint-interval-episodes", 2, "--heartbeat-seconds", 0.2),
        cwd=tmp_path,
    )  # fmt: skip
    runs = MongoRuns(mongo_uri, mongo_database)

    def sent() -> bool:
        found = FolderRuns(tmp_path / "checkpoints").list()
        return bool(found) and any(
            item["state"] == "mirrored" for item in FolderRuns(tmp_path / "checkpoints").get(found[0]["run_id"])["checkpoint_paths"]
        )  # fmt: skip

    heartbeats: set[str] = set()

    def stands_still() -> bool:
        """At the end of its leash, where it has said so twice, nothing comes after its last heartbeat."""
        (run,) = FolderRuns(tmp_path / "checkpoints").list()
        if run["progress"]["num_timesteps"] == 300:
            heartbeats.add(run["heartbeat_at"])
        return len(heartbeats) > 1

    try:
        wait_for(sent, "a checkpoint is in MLflow", trainer)
        (run,) = FolderRuns(tmp_path / "checkpoints").list()
        alive = reap(cwd=tmp_path)
        assert actions(alive) == ["alive"], alive.stderr
        assert FolderRuns(tmp_path / "checkpoints").list()[0]["status"] == "running"
        wait_for(stands_still, "heartbeats at the last step", trainer)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(300)
    run_id = run["run_id"]
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert actions(reap("--dry-run", cwd=tmp_path)) == ["would fail"]
    assert FolderRuns(tmp_path / "checkpoints").get(run_id)["status"] == "running"
    done = reap("--run-id", run_id, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert actions(done) == ["failed"]
    record = FolderRuns(tmp_path / "checkpoints").get(run_id)
    assert (record["status"], record["error"]["type"]) == ("failed", "ProcessLost")
    assert str(trainer.pid) in record["error"]["message"]
    assert record["ended_at"] == record["heartbeat_at"]
    info = MlflowClient(mlflow_uri).get_run(run_id).info
    assert (info.status, info.end_time) == ("FAILED", milliseconds(record["ended_at"]))
    stored = runs.get(run_id)
    runs.close()
    assert (stored["status"], stored["ended_at"], stored["error"]) == ("failed", record["ended_at"], record["error"])
    assert list_checkpoints(tmp_path / "checkpoints") == kept
    for path in kept:
        verify_checkpoint(path)
    assert json.loads(reap("--run-id", run_id, cwd=tmp_path).stdout) == []


@pytest.mark.parametrize(
    ("host", "heartbeat", "action"),
    [("elsewhere", STALE, "failed"), ("elsewhere", None, "fresh"), (None, None, "failed")],
    ids=["another host's stale", "another host's fresh", "this host's"],
)
def test_the_run_of_another_host_is_settled_only_when_its_heartbeat_is_stale(
    tmp_path: Path, host: str | None, heartbeat: str | None, action: str
) -> None:
    import socket

    journal = start_run(tmp_path, "run", host=host or socket.gethostname())
    if heartbeat:
        journal.update(heartbeat_at=heartbeat)
        os.utime(journal.folder.record, (0, 0))
    journal.close()
    # What a living run of another host is writing now must not be taken for a dead one's.
    half_written = temporary_sibling(journal.folder.record)
    half_written.touch()
    assert [result.action for result in reap_runs(tmp_path)] == [action]
    assert half_written.exists() == (action == "fresh")
    assert read_record(journal.folder)["status"] == ("failed" if action == "failed" else "running")


def test_a_mirror_that_does_not_answer_is_told_later(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run", mirrors=["MongoDB"], mongo={"uri": "mongodb://127.0.0.1:9", "database": "d"})
    journal.update(heartbeat_at=STALE)
    os.utime(journal.folder.record, (0, 0))
    journal.close()
    done = reap("--checkpoint-dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    (item,) = json.loads(done.stdout)
    assert item["action"] == "failed"
    assert "checkpoints sync" in item["problem"]
    assert read_record(journal.folder)["status"] == "failed"


def test_mlflow_runs_without_a_folder_are_named_and_failed_only_when_asked(tmp_path: Path, mlflow_uri: str) -> None:
    """What `mlflow run` leaves when it is killed before its child has made a folder."""
    client = MlflowClient(mlflow_uri)
    experiment = client.create_experiment(tmp_path.name)
    project = {"mlflow.project.entryPoint": "main", "mlflow.source.type": "PROJECT"}
    started = int(time.time() * 1000) - 600_000

    def run(start: int, **tags: str) -> str:
        return str(client.create_run(experiment, start_time=start, tags=tags).info.run_id)

    orphan = run(started, **project, **{"mlflow.source.name": f"file://{ROOT}"})
    ours = run(started, **{"sb3_mlflow_ckpt.algo": "ppo"})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    drivers = [{SWEEP_TAG: "s", SWEEP_HOST_TAG: socket.gethostname(), SWEEP_PID_TAG: str(pid)} for pid in (ended.pid, os.getpid())]
    sweep, living_sweep = (run(started, **tags) for tags in drivers)
    heard = run(started, **{"sb3_mlflow_ckpt.algo": "ppo"})
    client.log_metric(heard, "rollout/ep_rew_mean", 1.0)
    others = [heard, living_sweep, run(started), run(int(time.time() * 1000), **{"sb3_mlflow_ckpt.algo": "ppo"})]
    others.append(run(started, **project, **{"mlflow.source.name": f"file://{tmp_path}/another-project"}))
    journal = start_run(tmp_path, run(started, **{"sb3_mlflow_ckpt.algo": "ppo"}))
    others.append(journal.folder.run_id)
    journal.update(status="completed")
    journal.close()

    flags = ("--checkpoint-dir", tmp_path, "--tracking-uri", mlflow_uri)
    named = reap(*flags, cwd=tmp_path)
    found = {item["run_id"]: item["action"] for item in json.loads(named.stdout)}
    assert {orphan: "orphan", ours: "orphan", sweep: "orphan"}.items() <= found.items()
    assert not found.keys() & set(others)
    assert "--mlflow-orphans" in named.stderr
    assert client.get_run(orphan).info.status == "RUNNING"
    assert reap(*flags, "--mlflow-orphans", "--dry-run", cwd=tmp_path).returncode == 0
    assert client.get_run(orphan).info.status == "RUNNING"
    assert reap(*flags, "--mlflow-orphans", cwd=tmp_path).returncode == 0
    assert {client.get_run(run_id).info.status for run_id in (orphan, ours, sweep)} == {"FAILED"}
    assert client.get_run(orphan).info.end_time == started
    assert {client.get_run(run_id).info.status for run_id in others} == {"RUNNING"}
