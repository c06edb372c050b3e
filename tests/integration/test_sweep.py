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

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from processes import ROOT, Leash, environment, trainer
from sweeps import MOMENTS, kill_and_resume, records, restarted, run_sweep, saves, tear_snapshot, words, write_sweep

from sb3_mlflow_ckpt.checkpoints import latest_checkpoint, load_checkpoint, prune_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.cli.sweep import sweep_command
from sb3_mlflow_ckpt.config import flatten
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.layout import RunFolder, metadata_path
from sb3_mlflow_ckpt.resume import newest_of_run, resolve_checkpoint
from sb3_mlflow_ckpt.scale.search_space import Distribution
from sb3_mlflow_ckpt.scale.sweep_check import check_trials
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig, build_sweep
from sb3_mlflow_ckpt.scale.trial_row import _forward
from sb3_mlflow_ckpt.scale.trial_start import EXPLOIT, TrialStart, handed_checkpoint, trial_start

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
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
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
        _same_weights(clone, donor)
        for name, value in facts["hyperparameters"].items():
            section, _, key = name.partition(".")
            assert (record["config"][section][key] if key else record["config"][section]) == value


def _same_weights(one: Path, other: Path) -> None:
    first, second = (load_checkpoint(path).model.policy.state_dict() for path in (one, other))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key].numpy(), second[key].numpy()) for key in first)


def _trained(folder: Path, run_id: str, rate: float, seed: int) -> Path:
    flags = ["--total-timesteps", 128, "--learning-rate", rate, "--hyperparameters", "{n_steps: 64, batch_size: 64}"]
    done = trainer(*flags, "--run-id", run_id, "--seed", seed, "--mlflow", "false", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = latest_checkpoint(folder / "checkpoints", run_id)
    assert found is not None
    return found


def test_a_clone_learns_with_its_own_rate_from_the_first_update(tmp_path: Path) -> None:
    donor = _trained(tmp_path, "donor", 0.001, seed=1)
    _trained(tmp_path, "clone", 0.5, seed=2)
    space = {"learning_rate": Distribution("loguniform", (1e-5, 1.0))}
    config: dict[str, Any] = {"learning_rate": 0.0, EXPLOIT: "one"}
    def go_on(config: dict[str, Any], *handed: Path) -> TrialStart:
        given = [resolve_checkpoint(str(path), checkpoint_dir=str(path.parent), agent_id="") for path in handed]
        own = newest_of_run("clone", checkpoint_dir=str(tmp_path / "checkpoints"), tracked=False)
        return trial_start("clone", config, own, *given or [None], space)

    start = go_on(config, donor)
    assert start.source is not None and start.source.path == donor and start.generation == 1
    assert start.donor is not None and start.donor["run_id"] == "donor"
    sweep = build_sweep({"training": {"total_timesteps": 192, "mlflow": False}}, "sweep.yaml")
    training = sweep.trial_config(
        start.hyperparameters,
        run_id="clone",
        checkpoint_dir=str(tmp_path / "checkpoints"),
    )
    from sb3_mlflow_ckpt.trainer import SweepPlace, train

    facts = {"id": "s", "trial": "0", **start.facts()}
    result = train(training, sweep=SweepPlace(facts, source=start.source))
    assert result.num_timesteps == 192 and result.checkpoint is not None
    # With the donor's rate, an update would have changed them.
    _same_weights(result.checkpoint, donor)
    # The same clone is not taken up twice; what it has saved since is the newest.
    again = go_on(config, donor)
    assert again.source is not None and again.source.path == result.checkpoint and again.generation == 1
    # Nor does a snapshot from before the exploit bring the trial back behind it.
    assert go_on({"learning_rate": 0.5}).hyperparameters == {"learning_rate": 0.0}


def test_what_was_reported_is_whole_after_retention_has_removed_it_from_the_run(tmp_path: Path) -> None:
    from sb3_mlflow_ckpt.scale.tune_reports import staged

    reported = _trained(tmp_path, "donor", 0.001, seed=1)
    with staged(reported) as (folder, metadata):
        # The next checkpoint of a run that keeps one takes its place.
        newer = trainer(
            *("--resume-from-checkpoint", reported, "--run-id", "donor", "--total-timesteps", 640),
            *("--keep-last-n-checkpoints", 1, "--mlflow", "false"), cwd=tmp_path,
        )  # fmt: skip
        assert newer.returncode == 0, newer.stderr
        prune_checkpoints(tmp_path / "checkpoints", "donor", keep_last_n=1)
        assert not reported.exists()
        assert verify_checkpoint(folder / reported.name) == metadata
    assert not folder.exists()


def test_what_tune_dropped_is_not_what_it_hands(tmp_path: Path) -> None:
    dropped = _trained(tmp_path, "member", 0.001, seed=1)
    folder = tmp_path / "checkpoint_000001"
    folder.mkdir()
    later = trainer(
        *("--resume-from-checkpoint", dropped, "--run-id", "member", "--total-timesteps", 192, "--mlflow", "false"),
        cwd=tmp_path,
    )
    assert later.returncode == 0, later.stderr
    newest = latest_checkpoint(tmp_path / "checkpoints", "member")
    assert newest is not None
    for path in (dropped, newest):
        for file in (path, metadata_path(path)):
            (folder / file.name).hardlink_to(file)
    assert handed_checkpoint(folder) == folder / newest.name
    # The highest episode is not the newest, once a trial has gone on from another.
    for file in (newest, metadata_path(newest)):
        (folder / file.name).unlink()
    assert handed_checkpoint(folder) == folder / dropped.name


def test_a_curve_is_drawn_without_what_a_clone_left_behind() -> None:
    assert _forward([(2000, 10), (5000, 12), (3500, 40), (4500, 60)]) == [(2000, 10), (3500, 40), (4500, 60)]


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sheduler": "pbt"}, "sheduler: is not a key of a sweep (from s.yaml). Did you mean 'scheduler'?"),
        ({"n_envs": 2}, "n_envs: is not a key of a sweep (from s.yaml). It goes under 'training:'"),
        ({"scheduler": "pbx"}, "scheduler: 'pbx' is not one of fifo, asha, pbt (from s.yaml). Did you mean 'pbt'?"),
        ({"training": {"n_envz": 2}}, "n_envz: is not a setting (from s.yaml, training). Did you mean 'n_envs'?"),
        ({"training": {"seed": 2}}, "training.seed: is no setting of a sweep (from s.yaml). List them under 'seeds:'"),
        (
            {"search": {"learning_rate": {"loguniform": [1, 0.1]}}},
            "search.learning_rate: loguniform needs a lower and then a higher number, not 1 and 0.1 (from s.yaml)",
        ),
        (
            {"search": {"n_envs": {"choice": [0]}}},
            "n_envs: 0 is not valid: input should be greater than or equal to 1 (from s.yaml, search)",
        ),
        (
            {"search": {"gamma": {"choice": [0.9, 0.99]}}},
            "search.gamma: is not a setting (from s.yaml). Did you mean 'hyperparameters.gamma'?",
        ),
        (
            {"training": {"algo": "dqn"}, "search": {"gae_lambda": {"choice": [0.9, 0.99]}}},
            "search.gae_lambda: is not a setting (from s.yaml). Known: total_timesteps, ",
        ),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names a seed twice (from s.yaml). Name each once"),
        ({"name": "../x"}, "name: '../x' holds a character that separates or is reserved in paths"),
        (
            {"scheduler": "pbt", "samples": 4, "search": {"n_envs": {"choice": [1, 2]}}},
            "search.n_envs: cannot change within a training, as pbt would have it (from s.yaml)",
        ),
        (
            {"scheduler": "pbt", "samples": 4, "search": {"hyperparameters.use_sde": {"choice": [True, False]}}},
            "search.hyperparameters.use_sde: cannot change within a training, as pbt would have it (from s.yaml)",
        ),
        (
            {"scheduler": "pbt", "samples": 4, "concurrency": 2, "search": {"learning_rate": {"uniform": [0.1, 0.2]}}},
            "concurrency: 2 would split the population of 4 (from s.yaml). Leave it out",
        ),
        (
            {"scheduler": "asha", "training": {"total_timesteps": 5000}},
            "asha.grace_period: 10000 is more than the 5000 steps of a training",
        ),
        (
            {"search": {"n_envs": {"uniform": [1, 4]}}},
            "n_envs: 2.1458980337503153 is not valid",
        ),
        (
            {"search": {"checkpoint_dir": {"choice": ["a", "b"]}}},
            "search.checkpoint_dir: is not searched over (from s.yaml). It is the same for all: 'training:'",
        ),
        (
            {"scheduler": "pbt", "search": {"learning_rate": {"uniform": [0.1, 0.2]}}},
            "samples: 1 makes a population of one (from s.yaml). Give pbt at least 2",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_a_sweep_that_cannot_be_used_is_refused_with_its_cause(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_sweep(values, "s.yaml")
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("address", ["nostore://x", "s3://sweeps?endpoint_override=http://user:secret@127.0.0.1:9&scheme=http"])
def test_a_store_that_cannot_be_used_is_refused_before_anything_starts(address: str, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, storage_path=address)
    done = run_sweep(file, env=environment(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="y", AWS_MAX_ATTEMPTS="1"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"Error: storage_path: {address[:8]}") and done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert not (tmp_path / "sweeps").exists()


def test_a_wrong_sweep_yaml_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("seeds: 3\n")
    done = subprocess.run(
        words(tmp_path / "sweep.yaml"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Error: seeds: '3' is not valid: input should be a valid list (from sweep.yaml)\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training": {"env_id": "CartPol-v1"}}, "env_id: 'CartPol-v1' cannot be made: "),
        ({"training": {"env_id": "CartPol-v1", "vec_env": "subproc"}}, "env_id: 'CartPol-v1' cannot be made: "),
        ({"training": {"env_kwargs": {"gravitas": 1}}}, "env_kwargs: 'CartPole-v1' refuses {'gravitas': 1}: "),
        ({"training": {"env_wrappers": ["nowhere:Wrapper"]}}, "env_wrappers: 'nowhere:Wrapper' cannot be imported: "),
        ({"training": {"policy": "CnnPolice"}}, "policy: 'CnnPolice' is no policy of PPO. Did you mean 'CnnPolicy'?"),
        (
            {"training": {"hyperparameters": {"policy_kwargs": {"net_arc": [8]}}}},
            "hyperparameters: PPO refuses the configuration: ",
        ),
        # One value of a search is wrong, and the others are not.
        (
            {"search": {"env_id": {"grid": ["CartPole-v1", "CartPol-v1"]}, "learning_rate": {"uniform": [0.1, 0.2]}}},
            "env_id: 'CartPol-v1' cannot be made: ",
        ),
        (
            {"search": {"algo": {"choice": ["ppo", "sac"]}}, "training": {"hyperparameters": {}}},
            "hyperparameters: SAC refuses the configuration: ",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_what_no_trial_could_begin_with_is_told_before_ray_and_mlflow_are_touched(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    training = {"mlflow": True, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", **keys.pop("training", {})}
    file = write_sweep(tmp_path, training=training, **keys)
    done = run_sweep(file)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: {message}") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_an_environment_that_only_the_trials_nodes_have_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    check_trials(build_sweep({"training": {"env_id": "installed_there:Env-v0"}}, "s.yaml"), elsewhere=True)
    assert "env_id: 'installed_there:Env-v0' cannot be imported: " in caplog.text
    with pytest.raises(ConfigError, match="learning_starts"):
        check_trials(build_sweep({"training": {"hyperparameters": {"learning_starts": 1}}}, "s.yaml"), elsewhere=True)


def test_what_is_made_before_a_sweep_takes_no_memory_of_the_driver() -> None:
    training = {"algo": "dqn", "hyperparameters": {"buffer_size": 10**15}}
    check_trials(build_sweep({"training": training}, "s.yaml"))
    goals = {"algo": "sac", "env_id": "toy_environments:ReachGoal-v0"}
    hindsight = {"replay_buffer_class": "stable_baselines3:HerReplayBuffer", "learning_starts": 100}
    check_trials(build_sweep({"training": {**goals, "hyperparameters": hindsight}}, "s.yaml"))


def test_what_an_algorithm_takes_as_a_whole_number_is_not_drawn_as_a_fraction(tmp_path: Path) -> None:
    done = run_sweep(write_sweep(tmp_path, search={"hyperparameters.n_epochs": {"uniform": [1, 4]}}))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: search.hyperparameters.n_epochs: uniform draws fractions, and ppo takes whole numbers. "
        "Write randint: [low, high]\n"
    )


def test_a_perturbation_stays_within_the_bounds_of_its_search_space() -> None:
    gamma = Distribution("uniform", (0.9, 0.999))
    assert gamma.within(0.99 * 1.2) == 0.999
    assert gamma.operation(0.99, 0.999) == "clamped"
    assert gamma.operation(0.99, 0.99 * 0.8) == "resample"  # It lies beyond the end.
    assert Distribution("uniform", (0.1, 0.9)).operation(0.5, 0.6) == "* 1.2"
    assert gamma.operation(0.99, 0.95) == "resample"
    assert Distribution("choice", (1, 2, 3)).operation(1, 2) == "shift"


def test_the_document_has_every_key_with_its_default_and_its_sweeps_are_sweeps() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    told = {name.strip().strip("`"): default.strip().strip("`") for name, default in rows}
    assert [option for parameter in sweep_command.params for option in parameter.opts if option not in text] == ["sweep_file"]
    defaults = flatten(SweepConfig(training={"-": 0}, search={"-": 0}).model_dump())
    known = {key.removesuffix(".-"): None if key.endswith(".-") else value for key, value in defaults.items()}
    assert told == {key: "unset" if value is None else str(value) for key, value in known.items()}
    examples = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    assert [build_sweep(example, "docs/sweeps.md").scheduler for example in examples] == ["fifo", "pbt"]
