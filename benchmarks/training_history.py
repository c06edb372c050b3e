"""Measures the Training History over many runs: from run folders, and from a MongoDB-compatible server.

    python benchmarks/training_history.py --runs 10000 --checkpoints 5000 --points 1000000

makes that many runs, and one of that many checkpoints on disk and points of its curve; serves them with
`sb3-mlflow-ckpt serve`; and prints how long answers take, what pages weigh, the server's memory, and what many open
tabs on runs that train cost it. `--mongo-uri` names a database to fill and to measure; the tests' own server where it
is not given.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from pymongo import MongoClient

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from processes import environment  # noqa: E402
from servers import MongoServer  # noqa: E402

from sb3_mlflow_ckpt import json_lines  # noqa: E402
from sb3_mlflow_ckpt.atomic import dump_json  # noqa: E402
from sb3_mlflow_ckpt.layout import RunFolder  # noqa: E402
from sb3_mlflow_ckpt.metadata import CheckpointMetadata, FileEntry, timestamp_now  # noqa: E402
from sb3_mlflow_ckpt.runs.curve import read_points  # noqa: E402
from sb3_mlflow_ckpt.runs.document import SCHEMA_VERSION, new_record  # noqa: E402
from sb3_mlflow_ckpt.runs.folder import FolderRuns  # noqa: E402
from sb3_mlflow_ckpt.runs.mongo_database import (  # noqa: E402
    ATTEMPT,
    CHECKPOINTS,
    CURVE_END,
    END,
    LEVEL,
    METRICS,
    RUNS,
    SEEN_AT,
    UPDATED_AT,
    connect,
    encode,
    make_indexes,
)

AGENTS = ("ppo_agent", "dqn_agent", "sac_agent", "a2c_agent")
ENVIRONMENTS = ("CartPole-v1", "LunarLander-v3", "Pendulum-v1", "Ant-v5")
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
BIG = "f" * 32


def stamp(seconds: float) -> str:
    """Return a time after `START` as records hold it."""
    return (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def record_of(number: int, run_id: str, chance: random.Random) -> dict[str, Any]:
    """Return a record as a training of a day leaves it."""
    agent = AGENTS[number % len(AGENTS)]
    env_id = chance.choice(ENVIRONMENTS)
    hyperparameters = {f"setting_{n}": chance.random() for n in range(20)}
    config = {"algo": agent.split("_")[0], "env_id": env_id, "seed": number, "total_timesteps": 1_000_000}
    status = chance.choices(("completed", "failed", "interrupted", "running"), (80, 8, 10, 2))[0]
    record = new_record(
        run_id=run_id,
        agent_id=agent,
        name=f"sweep {number // 10} trial {number % 10}",
        algo=agent.split("_")[0].upper(),
        env_id=env_id,
        config={**config, "hyperparameters": hyperparameters},
        total_timesteps=1_000_000,
        parent=None,
        root_run_id=None,
        heartbeat_seconds=10.0,
        environment={"host": f"node-{number % 16}", "pid": number, "command": "train " * 20},
    )
    ended = None if status == "running" else stamp(600 * number + 86_400)
    progress = {**record["progress"], "num_timesteps": 1_000_000, "episode": 5000, "mean_reward": chance.gauss(100, 50)}
    times = {"started_at": stamp(600 * number), "heartbeat_at": stamp(600 * number + 86_000), "ended_at": ended}
    return {**record, "status": status, "progress": progress, **times, "mirrors": ["MLflow"]}


def points_of(count: int, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the points of a curve, one a second."""
    for number in range(count):
        reward = 100 * number / count + chance.gauss(0, 5)
        extra = {"train/loss": chance.random(), "train/entropy_loss": -chance.random(), "ep_len_mean": 200.0}
        row = {"num_timesteps": 400 * number, "episode": 2 * number, "time": stamp(number), "ep_rew_mean": reward}
        yield {**row, **extra, "steps_per_second": 400.0}


def write_run(folder: RunFolder, record: dict[str, Any], points: Iterator[dict[str, Any]], checkpoints: int) -> None:
    """Write a run folder as a training leaves it, without its waits for the disk."""
    folder.path.mkdir(parents=True)
    folder.record.write_bytes(dump_json(record))
    with folder.metrics.open("wb") as file:
        for point in points:
            file.write(dump_json(point, indent=None))
    with folder.events.open("wb") as file:
        for episode in range(1, checkpoints + 1):
            content = f"{folder.run_id} {episode}".encode()
            path = folder.model(episode)
            entry = FileEntry(name=path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            metadata = CheckpointMetadata(
                episode=episode,
                run_id=folder.run_id,
                config=record["config"],
                timestamp=stamp(100 * episode),
                agent_id=folder.agent_id,
                algo=record["algo"],
                num_timesteps=200 * episode,
                files=[entry],
                metrics={"mean_reward": float(episode)},
            )
            path.write_bytes(content)
            folder.metadata(episode).write_bytes(dump_json(metadata.to_json()))
            facts = {"episode": episode, "num_timesteps": 200 * episode, "timestamp": stamp(100 * episode)}
            saved = {**facts, "bytes": entry.bytes, "sha256": entry.sha256, "mean_reward": float(episode)}
            file.write(dump_json({"event": "saved", **saved}, indent=None))


def write_runs(checkpoint_dir: Path, runs: int, checkpoints: int, points: int) -> None:
    """Write all runs."""
    chance = random.Random(0)
    for number in range(runs):
        run_id = f"{number:032x}"
        record = record_of(number, run_id, chance)
        write_run(RunFolder(checkpoint_dir, record["agent_id"], run_id), record, points_of(20, chance), 3)
    record = {**record_of(0, BIG, chance), "started_at": stamp(600 * runs + 600), "status": "completed"}
    write_run(RunFolder(checkpoint_dir, record["agent_id"], BIG), record, points_of(points, chance), checkpoints)


def fill_database(uri: str, database: str, checkpoint_dir: Path) -> None:
    """Write all runs to a database as the mirror would, many documents at a time."""
    opened = connect(uri, database)
    runs = FolderRuns(checkpoint_dir)
    folders = [RunFolder(checkpoint_dir, run["agent_id"], run["run_id"]) for run in runs.summaries()]
    now = datetime.now(timezone.utc)

    def documents(collection: str) -> Iterator[dict[str, Any]]:
        for folder in folders:
            own = {"run_id": folder.run_id, "schema_version": SCHEMA_VERSION, ATTEMPT: 1}
            if collection == RUNS:
                record = encode(json.loads(folder.record.read_bytes()))
                last = read_points(folder.metrics)[0][-1]
                end = {"time": last.point["time"], "num_timesteps": last.point["num_timesteps"], END: last.end}
                yield {"_id": folder.run_id, **record, UPDATED_AT: now, SEEN_AT: now, CURVE_END: end}
            elif collection == CHECKPOINTS:
                yield from ({**encode(item), **own} for item in runs.checkpoints(folder.run_id))
            else:
                for placed in read_points(folder.metrics)[0]:
                    yield {**encode(placed.point), LEVEL: placed.level, END: placed.end, **own}

    for collection in (RUNS, CHECKPOINTS, METRICS):
        rest = documents(collection)
        while batch := [*islice(rest, 1000)]:
            opened[collection].insert_many(batch, ordered=False)
    opened.client.close()
    # Indexes that are there before would be brought up to date with each document; built at the end they may take long.
    with MongoClient[dict[str, Any]](uri, w="majority", journal=True) as patient:
        make_indexes(patient[database])


@dataclass(frozen=True)
class Answer:
    """What a request took and brought."""

    seconds: float
    status: int
    body: bytes
    headers: dict[str, str]


class Server:
    """A `serve` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "sb3_mlflow_ckpt", "serve", "--port", "0", "--ui-port", "0", *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert self._process.stdout is not None
        self.port = next(int(found[1]) for line in self._process.stdout if (found := re.search(r":(\d+)", line)))
        threading.Thread(target=self._process.stdout.read, daemon=True).start()
        self.measured = psutil.Process(self._process.pid)

    def get(self, path: str, **headers: str) -> Answer:
        """Ask once, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        began = time.perf_counter()
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        seconds = time.perf_counter() - began
        connection.close()
        return Answer(seconds, response.status, body, {key.lower(): value for key, value in response.getheaders()})

    @property
    def memory(self) -> float:
        """Resident memory in MiB."""
        return self.measured.memory_info().rss / 2**20

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    """Serve while the block runs."""
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()


def paths(run_id: str) -> dict[str, str]:
    """Return what is asked for."""
    return {
        "list, page": "/training",
        "list, JSON": "/api/training-runs",
        "list by reward and words, JSON": "/api/training-runs?sort=-mean_reward&q=sweep+12",
        "a usual run, page": f"/training/{0:032x}",
        "a usual run, JSON": f"/api/training-runs/{0:032x}",
        "the great run, page": f"/training/{run_id}",
        "the great run, JSON": f"/api/training-runs/{run_id}",
        "the great run's curve, JSON": f"/api/training-runs/{run_id}/metrics?points=500",
    }


def measure(server: Server, rounds: int) -> list[tuple[str, ...]]:
    """Return a row for each path: the first answer, the median, the one that nothing has changed, the weight."""
    rows = []
    for name, path in paths(BIG).items():
        answers = [server.get(path) for _ in range(rounds)]
        if {answer.status for answer in answers} != {200}:
            raise RuntimeError(f"{path} answered {answers[0].status}: {answers[0].body[:300]!r}")
        tag = answers[-1].headers.get("etag", "")
        same = [server.get(path, **{"If-None-Match": tag}) for _ in range(rounds)]
        unchanged = milliseconds(same) if {answer.status for answer in same} == {304} else "-"
        body = answers[-1].body
        weight = f"{len(gzip.compress(body)) / 1e3:.1f} of {len(body) / 1e3:.0f} kB"
        rows.append((name, milliseconds(answers[:1]), milliseconds(answers[1:]), unchanged, weight))
    return rows


def milliseconds(answers: Sequence[Answer]) -> str:
    """Return the median of what answers took."""
    return f"{1e3 * statistics.median(answer.seconds for answer in answers):.1f} ms"


def watch(server: Server, checkpoint_dir: Path, tabs: int, live: int, seconds: float) -> list[tuple[str, str]]:
    """Return what tabs that look again every five seconds cost while runs train."""
    chance = random.Random(1)
    folders = []
    for number in range(live):
        record = {**record_of(number, f"e{number:031x}", chance), "status": "running", "heartbeat_at": timestamp_now()}
        folders.append(RunFolder(checkpoint_dir, record["agent_id"], record["run_id"]))
        write_run(folders[-1], {**record, "started_at": timestamp_now()}, points_of(1000, chance), 3)
    ended = threading.Event()
    took: list[Answer] = []

    def train(folder: RunFolder) -> None:
        record = json.loads(folder.record.read_bytes())
        step = 400_000
        while not ended.wait(1):
            step += 400
            point = {"num_timesteps": step, "episode": step // 200, "time": timestamp_now(), "ep_rew_mean": 50.0}
            json_lines.append_line(folder.metrics, point, durable=False)
            if step % 4000 == 0:
                record = {**record, "heartbeat_at": timestamp_now(), "last_step_at": timestamp_now()}
                folder.record.write_bytes(dump_json(record))

    def look(number: int) -> None:
        folder = folders[number % live]
        path, tag = f"/training/{folder.run_id}" if number % 4 else "/training", ""
        ended.wait(5 * number / tabs)
        while not ended.is_set():
            answer = server.get(path, **({"If-None-Match": tag} if tag else {}))
            tag = answer.headers.get("etag", tag)
            took.append(answer)
            ended.wait(5)

    threads = [threading.Thread(target=train, args=(folder,)) for folder in folders]
    threads += [threading.Thread(target=look, args=(number,)) for number in range(tabs)]
    for thread in threads:
        thread.start()
    before = server.measured.cpu_times()
    time.sleep(seconds)
    after = server.measured.cpu_times()
    ended.set()
    for thread in threads:
        thread.join()
    for folder in folders:
        shutil.rmtree(folder.path)
    cpu = after.user + after.system - before.user - before.system
    slowest = statistics.quantiles([answer.seconds for answer in took], n=20)[-1]
    return [
        ("answers", f"{len(took)}, of which {sum(answer.status == 304 for answer in took)} say that nothing changed"),
        ("median, and that of 95 in 100", f"{milliseconds(took)}, {1e3 * slowest:.1f} ms"),
        ("share of a core", f"{100 * cpu / seconds:.1f} %"),
    ]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)


def report(name: str, checkpoint_dir: Path, options: argparse.Namespace, *arguments: str) -> None:
    """Serve a store, measure and print."""
    with serving("--checkpoint-dir", str(checkpoint_dir), *arguments) as server:
        print(f"\nFrom {name}:\n")
        rows = measure(server, options.rounds)
        print_table(("what", "first", "median", "nothing changed", "gzip of plain"), rows)
        if not arguments:
            print(f"\n{options.tabs} tabs on {options.live} runs that train:\n")
            print_table(("what", "figure"), watch(server, checkpoint_dir, options.tabs, options.live, options.seconds))
        print(f"\nMemory: {server.memory:.0f} MiB")


def main() -> None:
    """Make the runs, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=5000)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15, help="Requests of each kind")
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--live", type=int, default=5, help="Runs that train meanwhile")
    parser.add_argument("--seconds", type=float, default=60.0, help="How long the tabs stay open")
    parser.add_argument("--folder", type=Path, help="Keeps what is made, and takes it up again")
    parser.add_argument("--mongo-uri", help="A database server to fill; the tests' own where it is not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="training-history-") as temporary:
        folder = options.folder or Path(temporary)
        checkpoint_dir = folder / "checkpoints"
        if not checkpoint_dir.exists():
            write_runs(checkpoint_dir, options.runs, options.checkpoints, options.points)
        own = MongoServer(folder / "mongo")
        kept = (folder / "mongo").exists()
        if not options.mongo_uri:
            own.start()
        try:
            uri = options.mongo_uri or own.uri
            if options.mongo_uri or not kept:
                fill_database(uri, "training_history", checkpoint_dir)
            report("MongoDB" if options.mongo_uri else "a MongoDB-compatible server", checkpoint_dir, options,
                   "--mongo-uri", uri, "--mongo-db", "training_history")  # fmt: skip
        finally:
            own.stop()
        report("folders", checkpoint_dir, options)


if __name__ == "__main__":
    main()
