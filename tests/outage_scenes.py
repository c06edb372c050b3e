"""Owns what tests of outages share: both services, a trainer that takes the steps it is allowed, and the comparison."""

from __future__ import annotations

import hashlib
import itertools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow_server import MlflowServer
from processes import DEADLINE, Leash, start_trainer, wait_for
from servers import MongoServer

from sb3_mlflow_ckpt.errors import RunNotFoundError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.mirrors.naming import LATEST_TAG
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.runs.mongo_database import CHECKPOINTS, METRICS, RUNS, connect

DATABASE = "outages"
# Episodes of five steps, a checkpoint every fifty.
FLAGS = (
    *("--env-id", "toy_environments:FixedLength-v0", "--hyperparameters", "{n_steps: 64}"),
    *("--checkpoint-interval-episodes", "10", "--mongo-db", DATABASE),
)
_METRICS = {"episode": "rollout/episodes", "steps_per_second": "time/steps_per_second"}
_METRICS |= {name: f"rollout/{name}" for name in ("ep_rew_mean", "ep_len_mean")}


class Services:
    """An MLflow server and a MongoDB-compatible one that go down and come back together."""

    def __init__(self, tracking: MlflowServer, mongo: MongoServer) -> None:
        self._servers = (tracking, mongo)
        self.tracking_uri, self.mongo_uri = tracking.uri, mongo.uri

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--tracking-uri", self.tracking_uri, "--mongo-uri", self.mongo_uri)

    def stop(self) -> None:
        """Kill both."""
        for server in self._servers:
            server.stop()

    def start(self) -> None:
        """Start both again, at the same addresses with the same storage."""
        for server in self._servers:
            server.start()

    def runs(self) -> MongoRuns:
        return MongoRuns(self.mongo_uri, DATABASE)

    def contents(self, run_id: str) -> list[Any]:
        """Return all that both have of a run."""
        client = MlflowClient(self.tracking_uri)
        run = client.get_run(run_id)
        histories = {key: _history(client, run_id, key) for key in run.data.metrics}
        artifacts = [(item.path, item.file_size) for item in client.list_artifacts(run_id, "checkpoints")]
        database = connect(self.mongo_uri, DATABASE)
        documents = [[*database[name].find().sort("_id", 1)] for name in (RUNS, CHECKPOINTS, METRICS)]
        database.client.close()
        return [run.to_dictionary(), histories, artifacts, documents]


class Training:
    """A trainer in a process of its own, which takes the steps that a test allows."""

    def __init__(self, cwd: Path, *flags: object) -> None:
        self.checkpoint_dir = cwd / "checkpoints"
        self._leash = Leash(cwd, 0)
        self._allowed = 0
        self.log = cwd / "trainer.log"
        self.process = start_trainer(*FLAGS, "--env-wrappers", self._leash.wrapper, *flags, cwd=cwd)
        wait_for(lambda: [*self.checkpoint_dir.glob("*/*/run.json")], "the start", self.process)
        [record] = self.checkpoint_dir.glob("*/*/run.json")
        self.folder = RunFolder.at(record.parent)

    def advance(self, steps: int) -> None:
        """Go on until so many steps are taken and their checkpoints are committed."""
        self._allow(max(steps, self._allowed))
        wait_for(lambda: len(self.saved) >= steps // 50, f"the checkpoint at {steps} steps", self.process)

    def add_point(self) -> None:
        """Go on, a step at a time, until the learning curve has a further point."""
        before = len(self.points)
        steps = itertools.count(self._allowed + 1)
        wait_for(lambda: self._allow(next(steps)) or len(self.points) > before, "a point", self.process)

    def release(self) -> None:
        """Go on to the end."""
        self._leash.release()

    def _allow(self, steps: int) -> None:
        self._leash.allow(steps)
        self._allowed = steps

    def end(self) -> str:
        """Wait for a successful end; return what was printed."""
        code = self.process.wait(DEADLINE)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    @property
    def record(self) -> dict[str, Any]:
        return dict(json.loads(self.folder.record.read_bytes()))

    @property
    def points(self) -> list[dict[str, Any]]:
        return _lines(self.folder.metrics)

    @property
    def saved(self) -> dict[int, str]:
        """The hash of each checkpoint that was committed, by episode."""
        return {line["episode"]: line["sha256"] for line in _lines(self.folder.events) if line["event"] == "saved"}

    @property
    def mirrored(self) -> set[int]:
        return {line["episode"] for line in _lines(self.folder.events) if line["event"] == "mirrored"}

    @property
    def on_disk(self) -> set[int]:
        return {int(path.stem[2:]) for path in self.folder.path.glob("ep*.zip")}

    def is_mirrored(self, services: Services) -> bool:
        """Tell whether both services have every checkpoint that was committed so far."""
        if self.mirrored != set(self.saved):
            return False
        try:
            stored = services.runs().get(self.folder.run_id)["checkpoint_paths"]
        except RunNotFoundError:
            return False
        return {entry["episode"] for entry in stored} == self.mirrored

    def assert_nothing_is_missing(self, services: Services, download: Path) -> None:
        """Compare both services with the disk: files, records, the learning curve, the status."""
        saved, points = self.saved, self.points
        assert self.record["status"] == "completed"
        run_id = self.record["mlflow"]["run_id"]
        client = MlflowClient(services.tracking_uri)
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.info.start_time <= run.info.end_time
        assert run.data.tags[LATEST_TAG] == f"checkpoints/ep{max(saved):06d}.zip"

        mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path="checkpoints", dst_path=str(download), tracking_uri=services.tracking_uri
        )
        copies = {path.name: path for path in (download / "checkpoints").iterdir()}
        assert copies.keys() == {f"ep{e:06d}{suffix}" for e in saved for suffix in (".zip", "_metadata.json")}
        for episode, sha256 in saved.items():
            assert hashlib.sha256(copies[f"ep{episode:06d}.zip"].read_bytes()).hexdigest() == sha256
            metadata = json.loads(copies[f"ep{episode:06d}_metadata.json"].read_bytes())
            assert (metadata["episode"], metadata["files"][0]["sha256"]) == (episode, sha256)

        for column in {column for point in points for column in point} - {"num_timesteps", "time"}:
            expected = [(p["num_timesteps"], _ms(p["time"]), p[column]) for p in points if p.get(column) is not None]
            name = _METRICS.get(column, column)
            assert _history(client, run_id, name) == expected, name

        folder, database = FolderRuns(self.checkpoint_dir), services.runs()
        stored = database.get(self.folder.run_id)
        assert {entry["episode"]: entry["sha256"] for entry in stored["checkpoint_paths"]} == saved
        assert {entry["uri"] for entry in stored["checkpoint_paths"]} == {
            f"runs:/{run_id}/checkpoints/ep{episode:06d}.zip" for episode in saved
        }
        assert stored == folder.get(self.folder.run_id)
        assert database.curve(self.folder.run_id) == folder.curve(self.folder.run_id) == points


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file that may be growing now."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, int, float]]:
    return sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key))


def _ms(time: str) -> int:
    return int(datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() * 1000)
