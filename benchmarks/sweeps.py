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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
_TRAINING: dict[str, Any] = {
    "env_id": "CartPole-v1",
    "hyperparameters": {"n_steps": 512, "batch_size": 64},
    "mlflow": False,
}
_LONG = 3
_LONGER = {name: f"{name}, {_LONG} times as long" for name in ("plain, 1 training", "sweep, 1 trial")}
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
    # What each is made with, and the environment steps that it trains in all.
    configurations: dict[str, tuple[Callable[[], float], int]] = {
        "plain, 1 training": (lambda: plain(timesteps), timesteps),
        "sweep, 1 trial": (lambda: sweep(timesteps, 1, 1), timesteps),
        _LONGER["plain, 1 training"]: (lambda: plain(_LONG * timesteps), _LONG * timesteps),
        _LONGER["sweep, 1 trial"]: (lambda: sweep(_LONG * timesteps, 1, 1), _LONG * timesteps),
        **{
            f"sweep, {trials} trials, {n} at once": (partial(sweep, timesteps, trials, n), trials * timesteps)
            for n in (1, 2, 4)
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in configurations}
    for _ in range(rounds):
        for name, (run, _) in configurations.items():
            seconds[name].append(run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: steps / medians[name] for name, (_, steps) in configurations.items()}
    rows = [_row(name, medians[name], rates[name], rates["plain, 1 training"]) for name in configurations]
    # What a further step takes, with starting left out.
    further = {
        name: (medians[longer] - medians[name], (_LONG - 1) * timesteps / (medians[longer] - medians[name]))
        for name, longer in _LONGER.items()
    }
    base = further["plain, 1 training"][1]
    return rows + [_row(f"{name}, further steps", took, rate, base) for name, (took, rate) in further.items()]


def _row(name: str, seconds: float, rate: float, plain_rate: float) -> dict[str, Any]:
    return {"what": name, "seconds": seconds, "steps_per_second": rate, "ratio_to_plain": rate / plain_rate}


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
        print(f"{what:<38} {seconds:7.1f} s {rate:9,.0f} steps/s {ratio:6.2f} x plain")


if __name__ == "__main__":
    main()
