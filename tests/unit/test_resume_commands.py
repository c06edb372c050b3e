"""What a resume command says, by what the record of a run says; that such commands resume is shown by running them."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.resume_commands import given_again, resume_command, shell_word

_URI = "runs:/5f0c/checkpoints/ep000050.zip"


def record(**more: Any) -> dict[str, Any]:
    """Return the record of a run that was tracked on a server."""
    own = {"env_id": "CartPole-v1", "total_timesteps": 1000, **more.pop("config", {})}
    config = build_config([Layer("test", own)]).to_json()
    mlflow = {"tracking_uri": "http://mlflow.example:5000", "experiment_name": "Default", "run_id": "5f0c"}
    return {"run_id": "5f0c", "env_id": "CartPole-v1", "config": config, "mlflow": mlflow, "mirrors": ["MLflow"], **more}


def item(**more: Any) -> dict[str, Any]:
    """Return a checkpoint that is on disk and in MLflow."""
    path = "/data/checkpoints/ppo_agent/5f0c/ep000050.zip"
    return {"path": path, "uri": _URI, "on_disk": True, "state": "mirrored", "num_timesteps": 500, **more}


def words(run: dict[str, Any], checkpoint: dict[str, Any], program: Any = "trainer", source: Any = "path") -> list[str]:
    return shlex.split(resume_command(run, checkpoint, program=program, source=source) or "")


def test_a_plain_run_is_resumed_by_its_path_alone() -> None:
    path = item()["path"]
    trainer = ["python", "-m", "sb3_mlflow_ckpt.trainer", "--resume-from-checkpoint"]
    assert words(record(), item()) == [*trainer, path]
    assert words(record(), item(), source="uri") == [*trainer, _URI, "--tracking-uri", "http://mlflow.example:5000"]
    mlflow = ["mlflow", "run", ".", "--env-manager", "local", "-P"]
    assert words(record(), item(), "mlflow") == [*mlflow, f"resume_from_checkpoint={path}"]
    named = "MLFLOW_TRACKING_URI=http://mlflow.example:5000"
    assert words(record(), item(), "mlflow", "uri") == [named, *mlflow, f"resume_from_checkpoint={_URI}"]


@pytest.mark.parametrize("program", ["trainer", "mlflow"])
@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("path", {"on_disk": False}),
        ("path", {"path": None}),
        ("path", {"state": "pruned"}),
        ("uri", {"uri": None}),
        ("uri", {"uri": 5}),
        ("uri", {"state": "pruned"}),
    ],
    ids=["not_on_disk", "no_path", "pruned_path", "no_uri", "odd_uri", "pruned_uri"],
)
def test_there_is_no_command_where_there_is_no_copy(program: Any, source: Any, change: dict[str, Any]) -> None:
    assert resume_command(record(), item(**change), program=program, source=source) is None


def test_there_is_no_command_where_nobody_knows_the_environment() -> None:
    for run in ({}, {"config": {"mine": 1}, "env_id": None}, {"config": {"env_id": None}}, {"config": [], "env_id": 5}):
        assert resume_command(run, item(), program="trainer", source="path") is None


def test_a_run_that_reached_its_target_gets_a_greater_one() -> None:
    def target(done: Any, **config: Any) -> str | None:
        given = words(record(config=config), item(num_timesteps=done))
        return given[given.index("--total-timesteps") + 1] if "--total-timesteps" in given else None

    assert [target(999), target(1000), target(1024)] == [None, "2000", "2000"]
    # One rollout went far beyond the target: twice of it would be behind already.
    assert target(2048) == "3048"
    assert [target(None), target("many"), target(True)] == [None, None, None]
    assert "total_timesteps=2000" in words(record(), item(num_timesteps=1000), "mlflow")


def test_what_a_launch_does_not_inherit_is_repeated() -> None:
    hyperparameters = {"n_steps": 16, "tensorboard_log": "logs", "policy_kwargs": {"activation_fn": "mine:Relu"}}
    config = {
        "checkpoint_dir": "my runs", "experiment_name": "it's", "mongo_uri": "mongodb://db/", "mongo_db": "other",
        "env_id": "toys:Toy-v0", "hyperparameters": hyperparameters, "tracking_uri": "sqlite:///x.db",
    }  # fmt: skip
    run = record(config=config, mlflow={"tracking_uri": "sqlite:////abs/x.db", "experiment_name": "it's"})
    given = words(run, item())[5:]
    options = list(zip(given[::2], given[1::2], strict=True))
    assert options == [
        ("--checkpoint-dir", "my runs"), ("--experiment-name", "it's"), ("--mongo-db", "other"),
        ("--hyperparameters", 'policy_kwargs={"activation_fn": "mine:Relu"}'), ("--env-id", "toys:Toy-v0"),
        ("--hyperparameters", "tensorboard_log=logs"), ("--tracking-uri", "sqlite:////abs/x.db"),
        ("--mongo-uri", "mongodb://db/"),
    ]  # fmt: skip
    given = words(run, item(), "mlflow")
    assert given[:8] == [
        "MLFLOW_TRACKING_URI=sqlite:////abs/x.db", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name",
        "it's",
    ]  # fmt: skip
    parameters = dict(word.split("=", 1) for word in given[9::2])
    assert json.loads(parameters.pop("hyperparameters")) == {k: v for k, v in hyperparameters.items() if k != "n_steps"}
    assert parameters == {
        "resume_from_checkpoint": item()["path"], "checkpoint_dir": "my runs", "mongo_db": "other",
        "mongo_uri": "mongodb://db/", "env_id": "toys:Toy-v0",
    }  # fmt: skip


@pytest.mark.parametrize("program", ["trainer", "mlflow"])
def test_no_credential_is_in_a_command_and_what_is_missing_is_said(program: Any) -> None:
    config = {
        "mongo_uri": "mongodb://user:hunter2@db/", "tracking_uri": "https://user:hunter2@mlflow/",
        "env_kwargs": {"api_key": "hunter2", "data": "/x"},
    }  # fmt: skip
    run = record(config=config, mlflow={"tracking_uri": "https://***@mlflow/"})
    for source in ("path", "uri"):
        given = " ".join(words(run, item(), program, source))
        assert "hunter2" not in given and "***" not in given and "mongo" not in given and "@" not in given
    first = "SB3_MLFLOW_CKPT_TRACKING_URI" if program == "trainer" else "MLFLOW_TRACKING_URI"
    assert given_again(run, program=program) == [
        f"tracking_uri holds a password: give it again, as {first}",
        "mongo_uri holds a password: give it again, as SB3_MLFLOW_CKPT_MONGO_URI",
        "env_kwargs.api_key looks like a credential and is not recorded: give it again",
    ]


def test_the_record_of_a_script_of_ones_own_is_enough() -> None:
    run = {"env_id": "CartPole-v1", "config": {"env_id": "CartPole-v1", "algo": "ppo"}, "mirrors": [], "mlflow": None}
    path = item()["path"].replace("checkpoints", "elsewhere")
    given = words(run, item(path=path, uri=None))
    assert given[4:] == [path, "--checkpoint-dir", "/data/elsewhere", "--mlflow", "false"]


@pytest.mark.parametrize("value", [None, 5, "text", [], [1], {"a": 1}, True, float("inf"), "inherit", "\ud800"])
def test_a_record_that_was_edited_is_never_an_error(value: Any) -> None:
    run = record()
    for key in ("config", "mlflow", "mirrors", "mongo", "env_id"):
        for program in ("trainer", "mlflow"):
            resume_command({**run, key: value}, item(), program=program, source="path")
        given_again({**run, key: value})
    for key in run["config"]:
        edited = {**run, "config": {**run["config"], key: value}}
        for program in ("trainer", "mlflow"):
            resume_command(edited, item(), program=program, source="uri")
        given_again(edited)
    for key in item():
        for source in ("path", "uri"):
            resume_command(run, item(**{key: value}), program="trainer", source=source)


def test_a_shell_reads_every_word_back_as_it_was_and_none_can_steer_a_terminal(tmp_path: Path) -> None:
    hostile = ["a b", "it's", 'say "x" $HOME `id` \\', "line\nbreak\t1", "\x1b[2J\x9b7", "\u202eabc\xa0", "é ü", "\udcff8"]
    line = " ".join(shell_word(word) for word in hostile)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == hostile
