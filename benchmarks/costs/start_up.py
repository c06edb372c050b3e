"""Owns the third part: the command line over many checkpoints, and how soon a resume takes its first step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from costs.campaign import Stores, Worker, interleaved, tell
from costs.policies import POLICIES
from sb3_mlflow_ckpt import EpisodeCheckpointCallback, latest_checkpoint

_COMMAND = (sys.executable, "-m", "sb3_mlflow_ckpt")
_AGENT, _RUN, _CHECKPOINT = "ppo_agent", "parent", "ep000010.zip"
_BLOCK, _COLD = 0.05, 128
_SCRIPT = """
import sys
import gymnasium
from stable_baselines3 import PPO
from costs.first_step import ends_process
env = ends_process(gymnasium.make("CartPole-v1"))
model = PPO.load(sys.argv[1], env=env, device="cpu") if len(sys.argv) > 1 else PPO("MlpPolicy", env, device="cpu")
model.learn(10**6)
"""
# what -> its own command and the one that it is compared with, by name
PAIRS = {
    "`--help`": ("help", "click"),
    "`checkpoints list`": ("list", "help"),
    "`PPO.load` + `learn`": ("sb3-load", "sb3-fresh"),
    "trainer, fresh": ("fresh", "sb3-fresh"),
    "trainer, resume from disk": ("resume", "fresh"),
    "trainer, resume from disk, against `PPO.load`": ("resume", "sb3-load"),
    "trainer, resume from an MLflow server": ("resume-server", "fresh-server"),
}
TITLES = {
    "click": "`import click`", "help": "`--help`", "sb3-fresh": "SB3, fresh", "sb3-load": "`PPO.load` + `learn`",
    "fresh": "trainer, fresh", "fresh-server": "trainer with that server, fresh",
}  # fmt: skip


class _Every(BaseCallback):
    """Ends an episode with every step, until there are enough checkpoints.

    The times are no attribute: what a callback holds is in each checkpoint, and a list that grows is not what is
    measured.
    """

    def __init__(self, walk: Any, count: int, tell: Callable[[float], object]) -> None:
        super().__init__()
        self._walk, self._left, self._tell = walk, count, tell

    def _on_step(self) -> bool:
        self._tell(time.perf_counter())
        self._walk.ends = True
        self._left -= 1
        return self._left > 0


def make_checkpoints(connection: Connection, folder: Path, count: int) -> None:
    """Train one run of so many checkpoints that are all kept, as fast as they can be written; tell how long they took.

    The writer has a bounded queue, so the time between two steps is the time that it takes for one checkpoint.
    """
    th.set_num_threads(1)
    _, walk = POLICIES["mlp"].build(0)
    small = {"net_arch": [4], "optimizer_class": th.optim.SGD}
    model = PPO("MlpPolicy", walk, n_steps=64, batch_size=64, n_epochs=1, policy_kwargs=small, device="cpu")
    times = [time.perf_counter()]
    every = _Every(walk, count, times.append)
    callback = EpisodeCheckpointCallback(1, 0, folder, agent_id=_AGENT, run_id="many")
    model.learn(10**12, callback=CallbackList([every, callback]))
    gaps = [after - before for before, after in pairwise(times)]
    block = max(2, int(_BLOCK * count))
    # The first find everything cold, and SB3's window of the last episodes, which is saved as well, not full.
    cold = min(_COLD, count // 4)
    connection.send([statistics.median(gaps[cold : cold + block]), statistics.median(gaps[-block:])])


def commands(stores: Stores, many: Path) -> dict[str, Sequence[str]]:
    """Make what there is to resume; return the commands that are timed."""
    wrapped = ("--env-wrappers", "[costs.first_step:ends_process]", "--total-timesteps", "1000000")
    apart = ("--mlflow", "false", "--checkpoint-dir", f"{stores.folder}/runs")
    server = ("--tracking-uri", stores.server, "--checkpoint-dir", f"{stores.folder}/runs-server")
    parent = ("--total-timesteps", "2000", "--checkpoint-interval-episodes", "10", "--keep-last-n-checkpoints", "0")
    train = (*_COMMAND, "train", "--agent-id", _AGENT, "--device", "cpu")
    _run((*train, *apart, *parent, "--run-id", _RUN), stores.folder)
    path = f"{stores.folder}/runs/{_AGENT}/{_RUN}/{_CHECKPOINT}"
    found: dict[str, Sequence[str]] = {
        "click": (sys.executable, "-c", "import click"),
        "help": (*_COMMAND, "--help"),
        "list": (*_COMMAND, "checkpoints", "list", "--checkpoint-dir", str(many)),
        "sb3-fresh": (sys.executable, "-c", _SCRIPT),
        "sb3-load": (sys.executable, "-c", _SCRIPT, path),
        "fresh": (*train, *apart, *wrapped),
        "resume": (*train, *apart, *wrapped, "--resume-from-checkpoint", path),
    }
    if stores.server:
        _run((*train, *server, *parent), stores.folder)
        [zip_file] = Path(f"{stores.folder}/runs-server/{_AGENT}").glob(f"*/{_CHECKPOINT}")
        uri = f"runs:/{zip_file.parent.name}/checkpoints/{_CHECKPOINT}"
        found["fresh-server"] = (*train, *server, *wrapped)
        found["resume-server"] = (*train, *server, *wrapped, "--resume-from-checkpoint", uri)
    return found


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _clocked(action: Callable[[], object]) -> dict[str, float]:
    began = time.perf_counter()
    action()
    return {"seconds": time.perf_counter() - began}


def start_up(stores: Stores, options: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each process that is timed, and for what grows with the number of checkpoints."""
    many = stores.folder / "many"
    worker = Worker(make_checkpoints, many, options.checkpoints)
    first, last = worker.hear()
    worker.close()
    tell(f"{options.checkpoints} checkpoints are made")
    yield {
        "names": ["growth"], "what": f"one more checkpoint, at {options.checkpoints:,} of a run",
        "against": "one of the first", "own": [last], "other": [first],
    }  # fmt: skip
    latest = [_clocked(lambda: latest_checkpoint(many)) for _ in range(options.rounds)]
    yield {
        "names": ["latest"], "what": f"`latest_checkpoint`, of {options.checkpoints:,}", "against": "",
        "own": [figures["seconds"] for figures in latest], "other": [],
    }  # fmt: skip
    ways = commands(stores, many)

    def once(name: str) -> dict[str, float]:
        return _clocked(lambda: _run(ways[name], stores.folder))

    for what, (own, other) in PAIRS.items():
        if own in ways:
            pairs = interleaved(once, other, [own], options.rounds)
            tell(f"start-up: {what}")
            yield {
                "names": [own, other], "what": what, "against": TITLES[other],
                "own": [figures["seconds"] for figures, _ in pairs[own]],
                "other": [figures["seconds"] for _, figures in pairs[own]],
            }  # fmt: skip
