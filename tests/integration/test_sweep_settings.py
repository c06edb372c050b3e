"""What a sweep.yaml may say, and how it is refused: before Ray is started."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT, environment
from sweeps import run_sweep, words, write_sweep

from sb3_mlflow_ckpt.cli.sweep import sweep_command
from sb3_mlflow_ckpt.config import flatten
from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.scale.search_space import Distribution
from sb3_mlflow_ckpt.scale.sweep_check import check_trials
from sb3_mlflow_ckpt.scale.sweep_config import SweepConfig, build_sweep

pytest.importorskip("ray.tune", reason="the extra [ray] is not installed")


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
        words(tmp_path / "sweep.yaml"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
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
