"""Measures a checkpoint of a replay buffer against SB3's `save_replay_buffer`, side by side in one run.

`python benchmarks/replay_checkpoint.py [--json]`. What counts are the ratios: milliseconds are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
from gymnasium import spaces
from rich.console import Console
from rich.table import Table
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder, restore_replay

NEW_ROWS = 1000
FILLS = (0.01, 0.1, 0.5, 1.0)


def frames(count: int) -> tuple[str, np.ndarray]:
    """Return real frames (count, 84, 84): of Pong where ale_py is installed, else of CartPole as it is drawn."""
    try:
        import ale_py

        gym.register_envs(ale_py)
        env: Any = gym.make("ALE/Pong-v5", obs_type="grayscale")
        name, crop = "Pong", (slice(34, 194, 2), slice(0, 160, 2))
    except (ImportError, gym.error.Error):
        env = gym.make("CartPole-v1", render_mode="rgb_array")
        name, crop = "CartPole, rendered", (slice(60, 396, 4), slice(132, 468, 4))
    result = np.zeros((count, 84, 84), dtype=np.uint8)
    observation, _ = env.reset(seed=0)
    for index in range(count):
        image = observation if name == "Pong" else env.render().mean(axis=-1).astype(np.uint8)
        part = image[crop]
        result[index, : part.shape[0], : part.shape[1]] = part
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            observation, _ = env.reset()
    return name, result


class Images:
    """20,000 transitions of stacked frames; SB3 itself turns images channel first before it stores them."""

    rows, action = 20_000, spaces.Discrete(6)

    def __init__(self, *, channel_first: bool) -> None:
        name, self._frames = frames(self.rows + NEW_ROWS * 12)
        self._axis, layout = (0, "4x84x84") if channel_first else (-1, "84x84x4")
        self.space = spaces.Box(0, 255, (4, 84, 84) if channel_first else (84, 84, 4), np.uint8)
        self.name = f"{self.rows:,} x {layout} uint8 ({name})"

    def fill(self, buffer: ReplayBuffer, start: int, count: int) -> None:
        for t in range(start, start + count):
            f = t % (len(self._frames) - 5)
            before, after = (np.moveaxis(self._frames[f + i : f + i + 4], 0, self._axis)[np.newaxis] for i in (0, 1))
            buffer.add(before, after, np.array([t % 6]), np.zeros(1), np.array([t % 800 == 799]), [{}])


class Vectors:
    """1,000,000 transitions of 17 numbers, of a seeded walk."""

    rows, space, action = 1_000_000, spaces.Box(-9, 9, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32)
    name = "1,000,000 x 17 float32"

    def fill(self, buffer: ReplayBuffer, start: int, count: int) -> None:
        rng = np.random.default_rng(start)
        walk = rng.normal(size=(count + 1, 1, 17)).cumsum(axis=0).astype(np.float32)
        actions, done = rng.uniform(-1, 1, (count, 1, 6)).astype(np.float32), np.zeros(1)
        if count > 10 * NEW_ROWS:
            # A million calls of `add` take minutes; the arrays are the same.
            rows = slice(buffer.pos, buffer.pos + count)
            buffer.observations[rows], buffer.next_observations[rows] = walk[:-1], walk[1:]
            buffer.actions[rows], buffer.rewards[rows] = actions, rng.normal(size=(count, 1))
            buffer.full = buffer.full or buffer.pos + count >= buffer.buffer_size
            buffer.pos = (buffer.pos + count) % buffer.buffer_size
            return
        for t in range(count):
            buffer.add(walk[t], walk[t + 1], actions[t], np.ones(1), done, [{}])


class Peak:
    """The highest resident memory of the process while a block runs, beyond what it had before."""

    def __enter__(self) -> Peak:
        self._process, self.bytes, self._ended = psutil.Process(), 0, threading.Event()
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def clocked(action: Any) -> tuple[float, Any]:
    """Return the milliseconds of a call and its result."""
    started = time.perf_counter()
    result = action()
    return 1e3 * (time.perf_counter() - started), result


def sb3(buffer: ReplayBuffer, path: Path) -> int:
    """Save as SB3 does, durably; return the bytes."""
    save_to_pkl(path, buffer)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def restored(case: Any, buffer: ReplayBuffer, state: dict[str, Any], run: RunFolder) -> float:
    """Return the milliseconds of a restore, after checking that it gives back the rows."""
    fresh: Any = SimpleNamespace(replay_buffer=ReplayBuffer(case.rows, case.space, case.action))
    spent, _ = clocked(lambda: restore_replay(fresh, state, lambda name: run.chunk(name).open("rb")))
    for start in range(0, buffer.size(), NEW_ROWS):
        rows = slice(start, min(start + NEW_ROWS, buffer.size()))
        assert np.array_equal(fresh.replay_buffer.next_observations[rows], buffer.next_observations[rows])
    return spent


def measure(case: Any, fill: float, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Return a row for the first checkpoint and one for 1,000 new transitions."""
    buffer = ReplayBuffer(case.rows, case.space, case.action)
    buffer.observations.fill(0)
    buffer.next_observations.fill(0)
    model: Any = SimpleNamespace(replay_buffer=buffer, num_timesteps=0, n_envs=1)
    added = int(case.rows * fill)
    case.fill(buffer, 0, added)
    rows = []
    recorder, run = ReplayRecorder(model), RunFolder(folder, "agent", f"{fill}".replace(".", "-"))
    for kind in ("first", f"{NEW_ROWS:,} new"):
        times: dict[str, list[float]] = {key: [] for key in ("stall", "ours", "sb3", "restore", "sb3 restore")}
        ours_bytes, ours_peak, sb3_peak = [], [], []
        rounds = 1 if kind == "first" else repeats
        for _ in range(rounds):
            if kind != "first":
                for _ in range(NEW_ROWS // 100):
                    case.fill(buffer, added, 100)
                    added += 100
                    model.num_timesteps += 100
                    recorder.protect()
            before = {path.name for path in run.replay.iterdir()} if run.replay.is_dir() else set()
            stall, capture = clocked(recorder.capture)
            with Peak() as peak:
                written, _ = clocked(lambda capture=capture: capture.write(run))
            ours_peak.append(peak.bytes)
            ours_bytes.append(sum(path.stat().st_size for path in run.replay.iterdir() if path.name not in before))
            with Peak() as peak:
                saved, sb3_bytes = clocked(lambda: sb3(buffer, folder / "sb3.pkl"))
            sb3_peak.append(peak.bytes)
            times["stall"].append(stall)
            times["ours"].append(written)
            times["sb3"].append(saved)
        state = capture.state
        times["sb3 restore"].append(clocked(lambda: load_from_pkl(folder / "sb3.pkl"))[0])
        times["restore"].append(restored(case, buffer, state, run))
        median = {key: statistics.median(values) for key, values in times.items()}
        rows.append(
            {
                "buffer": case.name,
                "fill": fill,
                "checkpoint": kind,
                "ours_bytes": int(statistics.median(ours_bytes)),
                "sb3_bytes": sb3_bytes,
                "ours_stall_ms": median["stall"],
                "sb3_stall_ms": median["sb3"],
                "ours_write_ms": median["ours"],
                "ours_restore_ms": median["restore"],
                "sb3_restore_ms": median["sb3 restore"],
                "ours_peak_bytes": max(ours_peak),
                "sb3_peak_bytes": max(sb3_peak),
                "chunks": len(state["chunks"]),
            }
        )
    (folder / "sb3.pkl").unlink()
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    result = Table(title="A checkpoint of a replay buffer: ours / SB3's save_replay_buffer + fsync", show_lines=False)
    for column in ("buffer", "fill", "checkpoint", "MB", "stall ms", "write ms", "restore ms", "peak MB", "chunks"):
        result.add_column(column, justify="left" if column in ("buffer", "checkpoint") else "right")
    for row in rows:
        result.add_row(
            row["buffer"],
            f"{row['fill']:.0%}",
            row["checkpoint"],
            f"{row['ours_bytes'] / 1e6:.2f} / {row['sb3_bytes'] / 1e6:.0f}",
            f"{row['ours_stall_ms']:.2f} / {row['sb3_stall_ms']:.0f}",
            f"{row['ours_write_ms']:.1f} / {row['sb3_stall_ms']:.0f}",
            f"{row['ours_restore_ms']:.0f} / {row['sb3_restore_ms']:.0f}",
            f"{row['ours_peak_bytes'] / 1e6:.0f} / {row['sb3_peak_bytes'] / 1e6:.0f}",
            str(row["chunks"]),
        )
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints of 1,000 new transitions each")
    parser.add_argument("--fills", type=float, nargs="+", default=FILLS, help="how full the buffers are, of 1")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in (Images(channel_first=False), Images(channel_first=True), Vectors()):
        for fill in options.fills:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(case, fill, Path(folder), options.repeats)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
