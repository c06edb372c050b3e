"""Kills trainings at random instants, resumes them with `auto`, and compares how they end with uninterrupted ones.

The long form is run by hand: python tests/exactness/matrix.py --kills 5 --times 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import ROWS

DEADLINE = 300.0


@dataclass
class Outcome:
    """How one row ended.

    Attributes:
        name: The training.
        kills: How often it was killed.
        resumed: How often a process went on from a checkpoint.
        differs: The parts that are not the same bytes as in the uninterrupted run.
        inexact: What resumed runs said of themselves, where that was not "exact".
        seconds: What it took.
    """

    name: str
    kills: int = 0
    resumed: int = 0
    differs: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.differs and not self.inexact


class Fingerprints:
    """A reporter that leaves the hashes of everything that a training ends with.

    Args:
        result: Where to.
    """

    def __init__(self, result: Path) -> None:
        self._result = result

    def starting(self, resolved: Any) -> None: ...

    def callback(self, resolved: Any, checkpoints: Any) -> Any:
        from stable_baselines3.common.callbacks import BaseCallback

        result = self._result

        class _Take(BaseCallback):
            def _on_training_start(self) -> None:
                started = result.with_suffix(".started")
                started.write_text("")

            def _on_step(self) -> bool:
                return True

            def _on_training_end(self) -> None:
                hashes = fingerprint(self.model) | {"episodes": digest(checkpoints.episode)}
                rows = {path.name: monitored(path) for path in sorted(Path.cwd().glob("[0-9].monitor.csv"))}
                _write_whole(result, json.dumps(hashes | {"Monitor's rows": digest(rows)}))

        return _Take()


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all: a kill may come while it is written."""
    half = path.with_suffix(".half")
    half.write_text(text)
    half.replace(path)


def digest(value: Any) -> str:
    """Return the hash of a nested value's types and bytes."""
    import numpy as np
    import torch as th

    hashed = hashlib.sha256()

    def feed(item: Any) -> None:
        if isinstance(item, th.Tensor):
            item = item.detach().cpu().numpy()
        if isinstance(item, np.ndarray):
            hashed.update(f"{item.dtype}{item.shape}".encode() + item.tobytes())
        elif isinstance(item, dict):
            for key in item:
                hashed.update(repr(key).encode())
                feed(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                feed(part)
        else:
            hashed.update(repr(item).encode())

    feed(value)
    return hashed.hexdigest()


def fingerprint(model: Any) -> dict[str, str]:
    """Return the hash of each part of a model and its environments."""
    import torch as th

    from sb3_mlflow_ckpt.state import normalization, randomness

    parts: dict[str, Any] = dict(model.get_parameters())
    parts["variables"] = {name: getattr(model, name) for name in model._get_torch_save_params()[1]}
    counters = ("num_timesteps", "_n_updates", "_episode_num", "_n_calls", "exploration_rate", "_total_timesteps")
    parts["counters"] = {name: getattr(model, name, None) for name in counters}
    parts["learning rates"] = [
        group["lr"]
        for name in model._get_torch_save_params()[0]
        if isinstance(found := _attribute(model, name), th.optim.Optimizer)
        for group in found.param_groups
    ]
    parts["random states"] = randomness.capture(model)
    parts["last observation"] = model._last_obs
    normalized = model.get_vec_normalize_env()
    if normalized is not None:
        parts["normalization"] = normalization.capture(normalized)[1]
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        parts["replay buffer"] = {name: value for name, value in vars(buffer).items() if _is_content(value)}
    parts["episodes' returns"] = [(float(info["r"]), int(info["l"])) for info in model.ep_info_buffer]
    return {name: digest(value) for name, value in parts.items()}


def monitored(path: Path) -> list[list[str]]:
    """Return the reward and length of each episode in a file of Monitor; the time of day is no matter."""
    return [line.split(",")[:2] for line in path.read_text().splitlines()]


def _attribute(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def _is_content(value: Any) -> bool:
    import numpy as np

    if isinstance(value, dict):
        return all(isinstance(item, np.ndarray) for item in value.values())
    if isinstance(value, np.ndarray):
        # HER's info dictionaries have no bytes, only addresses; they are looked at with copy_info_dict only.
        return value.dtype != object
    return isinstance(value, (bool, int))


def run(settings: dict[str, Any], folder: str, result: str) -> None:
    """Train as a user's process does, from its beginning or from where the last one was killed."""
    import logging

    import torch as th

    from sb3_mlflow_ckpt.config import Layer, build_config
    from sb3_mlflow_ckpt.trainer import train

    th.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    # Where the toy environments are.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    os.chdir(folder)
    sys.stderr = open(Path(folder) / "stderr.txt", "a")  # noqa: SIM115 # until the process ends
    if settings.pop("script", None):
        _run_script(settings["total_timesteps"], Path(result))
        return
    config = build_config([Layer("the matrix", settings)])
    train(config, reporter=Fingerprints(Path(result)))


def _run_script(total_timesteps: int, result: Path) -> None:
    import own_script
    from stable_baselines3.common.callbacks import BaseCallback

    class _Last(BaseCallback):
        hashes: dict[str, str] | None = None
        episodes_of: Any = None
        evaluated: Any = None

        def _on_training_start(self) -> None:
            result.with_suffix(".started").write_text("")

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.hashes = fingerprint(self.model) | {"episodes": digest(self.episodes_of.episode)}

    last = _Last()
    own_script.train(total_timesteps, last)
    if last.hashes is not None:
        _write_whole(result, json.dumps(last.hashes | {"evaluations": digest(last.evaluated)}))


class Matrix:
    """Runs rows in fresh processes.

    Args:
        kills: How often each training is killed.
        seed: Decides the instants of the kills, as far as a clock can be repeated.
        times: How many times as long as its settings say each training is.
    """

    def __init__(self, kills: int, seed: int = 0, times: int = 1) -> None:
        self._kills = kills
        self._times = times
        self._random = random.Random(seed)
        # A fresh process for each run, that has imported torch already.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["sb3_contrib", "torch._dynamo", "sb3_mlflow_ckpt.callback"])

    def outcome(self, name: str, settings: dict[str, Any]) -> Outcome:
        """Train without an interruption, then with kills, and compare."""
        outcome = Outcome(name)
        settings = {**settings, "total_timesteps": settings["total_timesteps"] * self._times}
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
            alone, chain = Path(folder) / "alone", Path(folder) / "chain"
            alone.mkdir()
            chain.mkdir()
            duration = self._uninterrupted(settings, alone)
            self._killed(settings, chain, duration, outcome)
            expected, got = (json.loads((path / "result.json").read_text()) for path in (alone, chain))
            outcome.differs = [part for part in expected if expected[part] != got.get(part)]
            outcome.inexact = sorted({reason for reason in _reported(chain) if reason is not None})
            outcome.resumed = len(list(_reported(chain)))
        outcome.seconds = time.monotonic() - began
        return outcome

    def _uninterrupted(self, settings: dict[str, Any], folder: Path) -> float:
        process = self._start(settings, folder)
        _wait_for_start(process, folder)
        began = time.monotonic()
        process.join(DEADLINE)
        if process.exitcode != 0:
            raise RuntimeError(f"the training ended with {process.exitcode}: {_tail(folder)}")
        return time.monotonic() - began

    def _killed(self, settings: dict[str, Any], folder: Path, duration: float, outcome: Outcome) -> None:
        for _ in range(self._kills):
            process = self._start(settings, folder)
            _wait_for_start(process, folder)
            process.join(self._random.uniform(0.0, 1.6 / self._kills) * duration)
            if process.exitcode is not None:
                break
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            outcome.kills += 1
        while not (folder / "result.json").exists():
            process = self._start(settings, folder)
            process.join(DEADLINE)
            if process.exitcode != 0:
                raise RuntimeError(f"the resumed training ended with {process.exitcode}: {_tail(folder)}")
            if not (folder / "result.json").exists():
                # The kill came between the last checkpoint and the result: there is nothing left to train.
                newest = max(folder.glob("checkpoints/*/*/ep*_metadata.json"), key=lambda path: path.stat().st_mtime)
                ends = [json.loads(path.read_bytes())["num_timesteps"] for path in (
                    newest, *folder.with_name("alone").glob("checkpoints/*/*/ep*_metadata.json"))]  # fmt: skip
                if ends[0] != max(ends):
                    raise RuntimeError(f"nothing is left to train at {ends[0]} of {max(ends)} timesteps")
                newest.unlink()

    def _start(self, settings: dict[str, Any], folder: Path) -> multiprocessing.process.BaseProcess:
        (folder / "result.started").unlink(missing_ok=True)
        if not any(folder.glob("checkpoints/*/*/ep*_metadata.json")):
            # Killed before its first checkpoint, it begins anew, and would append to what it finds, as it is told to.
            for path in folder.glob("[0-9].monitor.csv"):
                path.unlink()
        whole = {"mlflow": False, "seed": 7, "checkpoint_interval_episodes": 1, "resume_from_checkpoint": "auto",
                 "device": "cpu", **settings}  # fmt: skip
        process = self._processes.Process(target=run, args=(whole, str(folder), str(folder / "result.json")))
        process.start()
        return process


def _wait_for_start(process: multiprocessing.process.BaseProcess, folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not (folder / "result.started").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def _reported(folder: Path) -> Iterator[str | None]:
    for record in folder.glob("checkpoints/*/*/run.json"):
        resume = json.loads(record.read_bytes()).get("resume")
        if resume is not None:
            yield None if resume["exact"] else str(resume["reason"])


def _tail(folder: Path) -> str:
    text = (folder / "stderr.txt").read_text() if (folder / "stderr.txt").exists() else ""
    return text[-2000:]


def print_table(outcomes: Iterable[Outcome]) -> None:
    """Print what came out, a line a training."""
    print("| training | kills | resumes | the same bytes at the end | seconds |\n|---|---|---|---|---|")
    for outcome in outcomes:
        verdict = "yes" if outcome.exact else f"NO: {', '.join(outcome.differs)} {'; '.join(outcome.inexact)}"
        print(
            f"| {outcome.name} | {outcome.kills} | {outcome.resumed} | {verdict} | {outcome.seconds:.0f} |", flush=True
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows and print the table; return how many were not exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs of each training")
    parser.add_argument("--seed", type=int, default=0, help="decides the instants")
    parser.add_argument("--times", type=int, default=1, help="how many times as long each training is")
    parser.add_argument("--only", default="", help="only rows whose name holds this text")
    options = parser.parse_args(arguments)
    matrix = Matrix(options.kills, options.seed, options.times)
    outcomes = (matrix.outcome(name, settings) for name, settings in ROWS.items() if options.only in name)
    kept: list[Outcome] = []

    def each() -> Iterator[Outcome]:
        for outcome in outcomes:
            kept.append(outcome)
            yield outcome

    print_table(each())
    failed = sum(not outcome.exact for outcome in kept)
    print(f"{len(kept)} trainings, {sum(o.kills for o in kept)} kills, {failed} not exact")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
