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
WARM_UP_STEPS = 1024
SYNC_TIMEOUT = 2.0

_TRAINING = """
import json, shutil, sys, time
import psutil
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, MLflowMirror, MongoMirror

tracking_uri, mongo_uri, warm_up, steps, sync_timeout = *sys.argv[1:3], *map(float, sys.argv[3:])
process = psutil.Process()

def tell(value):
    print(json.dumps(value), flush=True)

class Measure(BaseCallback):
    began = figures = None

    def _on_step(self):
        if self.began is None and self.num_timesteps >= warm_up:
            tell("ready")
            sys.stdin.readline()
            self.began = time.perf_counter(), time.process_time(), process.memory_info().rss
        elif self.began is not None and self.num_timesteps >= warm_up + steps:
            wall, cpu, rss = self.began
            self.figures = {"steps": self.num_timesteps - warm_up, "wall": time.perf_counter() - wall,
                            "cpu": time.process_time() - cpu, "grown": process.memory_info().rss - rss}
            self.ended = time.perf_counter()
            return False
        return True

while mode := sys.stdin.readline().strip():
    mirrors = [] if mode == "none" else [MLflowMirror(tracking_uri), MongoMirror(mongo_uri, "benchmark")]
    checkpoints = EpisodeCheckpointCallback(
        20, 3, mirrors=mirrors, heartbeat_seconds=1.0, sync_timeout_seconds=sync_timeout,
        max_unmirrored_checkpoints=1000,
    )
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=512, device="cpu")
    measure = Measure()
    with checkpoints:
        model.learn(10**9, callback=CallbackList([checkpoints, measure]))
    folder = checkpoints.folder
    tell(measure.figures | {
        "end": time.perf_counter() - measure.ended,
        "saved": sum('"saved"' in line for line in folder.events.read_text().splitlines()),
        "points": len(folder.metrics.read_text().splitlines()),
    })
    shutil.rmtree(folder.path)
"""


class Bench:
    """The servers, each behind its proxy, and the process that trains."""

    def __init__(self, folder: Path, steps: int) -> None:
        self._tracking, self._mongo = MlflowServer(folder / "mlflow"), MongoServer(folder / "mongo")
        self._tracking.start()
        self._mongo.start()
        uris = (self._tracking.uri, self._mongo.uri)
        self.proxies = [FaultProxy(urllib.parse.urlsplit(uri).port or 0) for uri in uris]
        tracking, mongo = (f"127.0.0.1:{proxy.port}" for proxy in self.proxies)
        addresses = [f"http://{tracking}", f"mongodb://{mongo}/?directConnection=true"]
        self._training = subprocess.Popen(
            [sys.executable, "-c", _TRAINING, *addresses, *map(str, (WARM_UP_STEPS, steps, SYNC_TIMEOUT))],
            cwd=folder, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._training.kill()
        self._training.wait()
        for proxy in self.proxies:
            proxy.close()
        self._tracking.stop()
        self._mongo.stop()

    def measure(self, mode: str) -> dict[str, Any]:
        """Train once and return the figures; `none` is without mirrors, `pass` with healthy ones."""
        self._tell(mode)
        self._hear()
        self._set("pass" if mode == "none" else mode)
        self._tell("go")
        figures: dict[str, Any] = self._hear()
        # Whoever hangs is set free, so that it is not in the next one's way.
        self._set("pass")
        return figures

    def _set(self, mode: str) -> None:
        for proxy in self.proxies:
            proxy.set(mode)

    def _tell(self, line: str) -> None:
        assert self._training.stdin is not None
        self._training.stdin.write(f"{line}\n")
        self._training.stdin.flush()

    def _hear(self) -> Any:
        assert self._training.stdout is not None
        while not (line := self._training.stdout.readline()).startswith(("{", '"')):
            if not line:
                raise RuntimeError("The training died")
        return json.loads(line)


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
        bench = Bench(Path(folder), arguments.steps)
        try:
            for number in range(arguments.rounds):
                order = random.Random(number).sample(modes, len(modes))
                figures = {mode: bench.measure(mode) for mode in order}
                rounds.append({mode: figures[mode] for mode in modes})
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        finally:
            bench.close()
    print(table(rounds))


if __name__ == "__main__":
    main()
