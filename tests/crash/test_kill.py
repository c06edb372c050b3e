"""Trainings that are killed again and again, and go on with `auto`. The steps of a commit: tests/faults."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
from processes import start_trainer, trainer, wait_for

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.errors import CheckpointError
from sb3_mlflow_ckpt.runs.folder import FolderRuns


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
            # The trainer may have removed it since.
            with suppress(CheckpointError):
                return newest is not None and verify_checkpoint(newest).num_timesteps >= steps
            return False

        wait_for(far_enough, "a further checkpoint", process)
        process.kill()
        process.wait(300)
        newest = latest_checkpoint(checkpoints)
        assert newest is not None
        assert verify_checkpoint(newest).num_timesteps > committed
        committed = verify_checkpoint(newest).num_timesteps
    done = trainer(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = FolderRuns(checkpoints).list()
    # Two minutes after its last heartbeat one that was killed counts as lost.
    assert [record["status"].replace("lost", "running") for record in records] == ["completed", *["running"] * 3]
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
