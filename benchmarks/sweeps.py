"""Measures what a sweep costs beside plain trainings, as ratios: Ray's own cost, and 1, 2 and 4 trials at once.

Each configuration trains the same steps, one after the other on the same machine; `--rounds` repeats them in turn and
takes the median, so that what else the machine does falls on all of them.

    python benchmarks/sweeps.py --timesteps 20000 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
_TRAINING: dict[str, Any] = {
    "env_id": "CartPole-v1",
    "hyperparameters": {"n_steps": 512, "batch_size": 64},
    "mlflow": False,
}
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _timed(words: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, env=_ENVIRONMENT, check=True, capture_output=True)
    return time.perf_counter() - start


def _write(folder: Path, document: dict[str, Any]) -> str:
    (folder / "file.yaml").write_text(yaml.safe_dump(document))
    return "file.yaml"


def plain(timesteps: int) -> float:
    """Return the seconds of one plain training."""
    with tempfile.TemporaryDirectory() as name:
        file = _write(Path(name), {**_TRAINING, "total_timesteps": timesteps, "seed": 0})
        return _timed(["-m", "sb3_mlflow_ckpt.trainer", "--config", file], Path(name))


def sweep(timesteps: int, trials: int, at_once: int) -> float:
    """Return the seconds of a sweep of so many trials, so many at once."""
    with tempfile.TemporaryDirectory() as name:
        document = {
            "training": {**_TRAINING, "total_timesteps": timesteps},
            "seeds": [*range(trials)],
            "concurrency": at_once,
            "resources": {"cpu": (os.cpu_count() or 1) / at_once},
            "report_interval_timesteps": max(1, timesteps // 4),
        }
        return _timed(["-m", "sb3_mlflow_ckpt", "sweep", _write(Path(name), document)], Path(name))


def measure(timesteps: int, trials: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row a configuration: seconds, environment steps a second, and the ratio to plain trainings."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        seconds.setdefault("plain, 1 training", []).append(plain(timesteps))
        seconds.setdefault("sweep, 1 trial", []).append(sweep(timesteps, 1, 1))
        for at_once in (1, 2, 4):
            seconds.setdefault(f"sweep, {trials} trials, {at_once} at once", []).append(
                sweep(timesteps, trials, at_once)
            )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = timesteps / medians["plain, 1 training"]
    rows = []
    for name, median in medians.items():
        trained = timesteps * (trials if "trials" in name else 1)
        rate = trained / median
        rows.append({"what": name, "seconds": median, "steps_per_second": rate, "ratio_to_plain": rate / base})
    return rows


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--timesteps", type=int, default=20_000)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.timesteps, arguments.trials, arguments.rounds)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        what, seconds, rate, ratio = row.values()
        print(f"{what:<28} {seconds:7.1f} s {rate:9,.0f} steps/s {ratio:6.2f} x plain")


if __name__ == "__main__":
    main()
