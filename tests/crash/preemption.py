"""Sends signals at random instants to trainings that go on with `auto`, and prints what was lost and how long it took.

`python tests/crash/preemption.py --signals 100`; exits with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlflow import MlflowClient
from preempted import SIGNALS, shell_code
from processes import DEADLINE, environment, trainer

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_GRACE = 20
_TOGETHER_SECONDS = 0.5
_ALGORITHMS = {"ppo": "{n_steps: 64}", "dqn": "{learning_starts: 50}", "sac": "{learning_starts: 50}"}


@dataclass
class Row:
    """What one kind of fault did."""

    times: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Chain:
    """Launches of one training, each of which is signalled and goes on from the one before."""

    def __init__(self, cwd: Path, algo: str) -> None:
        self.cwd = cwd
        self.algo = algo
        self.checkpoint_dir = cwd / "checkpoints"
        self.client = MlflowClient(f"sqlite:///{cwd}/mlflow.db")

    def flags(self, target: int) -> list[object]:
        continuous = "{continuous: true}" if self.algo == "sac" else "{}"
        return [
            *("--algo", self.algo, "--env-id", "toy_environments:FixedLength-v0", "--env-kwargs", continuous),
            *("--hyperparameters", _ALGORITHMS[self.algo], "--checkpoint-interval-episodes", 20),
            *("--total-timesteps", target, "--resume-from-checkpoint", "auto", "--grace-seconds", _GRACE),
        ]

    def preempt(self, chance: random.Random, longest: float) -> tuple[str, list[str], float]:
        """Launch, signal at a random instant; return the fault, what was lost, and the seconds to the exit."""
        before = self._reached()
        runs = {record["run_id"] for record in self._records()}
        with (self.cwd / "trainer.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sb3_mlflow_ckpt.trainer", *map(str, self.flags(10**7))],
                cwd=self.cwd, env=environment(), stdout=log, stderr=log, text=True,
            )  # fmt: skip
        signums = [chance.choice(SIGNALS) for _ in range(chance.choice((1, 1, 2)))]
        if chance.random() < 0.3:
            self._pause(process, chance.uniform(0, longest))
        else:
            while process.poll() is None and not self._trains(runs):
                time.sleep(0.02)
            self._pause(process, chance.uniform(0, longest / 3))
        new = [record for record in self._records() if record["run_id"] not in runs]
        sent = time.monotonic()
        first, decisive = sent, signums[:1]
        for number, signum in enumerate(signums):
            if number:
                self._pause(process, chance.uniform(0, 2))
                if time.monotonic() - first < _TOGETHER_SECONDS:
                    # Of several that come at once, the lowest number decides: at once is when the process gets to run.
                    decisive = signums
            if process.poll() is None:
                process.send_signal(signum)
            first = first if number else time.monotonic()
        code = process.wait(DEADLINE)
        seconds = time.monotonic() - sent
        kind = f"{signums[0].name}{', twice' if len(signums) > 1 else ''}"
        moment = "while it trains" if new else "before it trains"
        return f"{kind} {moment}", self._problems(code, decisive, before, runs), seconds

    def _problems(self, code: int, signums: list[signal.Signals], before: int, runs: set[str]) -> list[str]:
        log = (self.cwd / "trainer.log").read_text()
        found = []
        # Python itself can end with 1, and says why, while it starts.
        if "Fatal Python error: init_import_site" not in log:
            if shell_code(code) not in [128 + signum for signum in signums]:
                found.append(f"exit code {code} after {[signum.name for signum in signums]}: {log[-600:]}")
            if "Traceback" in log and code >= 0:
                found.append(f"a traceback: {log[-600:]}")
        for record in self._records():
            if record["run_id"] in runs:
                continue
            newest = self._newest()
            if record["status"] != "interrupted":
                found.append(f"a record says {record['status']}")
            if newest is None or newest.num_timesteps < record["progress"]["num_timesteps"]:
                found.append(f"no checkpoint of {record['progress']}")
        if self._reached() < before:
            found.append(f"{before - self._reached()} steps")
        for path in list_checkpoints(self.checkpoint_dir):
            verify_checkpoint(path)
        if (self.cwd / "mlflow.db").exists():
            running = self.client.search_runs(["0"], "attributes.status = 'RUNNING'")
            found += [f"MLflow run {run.info.run_id} is RUNNING" for run in running]
        return found

    def finish(self) -> list[str]:
        """Let it reach a target; return what is wrong."""
        target = self._reached() + 200
        done = trainer(*self.flags(target), cwd=self.cwd)
        if done.returncode != 0 or self._reached() < target:
            return [f"auto did not reach the target: {done.stdout}{done.stderr}"]
        records = self._records()
        roots = {record["root_run_id"] for record in records}
        return [] if len(roots) == 1 else [f"{len(roots)} trainings instead of one"]

    def _trains(self, runs: set[str]) -> bool:
        return any(path.parent.name not in runs for path in self.checkpoint_dir.glob("*/*/run.json"))

    @staticmethod
    def _pause(process: subprocess.Popen[str], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)

    def _records(self) -> list[dict[str, Any]]:
        return FolderRuns(self.checkpoint_dir).list() if self.checkpoint_dir.exists() else []

    def _newest(self) -> Any:
        newest = latest_checkpoint(self.checkpoint_dir) if self.checkpoint_dir.exists() else None
        return verify_checkpoint(newest) if newest is not None else None

    def _reached(self) -> int:
        newest = self._newest()
        return newest.num_timesteps if newest is not None else 0


def campaign(folder: Path, algo: str, signals: int, seed: int, longest: float) -> dict[str, Row]:
    """Return what a chain of launches came to."""
    cwd = folder / algo
    cwd.mkdir(parents=True)
    chain, chance = Chain(cwd, algo), random.Random(seed)
    rows: dict[str, Row] = defaultdict(Row)
    for _ in range(signals):
        fault, lost, seconds = chain.preempt(chance, longest)
        print(f"{algo}: {fault}, {seconds:.2f} s, lost {lost or 'nothing'}", file=sys.stderr, flush=True)
        row = rows[fault]
        row.times += 1
        row.lost += lost
        row.seconds.append(seconds)
    rows["`auto` to the target"].times += 1
    rows["`auto` to the target"].lost += chain.finish()
    return rows


def merged(parts: list[dict[str, Row]]) -> dict[str, Row]:
    """Return the rows of several campaigns in one."""
    rows: dict[str, Row] = defaultdict(Row)
    for part in parts:
        for fault, row in part.items():
            rows[fault].times += row.times
            rows[fault].lost += row.lost
            rows[fault].seconds += row.seconds
    return dict(sorted(rows.items()))


def table(rows: dict[str, Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| fault | times | lost | signal to exit, median | longest |",
        "|---|---|---|---|---|",
    ]
    for fault, row in rows.items():
        times = f"{statistics.median(row.seconds):.2f} s | {max(row.seconds):.2f} s" if row.seconds else "|"
        lines.append(f"| {fault} | {row.times} | {len(row.lost) or 'nothing'} | {times} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=100, help="how many in all")
    parser.add_argument("--algos", default="ppo,dqn", help="a chain of launches for each, side by side")
    parser.add_argument("--longest", type=float, default=6.0, help="the latest instant, in seconds after the launch")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the instants")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    algos = options.algos.split(",")
    counts = [options.signals // len(algos) + (n < options.signals % len(algos)) for n in range(len(algos))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(algos)) as pool:
        seeds = [options.seed + n for n in range(len(algos))]
        arguments = (algos, counts, seeds, [options.longest] * len(algos))
        rows = merged(list(pool.map(lambda *a: campaign(Path(folder), *a), *arguments)))
    if options.json:
        print(json.dumps({fault: vars(row) for fault, row in rows.items()}, indent=2))
    else:
        print(f"Seed {options.seed}; grace period {_GRACE} s\n\n{table(rows)}")
    problems = [f"{fault}: {problem}" for fault, row in rows.items() for problem in row.lost]
    print("\n".join(problems), file=sys.stderr)
    slow = [fault for fault, row in rows.items() if row.seconds and max(row.seconds) > _GRACE]
    print("".join(f"{fault}: longer than the grace period\n" for fault in slow), file=sys.stderr, end="")
    return 1 if problems or slow else 0


if __name__ == "__main__":
    sys.exit(main())
