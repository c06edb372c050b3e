"""Sweeps as a user runs them, and what became of their trials. Run it to kill a sweep's driver at three moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from processes import ROOT, environment, wait_for

from sb3_mlflow_ckpt.checkpoints import load_checkpoint

SWEEP_DEADLINE = 300.0
QUICK: dict[str, Any] = {
    "env_id": "CartPole-v1",
    "hyperparameters": {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}},
    "checkpoint_interval_episodes": 10,
    "mlflow": False,
}


def write_sweep(folder: Path, **keys: Any) -> Path:
    """Write a sweep.yaml of quick trainings; keys of `training` are merged into theirs."""
    training = {**QUICK, **keys.pop("training", {})}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "quick", "training": training, "resources": {"cpu": 0.5}, **keys}))
    return file


def words(file: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "sb3_mlflow_ckpt", "sweep", file.name, *flags]


def run_sweep(file: Path, *flags: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a sweep to its end."""
    return subprocess.run(
        words(file, *flags), cwd=file.parent, env=env or environment(), capture_output=True, text=True,
        timeout=SWEEP_DEADLINE,
    )  # fmt: skip


def start_sweep(file: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a sweep; its output goes to `sweep.log` beside it."""
    with (file.parent / "sweep.log").open("a") as log:
        return subprocess.Popen(
            words(file, *flags), cwd=file.parent, env=environment(), stdout=log, stderr=log, text=True
        )  # fmt: skip


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the record of each trial by its number."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("*/*/run.json")):
        record = json.loads(path.read_text())
        found[record["sweep"]["trial"]] = record
    return found


def saves(folder: Path) -> dict[str, list[int]]:
    """Return at which environment steps each run saved its checkpoints, in the order of the saves."""
    found: dict[str, list[int]] = {}
    for path in sorted((folder / "checkpoints").glob("*/*/checkpoints.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        found[path.parent.name] = [line["num_timesteps"] for line in lines if line["event"] == "saved"]
    return found


def reports(folder: Path) -> int:
    """Return how many checkpoints Ray Tune holds of all trials."""
    return len(list((folder / "sweeps").glob("*/run_trial_*/checkpoint_*")))


def completed(folder: Path) -> int:
    return sum(record["status"] == "completed" for record in records(folder).values())


MOMENTS: dict[str, Callable[[Path], bool]] = {
    # Tune knows of none: a report comes after 3,000 steps.
    "checkpoints of our own, before the first report": lambda folder: (
        sum(map(bool, saves(folder).values())) >= 2 and reports(folder) == 0
    ),
    "after the first reports": lambda folder: reports(folder) >= 2 and completed(folder) == 0,
    "one half has ended, the other trains": lambda folder: (
        completed(folder) >= 2 and sum(map(bool, saves(folder).values())) >= 4
    ),
}


def tear_snapshot(folder: Path) -> None:
    """Leave the half of Ray Tune's newest snapshot, as a machine that loses power in the middle of it does."""
    newest = max(folder.glob("sweeps/*/experiment_state-*.json"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


def kill_and_resume(
    folder: Path,
    moment: str,
    *,
    meanwhile: Callable[[Path], None] = lambda folder: None,
    stand: Path | None = None,
    **keys: Any,
) -> tuple[dict[str, list[int]], dict[str, list[int]], str]:
    """Kill a sweep's driver at a moment, do something, and resume it to its end, maybe standing in another folder.

    Returns:
        The saves of each run before the kill and at the end, and what the resumed sweep printed.
    """
    given = {"seeds": [0, 1], "search": {"learning_rate": {"grid": [0.001, 0.0003]}}, "concurrency": 2}
    training = {"total_timesteps": 12_000, **keys.pop("training", {})}
    file = write_sweep(folder, **{**given, "report_interval_timesteps": 3000, "training": training, **keys})
    process = start_sweep(file)
    wait_for(lambda: MOMENTS[moment](folder), moment, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = saves(folder)
    meanwhile(folder)
    done = run_sweep(stand / file.name if stand is not None else file, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    return before, saves(folder), done.stdout


def restarted(before: Mapping[str, list[int]], after: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the runs that had a checkpoint and went back behind their last one."""
    return {
        run: after[run]
        for run, steps in before.items()
        if steps and any(step <= steps[-1] for step in after[run][len(steps) :])
    }


def same_weights(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same parameters, bit for bit."""
    first, second = (load_checkpoint(path).model.policy.state_dict() for path in (one, other))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key].numpy(), second[key].numpy()) for key in first)


def main() -> None:
    for moment in MOMENTS:
        with tempfile.TemporaryDirectory() as name:
            before, after, _ = kill_and_resume(Path(name), moment)
            print(f"killed: {moment}")
            for run in after:
                had, has = before.get(run, []), after[run]
                print(f"  {run}: had {had[-3:]} of {len(had)}, then {has[len(had) :][:3]} ... {has[-1]}")
            print(f"  went back to zero or behind a checkpoint: {len(restarted(before, after))}")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
