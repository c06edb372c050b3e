"""Trains a run of very many episodes to its end, and compares its last checkpoints with its first.

`python benchmarks/long_run.py [--episodes 100000] [--interval 10] [--keep 3] [--mlflow]`: CartPole in eight
environments with a learning rate of 0, so that episodes stay as short as they are at the beginning. What is shown for
each tenth of the run: how long a checkpoint held the training, and how much of the processor the thread that writes it
took; and at the end, how long ending took, how much memory was taken in between, and how large the run's files are.
Milliseconds are a machine's; what counts is whether the last row is like the second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch as th
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_mlflow_ckpt import CheckpointableEnv, EpisodeCheckpointCallback, MLflowMirror, verify_checkpoint
from sb3_mlflow_ckpt.live_run import LiveRun

_TENTHS = 10


class Watched(EpisodeCheckpointCallback):
    """The callback, which ends the training after so many episodes and tells of each checkpoint and of its stall."""

    def __init__(self, episodes: int, tell: Callable[[str, float], None], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._most, self._tell = episodes, tell

    def _save(self, *arguments: Any, **options: Any) -> None:
        began = time.perf_counter()
        super()._save(*arguments, **options)
        self._tell("stall", time.perf_counter() - began)

    def _on_step(self) -> bool:
        return super()._on_step() and self.episode < self._most


def watch_commits(tell: Callable[[str, float], None]) -> None:
    """Tell of the processor's time that each commit takes of the thread that writes."""
    whole = LiveRun._commit

    def commit(live: LiveRun, capture: Any) -> None:
        began = time.thread_time()
        whole(live, capture)
        tell("commit", time.thread_time() - began)

    LiveRun._commit = commit  # type: ignore[method-assign]


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train to the end; return what was measured, in milliseconds and bytes."""
    figures: dict[str, list[tuple[float, float]]] = {"stall": [], "commit": []}

    def tell(what: str, seconds: float) -> None:
        figures[what].append((time.perf_counter(), 1000 * seconds))

    watch_commits(tell)
    uri = f"sqlite:///{folder}/mlflow.db"
    mirrors = [MLflowMirror(uri)] if options.mlflow else []
    saving = Watched(
        options.episodes, tell, options.interval, options.keep, folder / "checkpoints", agent_id="long", run_id="run",
        mirrors=mirrors, resume_state="exact", sync_timeout_seconds=600.0,
    )  # fmt: skip
    env = make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=CheckpointableEnv)
    model = PPO("MlpPolicy", env, n_steps=256, batch_size=2048, n_epochs=1, learning_rate=0.0, device="cpu", seed=0)
    process, began = psutil.Process(), time.perf_counter()
    before = process.memory_info().rss
    ended_training: deque[float] = deque(maxlen=1)

    finish = LiveRun.finish

    def finished(live: LiveRun, *arguments: Any, **given: Any) -> list[str]:
        ended_training.append(time.perf_counter())
        return finish(live, *arguments, **given)

    LiveRun.finish = finished  # type: ignore[method-assign]
    with saving:
        model.learn(10**12, callback=saving)
    ended = time.perf_counter()
    rows = []
    edges = [began + (ended_training[0] - began) * tenth / _TENTHS for tenth in range(_TENTHS + 1)]
    for start, end in pairwise(edges):
        within = {key: [ms for at, ms in values if start <= at < end] for key, values in figures.items()}
        rows.append({
            "checkpoints": len(within["commit"]),
            **{key: statistics.median(values) if values else None for key, values in within.items()},
        })  # fmt: skip
    run = folder / "checkpoints" / "long" / "run"
    # The very last was taken where the training was told to stop, in the middle of a step.
    kept = [verify_checkpoint(path).resume_state["exact"] for path in run.glob("ep*.zip")]
    assert any(kept), "They must be exact"
    return {
        "episodes": saving.episode,
        "timesteps": model.num_timesteps,
        "checkpoints": len(figures["commit"]),
        "seconds": ended_training[0] - began,
        "end_seconds": ended - ended_training[0],
        "memory_mb": (process.memory_info().rss - before) / 1e6,
        "ledger_mb": (run / "checkpoints.jsonl").stat().st_size / 1e6,
        "files": sum(1 for _ in run.iterdir()),
        "behind": saving.behind,
        "tenths": rows,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print the figures."""
    table = Table(title=f"{found['episodes']:,} episodes, {found['checkpoints']:,} checkpoints")
    for title in ("tenth of the run", "checkpoints", "held training, ms", "processor, writing, ms"):
        table.add_column(title, justify="right")
    for number, row in enumerate(found["tenths"], 1):
        cells = (f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("stall", "commit"))
        table.add_row(str(number), f"{row['checkpoints']:,}", *cells)
    console.print(table)
    console.print(
        f"{found['timesteps']:,} steps in {found['seconds']:.0f} s, its end {found['end_seconds']:.1f} s; "
        f"{found['memory_mb']:.0f} MB more memory; {found['files']} files, a ledger of {found['ledger_mb']:.1f} MB; "
        + (f"behind: {', '.join(found['behind'])}" if found["behind"] else "no mirror is behind")
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--interval", type=int, default=10, help="episodes between checkpoints")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints kept on disk; 0 keeps all")
    parser.add_argument("--mlflow", action="store_true", help="with a local MLflow store")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = train(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    show(found, Console())


if __name__ == "__main__":
    main()
