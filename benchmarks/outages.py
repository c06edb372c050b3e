"""What an outage of MLflow and MongoDB costs a training: throughput, CPU time, memory, and the wait at the end.

    python benchmarks/outages.py --rounds 5 --steps 30000

Starts the servers that the tests use, each behind a proxy that goes wrong in one way. A round measures, in an order of
its own, a training without mirrors, one with healthy mirrors, and one in each fault; every figure is a ratio to the
training without mirrors of the same round, so that what else the machine does at that time counts for both. Every
training is a process of its own, which first trains with healthy mirrors until both have its first checkpoints.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_proxy import FaultProxy  # noqa: E402
from mlflow_server import MlflowServer  # noqa: E402
from processes import environment  # noqa: E402
from servers import MongoServer  # noqa: E402

FAULTS = ("refuse", "hang", "hang-answer", "http-500", "slow", "cut", "reset")
WARM_UP_STEPS = 4096
SYNC_TIMEOUT = 2.0

_TRAINING = """
import json, sys, time
import psutil
from pathlib import Path
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror, MongoMirror

tracking_uri, mongo_uri, warm_up, steps, sync_timeout = *sys.argv[1:3], *map(float, sys.argv[3:])
process = psutil.Process()

class Measure(BaseCallback):
    began = None

    def _on_step(self):
        if self.began is None and self.num_timesteps >= warm_up:
            print(json.dumps("ready"), flush=True)
            sys.stdin.readline()
            self.began = time.perf_counter(), time.process_time(), process.memory_info().rss
        elif self.began is not None and self.num_timesteps >= warm_up + steps:
            wall, cpu, rss = self.began
            print(json.dumps({"steps": self.num_timesteps - warm_up, "wall": time.perf_counter() - wall,
                              "cpu": time.process_time() - cpu, "grown": process.memory_info().rss - rss}), flush=True)
            return False
        return True

mirrors = [] if tracking_uri == "none" else [MLflowMirror(tracking_uri), MongoMirror(mongo_uri, "benchmark")]
checkpoints = EpisodeCheckpointCallback(
    50, 3, mirrors=mirrors, heartbeat_seconds=1.0, sync_timeout_seconds=sync_timeout, max_unmirrored_checkpoints=1000
)
model = PPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=512, device="cpu")
with checkpoints:
    model.learn(10**9, callback=CallbackList([checkpoints, Measure()]))
folder = checkpoints.folder
saved = sum('"saved"' in line for line in folder.events.read_text().splitlines())
print(json.dumps({"saved": saved, "points": len(folder.metrics.read_text().splitlines())}), flush=True)
"""


class Bench:
    """The servers, each behind its proxy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tracking, self._mongo = MlflowServer(folder / "mlflow"), MongoServer(folder / "mongo")
        self._tracking.start()
        self._mongo.start()
        uris = (self._tracking.uri, self._mongo.uri)
        self.proxies = [FaultProxy(urllib.parse.urlsplit(uri).port or 0) for uri in uris]

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        self._tracking.stop()
        self._mongo.stop()

    def set(self, mode: str) -> None:
        for proxy in self.proxies:
            proxy.set(mode)

    def measure(self, mode: str, steps: int) -> dict[str, Any]:
        """Train once and return the figures; `none` is without mirrors, `pass` with healthy ones."""
        tracking, mongo = (f"127.0.0.1:{proxy.port}" for proxy in self.proxies)
        uris = ["none", "none"] if mode == "none" else [f"http://{tracking}", f"mongodb://{mongo}/?directConnection=true"]
        with tempfile.TemporaryDirectory(dir=self._folder) as cwd:
            training = subprocess.Popen(
                [sys.executable, "-c", _TRAINING, *uris, *map(str, (WARM_UP_STEPS, steps, SYNC_TIMEOUT))],
                cwd=cwd, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert training.stdin is not None
            assert training.stdout is not None
            try:
                json.loads(training.stdout.readline())
                self.set("pass" if mode == "none" else mode)
                training.stdin.write("go\n")
                training.stdin.flush()
                figures: dict[str, Any] = json.loads(training.stdout.readline())
                ended = time.perf_counter()
                figures |= json.loads(training.stdout.readline())
                training.stdin.close()
                training.wait(120)
                figures["end"] = time.perf_counter() - ended
            finally:
                self.set("pass")
                training.kill()
                training.wait()
        return figures


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Return the figures as a table in Markdown: medians, and the least and the most in brackets."""
    lines = [
        "| mirrors | steps/s, ratio | CPU s/step, ratio | steps/s | memory, MiB more | end, s | checkpoints | points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in rounds[0]:
        speed = [r["none"]["wall"] / r["none"]["steps"] * r[mode]["steps"] / r[mode]["wall"] for r in rounds]
        cpu = [r[mode]["cpu"] / r[mode]["steps"] / (r["none"]["cpu"] / r["none"]["steps"]) for r in rounds]
        own = [r[mode] for r in rounds]
        cells = (
            _spread(speed, 3),
            _spread(cpu, 3),
            _spread([f["steps"] / f["wall"] for f in own], 0),
            _spread([f["grown"] / 2**20 for f in own], 1),
            _spread([f["end"] for f in own], 1),
            _spread([f["saved"] for f in own], 0),
            _spread([f["points"] for f in own], 0),
        )
        name = {"none": "none", "pass": "healthy"}.get(mode, mode)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=FAULTS)
    arguments = parser.parse_args()
    modes, rounds = ["none", "pass", *arguments.faults], []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        try:
            for number in range(arguments.rounds):
                order = random.Random(number).sample(modes, len(modes))
                figures = {mode: bench.measure(mode, arguments.steps) for mode in order}
                rounds.append({mode: figures[mode] for mode in modes})
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        finally:
            bench.close()
    print(table(rounds))


if __name__ == "__main__":
    main()
