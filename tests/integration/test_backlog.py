"""A long outage costs files, not memory; what hangs beyond the end of a run writes nothing any more."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from journals import add_point, save, start_run
from mlflow import MlflowClient
from processes import script, wait_for

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.replication import Replicator
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.runs.mongo_database import METRICS, connect

# A run in a process of its own, so that its memory is its own: 1,000 points are 17 minutes of a training.
_RUN = """
import json, sys, urllib.parse
import psutil
from pathlib import Path
from fault_proxy import FaultProxy
from journals import add_point, save
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.policies import Retention, MirrorBacklog
from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.runs.document import new_record

mlflow_uri, mongo_uri, points, checkpoints = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
proxies = [FaultProxy(urllib.parse.urlsplit(uri).port) for uri in (mlflow_uri, mongo_uri)]
mirrors = [
    MLflowMirror(f"http://127.0.0.1:{proxies[0].port}"),
    MongoMirror(f"mongodb://127.0.0.1:{proxies[1].port}/?directConnection=true&journal=true", "backlog"),
]
record = new_record(run_id="", agent_id="a", name=None, algo="PPO", env_id=None, config={}, total_timesteps=None,
                    parent=None, root_run_id=None, heartbeat_seconds=1.0, environment={})
run_id = [mirror.open(record) for mirror in mirrors][0]
for mirror in mirrors:
    record |= mirror.describe()
folder = RunFolder(Path("checkpoints"), "a", run_id)
options = RunOptions(Retention(0), MirrorBacklog(10**6), 1.0, 300.0)
live = LiveRun(folder, record | {"run_id": run_id, "root_run_id": run_id}, mirrors, options)
journal, process = live._journal, psutil.Process()

def mebibytes():
    return process.memory_info().rss / 2**20

def fill(count, first):
    for step in range(first, first + count):
        add_point(journal, 10 * step, ep_rew_mean=step / 3, **{f"train/{name}": step / 7 for name in "abcdef"})

# What the clients take at their first use is no backlog.
fill(100, 1)
save(journal, 1)
while journal.waiting_for_mirror():
    live._ended.wait(0.1)
for proxy in proxies:
    proxy.set("hang")
before = mebibytes()
fill(points, 101)
for episode in range(2, checkpoints + 2):
    save(journal, episode, bytes(100_000))
threads = process.num_threads()
during = mebibytes()
for proxy in proxies:
    proxy.set("pass")
behind = live.finish("completed")
print(json.dumps({"run_id": run_id, "before": before, "during": during, "after": mebibytes(), "threads": threads,
                  "behind": behind, "bytes": folder.metrics.stat().st_size}))
"""


def test_a_backlog_is_in_files_and_not_in_memory(tmp_path: Path, mlflow_uri: str, mongo_uri: str) -> None:
    done = script(f"import sys; sys.argv[1:] = {[mlflow_uri, mongo_uri, '1000', '60']!r}\n{_RUN}", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["behind"] == []
    run_id = told["run_id"]
    client = MlflowClient(mlflow_uri)
    steps = [metric.step for metric in client.get_metric_history(run_id, "rollout/episodes")]
    assert steps == [10 * step for step in range(1, 1101)]
    zips = [file for file in client.list_artifacts(run_id, "checkpoints") if file.path.endswith(".zip")]
    assert len(zips) == 61
    reader = MongoRuns(mongo_uri, "backlog")
    assert [point["num_timesteps"] for point in reader.curve(run_id)] == steps
    assert len(reader.get(run_id)["checkpoint_paths"]) == 61
    reader.close()
    database = connect(mongo_uri, "backlog")
    assert database[METRICS].count_documents({"run_id": run_id}) == 1100
    database.client.close()
    # The files of the checkpoints alone are 6 MB; the ledger's own entries are some hundred bytes each.
    assert told["during"] - told["before"] < 12, told
    assert told["after"] - told["before"] < 40, told


@pytest.fixture
def proxy(mlflow_uri: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(urllib.parse.urlsplit(mlflow_uri).port or 0)
    yield proxy
    proxy.close()


def test_a_request_that_returns_after_the_end_writes_nothing_to_the_folder(tmp_path: Path, proxy: FaultProxy) -> None:
    mirror = MLflowMirror(f"http://127.0.0.1:{proxy.port}")
    journal = start_run(tmp_path, "run")
    mirror.open(journal.record)
    replicator = Replicator(mirror, journal)
    replicator.start()
    wait_for(lambda: journal.record["mlflow"], "the run in MLflow")
    proxy.set("slow")
    proxy.latency = 0.2
    save(journal, 50, bytes(2000))
    add_point(journal, 10)
    wait_for(lambda: proxy.mode == "slow" and replicator._thread.is_alive(), "a request that is under way")
    assert not replicator.close(0.2)
    journal.close()
    before = {path.name: path.read_bytes() for path in journal.folder.path.iterdir()}
    proxy.set("pass")
    wait_for(lambda: not replicator._thread.is_alive(), "the end of the thread")
    assert {path.name: path.read_bytes() for path in journal.folder.path.iterdir()} == before
    with pytest.raises(ValueError, match="is closed"):
        journal.add_missing(50)
    assert RunFolder.at(journal.folder.path) == journal.folder
