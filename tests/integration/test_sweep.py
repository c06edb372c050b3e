"""Sweeps on Ray Tune, as a user runs them: to their end, killed and resumed, with clones, and refused."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from processes import Leash, environment
from sweeps import (
    MOMENTS,
    kill_and_resume,
    records,
    restarted,
    run_sweep,
    same_weights,
    saves,
    tear_snapshot,
    write_sweep,
)

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.layout import RunFolder

pytest.importorskip("ray.tune", reason="the extra [ray] is not installed")
pytestmark = pytest.mark.usefixtures("only_ray")


def test_two_seeds_and_two_values_are_four_nested_runs_a_table_and_a_plot(tmp_path: Path) -> None:
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    file = write_sweep(
        tmp_path,
        training={"total_timesteps": 1000, "mlflow": True, "keep_last_n_checkpoints": 1},
        seeds=[0, 1],
        search={"learning_rate": {"grid": [0.001, 0.0003]}},
        report_interval_timesteps=500,
        storage_path=f"file://{tmp_path}/store",
    )
    # The environment's, as with the trainer; what is trained is the file's.
    given = {"SB3_MLFLOW_CKPT_TRACKING_URI": tracking_uri, "SB3_MLFLOW_CKPT_TOTAL_TIMESTEPS": "99"}
    done = run_sweep(file, env=environment(**given))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*tmp_path.glob("store/*/run_trial_*/checkpoint_*/ep*.zip")]) >= 4
    trials = records(tmp_path)
    values = [(r["config"]["seed"], r["config"]["learning_rate"], r["status"]) for r in trials.values()]
    assert sorted(values) == [(seed, rate, "completed") for seed in (0, 1) for rate in (0.0003, 0.001)]

    client = MlflowClient(tracking_uri)
    runs = client.search_runs(["0"])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id} and len(nested) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.info.end_time >= max(run.info.end_time for run in nested)
    assert {run.data.tags["sb3_mlflow_ckpt.run_id"] for run in nested} == {r["run_id"] for r in trials.values()}
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"curves.png", "trials.json"}

    (plot,) = tmp_path.glob("sweeps/*/curves.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(record["run_id"] in done.stdout for record in trials.values())
    command = re.search(r"^Resume with: (.*)$", done.stdout, re.MULTILINE)
    assert command is not None
    best = subprocess.run(
        [sys.executable, *shlex.split(command[1])[1:], "--total-timesteps", "1100", "--mlflow", "false"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert best.returncode == 0, best.stderr


def test_a_sweep_whose_driver_was_killed_goes_on_from_its_checkpoints_even_if_tune_knows_of_none(
    tmp_path: Path,
) -> None:
    moment = next(iter(MOMENTS))
    # Both trials wait where each has saved, and neither has reported.
    leash = Leash(tmp_path, 1000)
    training = {"total_timesteps": 6000, "env_wrappers": yaml.safe_load(f"[{leash.wrapper}]")}
    storage, elsewhere = str(tmp_path / "sweeps"), tmp_path / "elsewhere"

    def go(folder: Path) -> None:
        """Resume it from half a snapshot, and standing in another folder, where relative paths mean something else."""
        leash.release()
        tear_snapshot(folder)
        elsewhere.mkdir()
        (folder / "sweep.yaml").rename(elsewhere / "sweep.yaml")

    before, after, _ = kill_and_resume(
        tmp_path, moment, meanwhile=go, stand=elsewhere, seeds=[0], training=training, storage_path=storage
    )
    assert sum(map(bool, before.values())) >= 2 and not (elsewhere / "checkpoints").exists()
    assert len(records(tmp_path)) == 2
    assert restarted(before, after) == {}
    assert {record["status"] for record in records(tmp_path).values()} == {"completed"}
    assert all(record["resume"] == {"exact": True, "reason": None} for record in records(tmp_path).values())


def test_a_population_clones_exactly_and_its_lineage_says_what_was_perturbed(tmp_path: Path) -> None:
    # A learning rate of 0 keeps each member's weights as they are, so that a clone's are its donor's for good.
    names = ("gamma", "gae_lambda", "ent_coef", "vf_coef", "clip_range", "clip_range_vf", "max_grad_norm", "target_kl")
    others = ("checkpoint_interval_episodes", "keep_best_n", "keep_every_n_episodes")
    file = write_sweep(
        tmp_path,
        training={
            "total_timesteps": 4096, "learning_rate": 0, "keep_last_n_checkpoints": 0,
            "env_wrappers": [{"processes:lockstep": {"folder": str(tmp_path / "steps")}}],
        },
        seeds=[0, 1],
        search={
            **{f"hyperparameters.{name}": {"uniform": [0.1, 0.9]} for name in names},
            **{name: {"randint": [5, 9]} for name in others},
        },
        scheduler="pbt",
        # Whichever process is the faster, both are compared; of so many values some are drawn anew, and some not.
        pbt={"perturbation_interval": 1024, "quantile_fraction": 0.5, "resample_probability": 0.5},
        report_interval_timesteps=512,
    )
    done = run_sweep(file)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [step for record in records(tmp_path).values() for step in record["sweep"]["lineage"]]
    done_by = {change["by"] for step in steps for change in step["perturbed"].values()}
    assert steps and "resample" in done_by and done_by & {"* 0.8", "* 1.2"}, done_by
    assert all(
        change["from"] != change["to"] for s in steps for change in s["perturbed"].values() if change["by"] != "kept"
    )

    assert sorted(record["config"]["seed"] for record in records(tmp_path).values()) == [0, 1]
    for trial in tmp_path.glob("sweeps/*/run_trial_*"):
        # Of eight reports: what has been compared last and since, and what another went on from.
        assert 1 <= len([*trial.glob("checkpoint_*")]) <= 4

    kept = {verify_checkpoint(path).files[0].sha256: path for path in tmp_path.glob("checkpoints/*/*/ep*.zip")}
    for record in records(tmp_path).values():
        facts = record["sweep"]
        assert facts["generation"] == len(facts["lineage"]) and record["status"] == "completed"
        if facts["donor"] is None:
            continue
        donor = kept[facts["donor"]["sha256"]]
        assert verify_checkpoint(donor).run_id == facts["donor"]["run_id"]
        folder = RunFolder(tmp_path / "checkpoints", record["agent_id"], record["run_id"])
        clone = latest_checkpoint(folder.checkpoint_dir, folder.run_id)
        assert clone is not None and verify_checkpoint(clone).extra_state["sweep"] == facts
        same_weights(clone, donor)
        for name, value in facts["hyperparameters"].items():
            section, _, key = name.partition(".")
            assert (record["config"][section][key] if key else record["config"][section]) == value




def test_a_trial_that_asha_stops_is_killed_and_one_that_raises_has_failed(tmp_path: Path) -> None:
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    # One after the other: the second is worse than the first at the first rung.
    better, worse, broken = {"length": 20}, {"length": 10}, {"length": 10, "fails_at": 300}
    file = write_sweep(
        tmp_path,
        training={
            "env_id": "toy_environments:FixedLength-v0", "total_timesteps": 2048, "mlflow": True,
            "tracking_uri": tracking_uri,
        },
        search={"env_kwargs": {"grid": [better, worse, broken]}},
        concurrency=1,
        scheduler="asha",
        asha={"grace_period": 512, "reduction_factor": 2},
        report_interval_timesteps=256,
        max_failures=0,
    )  # fmt: skip
    done = run_sweep(file)
    assert done.returncode == 1, done.stdout + done.stderr
    runs = MlflowClient(tracking_uri).search_runs(["0"])
    trials = records(tmp_path)
    how = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    by_id = {run.data.tags.get("sb3_mlflow_ckpt.run_id"): run for run in runs}
    for record in trials.values():
        assert by_id[record["run_id"]].info.status == how[record["status"]]
    assert [record["status"] for record in trials.values()] == ["completed", "interrupted", "failed"]
    assert trials["00002"]["error"]["message"] == "the simulator broke"
    assert by_id[None].info.status == "FAILED"


def test_a_failed_attempt_is_a_line_and_a_resume_may_try_more_often_but_not_train_something_else(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "training": {"env_id": "toy_environments:FixedLength-v0", "env_kwargs": {"fails_at": 300}, "learning_rate": 0.001},
        "concurrency": 1,
        "report_interval_timesteps": 500,
        "max_failures": 1,
    }
    done = run_sweep(write_sweep(tmp_path, **keys))
    assert done.returncode == 1 and "the simulator broke" not in done.stderr
    (trace,) = tmp_path.glob("sweeps/*/run_trial_*/error.txt")
    (run_id,) = (record["run_id"] for record in records(tmp_path).values())
    cause = f"RuntimeError: the simulator broke; attempt {{}}, its whole trace is in {trace}"
    told = [line for line in done.stdout.splitlines() if "the simulator broke" in line]
    assert told == [
        f"{run_id} failed, and is tried again: {cause.format('1 of 2')}",
        f"{run_id} ended with an error: {cause.format('2 of 2')}",
    ]
    assert trace.read_text().count('raise RuntimeError("the simulator broke")') == 2

    other = {**keys, "training": {**keys["training"], "learning_rate": 0.0003}, "concurrency": 2}
    refused = run_sweep(write_sweep(tmp_path, **other), "--resume")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"Error: resume: {run_id.rpartition('-')[0]} was started with other settings: "
        "training.learning_rate: 0.001 -> 0.0003, concurrency: 1 -> 2. "
        "Put them back, or start a new sweep without --resume\n"
    )

    more = run_sweep(write_sweep(tmp_path, **{**keys, "max_failures": 3, "resources": {"cpu": 0.25}}), "--resume")
    assert more.returncode == 1, more.stdout + more.stderr
    told = [line for line in more.stdout.splitlines() if "the simulator broke" in line]
    assert told == [
        f"{run_id} failed, and is tried again: {cause.format('3 of 4')}",
        f"{run_id} ended with an error: {cause.format('4 of 4')}",
    ]
    (steps,) = saves(tmp_path).values()
    assert steps == sorted(steps)
    snapshot = json.loads(max(tmp_path.glob("sweeps/*/experiment_state-*.json")).read_text())
    (trial,) = (json.loads(state) for state, _ in snapshot["trial_data"])
    assert trial["max_failures"] == 3
    assert pickle.loads(bytes.fromhex(trial["placement_group_factory"])).required_resources == {"CPU": 0.25}
