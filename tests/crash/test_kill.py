"""SIGKILL at any instruction leaves the last committed checkpoint loadable, and nothing half-written is shown."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, start_trainer, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX, RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns, read_run

# Saves episodes 1 to 3, the second twice, keeping two; dies by its own SIGKILL before the N-th call that changes
# the disk. The zip's content tells which save it was.
_SAVER = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
calls, last = 0, int(sys.argv[1])
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
from stable_baselines3 import PPO
from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.commit import capture_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.live_run import LiveRun, RunOptions
from sb3_mlflow_ckpt.policies import Retention
from sb3_mlflow_ckpt.runs.document import new_record
model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu")
record = new_record(run_id="run", agent_id="a", name=None, algo="ppo", env_id=None, config={}, total_timesteps=9,
                    parent=None, root_run_id=None, heartbeat_seconds=3600, environment={})
for name in ("replace", "fsync", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
live = LiveRun(RunFolder(Path("checkpoints"), "a", "run"), record, [], RunOptions(retention=Retention(2)), fresh=False)
for steps, episode in enumerate([1, 2, 2, 3], start=1):
    model.num_timesteps = steps
    live.save(capture_checkpoint(model, agent_id="a", run_id="run", episode=episode))
    live.flush()
    assert not [*live.failures()]
    with open("saved", "a") as done:
        done.write(f"{steps}\\n")
live.finish("completed")
print(calls)
"""


def _save(cwd: Path, last: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SAVER, str(last)], cwd=cwd, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_death_before_every_call_that_changes_the_disk_loses_no_commit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    calls = int(_save(whole, 0).stdout)
    assert calls > 40
    # Every third call here; the offset is drawn so that all are met over time.
    for last in range(random.randint(1, 4), calls + 1, 4):
        cwd = tmp_path / str(last)
        cwd.mkdir()
        assert _save(cwd, last).returncode == -signal.SIGKILL
        saved = (cwd / "saved").read_text().split() if (cwd / "saved").exists() else []
        paths = list_checkpoints(cwd / "checkpoints")
        states = [verify_checkpoint(path).num_timesteps for path in paths]
        newest = latest_checkpoint(cwd / "checkpoints")
        if saved:
            # What was reported as saved is there, unless a later one is there already.
            assert newest is not None, last
            assert verify_checkpoint(newest).num_timesteps >= int(saved[-1]), last
        assert len(states) <= 3
        # The next process on the folder takes it over, sweeps what is half-written and goes on.
        done = _save(cwd, 0)
        assert done.returncode == 0, done.stderr
        folder = RunFolder(cwd / "checkpoints", "a", "run")
        assert not [path for path in folder.path.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
        assert [path.name for path in list_checkpoints(cwd / "checkpoints")] == ["ep000002.zip", "ep000003.zip"]
        entries = {item["episode"]: item["state"] for item in read_run(folder)["checkpoint_paths"]}
        assert entries == {1: "pruned", 2: "local", 3: "local"}


@pytest.mark.parametrize("algo", ["ppo", "dqn"])
def test_random_kills_and_auto_reach_the_target(tmp_path: Path, algo: str) -> None:
    flags = ["--algo", algo, "--env-id", "CartPole-v1", "--mlflow", "false", "--resume-from-checkpoint", "auto"]
    flags += ["--total-timesteps", "6000", "--checkpoint-interval-episodes", "5"]
    flags += ["--hyperparameters", "{n_steps: 128}" if algo == "ppo" else "{learning_starts: 100}"]
    checkpoints = tmp_path / "checkpoints"
    committed = 0
    for _ in range(3):
        process = start_trainer(*flags, cwd=tmp_path)
        more = committed + random.randint(1, 400)

        def far_enough(steps: int = more) -> bool:
            newest = latest_checkpoint(checkpoints)
            return newest is not None and verify_checkpoint(newest).num_timesteps >= steps

        wait_for(far_enough, "a further checkpoint", process)
        process.kill()
        process.wait(30)
        newest = latest_checkpoint(checkpoints)
        assert newest is not None
        assert verify_checkpoint(newest).num_timesteps > committed
        committed = verify_checkpoint(newest).num_timesteps
    done = trainer(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = FolderRuns(checkpoints).list()
    assert [record["status"] for record in records] == ["completed", "running", "running", "running"]
    assert len({record["root_run_id"] for record in records}) == 1
    assert records[0]["progress"]["num_timesteps"] >= 6000
    # The chain is whole: each run names the checkpoint of the one before, and goes on from its numbers.
    for child, parent in itertools.pairwise(records):
        assert child["parent"]["run_id"] == parent["run_id"]
        path = Path(child["parent"]["checkpoint"])
        assert (
            json.loads(path.with_name(f"{path.stem}_metadata.json").read_text())["episode"]
            == child["parent"]["episode"]
        )
