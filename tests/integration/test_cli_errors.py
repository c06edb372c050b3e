"""The command line: what it prints, one line for every error, exit codes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch as th
import yaml
from click.testing import CliRunner, Result
from journals import save, start_run
from ports import free_port
from processes import environment, python
from stable_baselines3 import PPO

from sb3_mlflow_ckpt import checkpoints, trainer
from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.cli.commands import builtin_name
from sb3_mlflow_ckpt.config import TrainingConfig
from sb3_mlflow_ckpt.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    ConfigError,
    InvalidIdError,
    MirrorUnavailableError,
    RunNotFoundError,
    TrainingInterrupted,
)

ROOT = Path(__file__).parents[2]


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def fails(*words: str, code: int = 2) -> str:
    """Return the one line on stderr of a command that fails."""
    result = run(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr.rstrip("\n")


def program(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", *words, cwd=cwd)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # It sets up the logging of the whole process.
    monkeypatch.setattr("sb3_mlflow_ckpt.cli.progress.configure_logging", lambda console: None)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that the trainer was given; nothing is trained."""
    given: list[Any] = []
    monkeypatch.setattr(trainer, "train", lambda config, *, reporter: given.append(config) or result())
    return given


def result() -> Any:
    resolved = SimpleNamespace(config=SimpleNamespace(total_timesteps=1))
    return SimpleNamespace(resolved=resolved, run_folder=None, num_timesteps=1)


def raise_in_training(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(config: Any, *, reporter: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", train)


@pytest.fixture
def saved() -> list[Path]:
    """Three checkpoints of two runs."""
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    where = [("run_a", 100), ("run_a", 50), ("run_b", 1)]
    return [checkpoints.save_checkpoint(model, agent_id="ppo_agent", run_id=r, episode=e) for r, e in where]


# Training


def test_flags_reach_the_trainer(trained: list[Any]) -> None:
    words = ["--total_timesteps", "1e3", "--hyperparameters", "n_steps=64", "--normalize", "--seed", "inherit"]
    done = run("train", *words)
    assert done.exit_code == 0, done.output
    assert trained[0].model_fields_set == {"total_timesteps", "hyperparameters", "normalize"}
    assert (trained[0].total_timesteps, trained[0].hyperparameters) == (1000, {"n_steps": 64})


def test_the_file_and_the_environment_reach_the_trainer(
    trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.yaml").write_text("n_envs: 2\nseed: 2\n")
    monkeypatch.setenv("SB3_MLFLOW_CKPT_SEED", "3")
    monkeypatch.setenv("SB3_MLFLOW_CKPT_ALGO", "a2c")
    assert run("train", "--config", "train.yaml", "--n-envs", "1").exit_code == 0
    assert (trained[0].n_envs, trained[0].seed, trained[0].algo) == (1, 2, "a2c")


def test_no_file_is_read_for_a_config_that_is_not_given(trained: list[Any]) -> None:
    assert run("train", "--config", "inherit").exit_code == 0
    assert trained[0].model_fields_set == set()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--total-timestep", "5"], "Error: No such option --total-timestep. Did you mean --total-timesteps?"),
        (["--total_timestep", "5"], "Error: No such option --total-timestep. Did you mean --total-timesteps?"),
        (["--no-mlflow"], "Error: No such option --no-mlflow. Type --mlflow false"),
        (["--qqqqqq"], "Error: No such option --qqqqqq. List them with: main train --help"),
        (["--n-envs"], "Error: Option '--n-envs' requires an argument."),
        (["extra"], "Error: Got unexpected extra argument (extra)"),
        (["mongodb://me:secret@db"], "Error: Got unexpected extra argument (mongodb://***@db)"),
        (
            ["--n-envs", "0"],
            "Error: n_envs: '0' is not valid: input should be greater than or equal to 1 (from --n-envs)",
        ),
        (["--mode", "ful"], "Error: mode: 'ful' is not one of full, smoke (from --mode). Did you mean 'full'?"),
        (
            ["--agent-id", "../x"],
            "Error: agent_id: '../x' holds a character that separates or is reserved in paths. "
            "Use letters, digits, '-', '_' or '.', for example 'ppo_agent' (from --agent-id)",
        ),
        (
            ["--config", "nope.yaml"],
            "Error: config: nope.yaml cannot be read: No such file or directory (from --config)",
        ),
    ],
    ids=str,
)
def test_what_is_typed_wrong_is_one_line(words: list[str], line: str) -> None:
    assert fails("train", *words) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "total_timestep: 5\n",
            "Error: total_timestep: is not a setting (from train.yaml). Did you mean 'total_timesteps'?",
        ),
        ("n_envs: 1\nn_envs: 2\n", "Error: n_envs: is given twice, on lines 1 and 2 (from train.yaml)"),
        (
            "n_envs: [1\n",
            "Error: config: is not valid YAML at line 2, column 1: expected ',' or ']', but got '<stream end>' "
            "(from train.yaml)",
        ),
        (
            "- 1\n",
            "Error: config: holds a list, not settings (from train.yaml). Write one setting a line: n_envs: 4",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_in_the_file_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(text)
    assert fails("train", "--config", "train.yaml") == line


def test_what_is_wrong_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_MLFLOW_CKPT_MODE", "fast")
    assert "(from SB3_MLFLOW_CKPT_MODE)" in fails("train")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (CheckpointNotFoundError("x.zip", "Look"), "FileNotFoundError: Checkpoint not found: x.zip. Look", 1),
        (
            CheckpointCorruptError("x.zip", "it is truncated"),
            "RuntimeError: Failed to load model from checkpoint x.zip: it is truncated",
            1,
        ),
        (
            CheckpointSaveError("x.zip", OSError(28, "No space left on device"), "Clean up"),
            "OSError: Checkpoint saving failed for x.zip: [Errno 28] No space left on device. Clean up",
            1,
        ),
        (CheckpointError("line one\n  line two"), "CheckpointError: line one line two", 1),
        (InvalidIdError("run_id '..' is bad"), "ValueError: run_id '..' is bad", 2),
        (RunNotFoundError("abc", "here"), None, 1),
        (ConfigError("policy", "is unknown"), "Error: policy: is unknown", 2),
        (MirrorUnavailableError("MLflow", "http://x", OSError("refused")), None, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_training_is_one_line(
    error: BaseException, line: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raise_in_training(monkeypatch, error)
    printed = fails("train", code=code)
    assert line is None or printed == line


def test_an_outage_is_told_without_the_names_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_training(monkeypatch, MirrorUnavailableError("MLflow", "http://x", OSError("refused")))
    assert fails("train", code=1).startswith("Error: MLflow at http://x does not answer: refused.")


def test_the_builtin_that_an_error_is_gives_its_name() -> None:
    assert builtin_name(RunNotFoundError("a", "b")) == "LookupError"
    assert builtin_name(KeyError()) == "KeyError"


def test_an_interruption_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_training(monkeypatch, TrainingInterrupted(15))
    done = run("train")
    assert done.exit_code == 143
    assert "Interrupted" in done.output


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_training(monkeypatch, ZeroDivisionError("in the environment"))
    done = run("train")
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_a_dry_run_prints_a_file_that_can_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("trained"))
    words = ["train", "--dry-run", "--n-envs", "2", "--mongo-uri", "mongodb://me:secret@db"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.stdout)
    assert (printed["n_envs"], printed["algo"], printed["agent_id"]) == (2, "ppo", "ppo_agent")
    assert "secret" not in done.stdout
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert run("train", "--dry-run", "--config", "again.yaml").stdout == done.stdout


def test_a_dry_run_of_a_resume_prints_what_differs() -> None:
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    config = TrainingConfig(learning_rate=3e-4, seed=1).to_json()
    path = checkpoints.save_checkpoint(model, agent_id="ppo_agent", run_id="r", episode=7, config=config)
    done = run("train", "--dry-run", "--resume-from-checkpoint", str(path), "--learning-rate", "1e-4")
    assert done.exit_code == 0, done.output
    assert "# resumes " in done.stdout
    differs = [line for line in done.stdout.splitlines() if "differs" in line]
    assert differs == ["# differs from the checkpoint: learning_rate: 0.0003 -> 0.0001"]
    assert yaml.safe_load(done.stdout)["learning_rate"] == 1e-4


def test_a_checkpoint_that_is_missing_is_told_in_the_documented_words() -> None:
    line = fails("train", "--resume-from-checkpoint", "nope.zip", code=1)
    assert line.startswith("FileNotFoundError: Checkpoint not found: nope.zip")


# Checkpoints


def test_list_prints_one_path_a_line_by_episode(saved: list[Path]) -> None:
    assert run("checkpoints", "list").stdout.split("\n") == [
        "checkpoints/ppo_agent/run_a/ep000050.zip",
        "checkpoints/ppo_agent/run_a/ep000100.zip",
        "checkpoints/ppo_agent/run_b/ep000001.zip",
        "",
    ]
    assert run("checkpoints", "list", "--run-id", "run_b").stdout == f"{saved[2]}\n"
    assert run("checkpoints", "list", "--agent-id", "other").stdout == ""


def test_list_as_json_says_what_is_known(saved: list[Path]) -> None:
    saved[2].with_name("ep000001_metadata.json").write_text("{")
    items = json.loads(run("checkpoints", "list", "--json").stdout)
    assert [item.get("episode") for item in items] == [50, 100, None]
    assert items[0]["run_id"] == "run_a"
    assert "not JSON" in items[2]["error"]


def test_list_of_nothing_says_so_beside_the_output() -> None:
    done = run("checkpoints", "list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "No checkpoints in checkpoints, there is no such folder\n"
    assert json.loads(run("checkpoints", "list", "--json").stdout) == []


def test_the_folder_may_come_from_the_environment(saved: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_MLFLOW_CKPT_CHECKPOINT_DIR", "elsewhere")
    assert "elsewhere" in run("checkpoints", "list").stderr


def test_verify_says_ok_of_each(saved: list[Path]) -> None:
    done = run("checkpoints", "verify")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [f"{path}: ok" for path in sorted(saved)]


def test_verify_names_what_is_wrong_and_fails(saved: list[Path], tmp_path: Path) -> None:
    content = saved[0].read_bytes()
    saved[0].write_bytes(content[:-10])
    (tmp_path / "foreign.zip").write_bytes(b"not a zip")
    done = run("checkpoints", "verify", str(saved[0]), str(saved[2]), "nope.zip", "foreign.zip")
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert lines[0].startswith(f"{saved[0]}: corrupt: it has {len(content) - 10} bytes")
    assert lines[1] == f"{saved[2]}: ok"
    assert lines[2].startswith("nope.zip: missing: Checkpoint not found: nope.zip")
    assert lines[3].startswith("foreign.zip: ")
    assert not lines[3].endswith(": ok")


def test_verify_takes_a_run_folder_and_prints_json(saved: list[Path]) -> None:
    items = json.loads(run("checkpoints", "verify", str(saved[0].parent), "--json").stdout)
    assert [(item["path"], item["status"]) for item in items] == [(str(saved[1]), "ok"), (str(saved[0]), "ok")]


def test_prune_keeps_the_newest_of_each_run(saved: list[Path]) -> None:
    """The run went back from episode 100 to an older checkpoint: the lower number is the newer."""
    dry = run("checkpoints", "prune", "--keep-last-n", "1", "--dry-run")
    assert dry.stdout == f"{saved[0]}\n" + "".join(f"# {path} stays: newest, last\n" for path in saved[1:])
    assert saved[0].exists()
    pruned = run("checkpoints", "prune", "--keep-last-n", "1", "--json")
    assert json.loads(pruned.stdout)["removed"] == [str(saved[0])]
    assert [path.exists() for path in saved] == [False, True, True]


def test_prune_wants_to_be_told_how_many_to_keep() -> None:
    assert fails("checkpoints", "prune") == "Error: Missing option '--keep-last-n'."


@pytest.mark.parametrize("words", [["verify"], ["prune", "--keep-last-n", "1"], ["sync"]], ids=lambda words: words[0])
def test_a_folder_that_is_missing_is_an_error(words: list[str]) -> None:
    line = fails("checkpoints", *words, "--checkpoint-dir", "nope", code=1)
    assert line.startswith("FileNotFoundError: Checkpoint not found: nope. There is no such folder")


@pytest.mark.parametrize("words", [["list"], ["verify"], ["prune", "--keep-last-n", "1"]], ids=lambda words: words[0])
@pytest.mark.parametrize("option", ["--agent-id", "--run-id"])
def test_an_id_that_leaves_the_folder_is_refused(saved: list[Path], words: list[str], option: str) -> None:
    assert "'../x'" in fails("checkpoints", *words, option, "../x")


def test_sync_prints_each_run_and_fails_if_one_does(tmp_path: Path) -> None:
    checkpoints, uri = tmp_path / "checkpoints", f"sqlite:///{tmp_path}/mlflow.db"
    sent, busy = start_run(checkpoints, "a", mirrors=["MLflow"], mlflow={"tracking_uri": uri}), start_run(checkpoints, "b")
    save(sent, 1)
    sent.close()
    done = run("checkpoints", "sync")
    busy.close()
    lines = done.stdout.splitlines()
    assert "checkpoints/ppo_agent/a: MLflow: checkpoints/ep000001.zip is sent" in lines
    assert lines[-2:] == [
        "checkpoints/ppo_agent/a: MLflow: ok",
        "checkpoints/ppo_agent/b: it is training now; its own process sends it",
    ]
    assert done.exit_code == 1
    assert run("checkpoints", "sync", "--run-id", "a").exit_code == 0


# Runs


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """The id of a run that failed."""
    from sb3_mlflow_ckpt.journal import RunJournal
    from sb3_mlflow_ckpt.layout import RunFolder
    from sb3_mlflow_ckpt.runs.document import new_record

    run_id = "0123456789abcdef0123456789abcdef"
    journal = RunJournal(RunFolder(tmp_path / "checkpoints", "ppo_agent", run_id))
    record = new_record(
        run_id=run_id,
        agent_id="ppo_agent",
        name="[bold]",
        algo="ppo",
        env_id="CartPole-v1",
        config={},
        total_timesteps=1000,
        parent=None,
        root_run_id=None,
        heartbeat_seconds=10,
        environment={},
    )
    journal.start(record)
    journal.update(status="failed", error={"type": "ValueError", "message": "[oh] no", "traceback": ""})
    journal.close()
    return run_id


def test_runs_are_listed_as_a_table_whose_ids_are_whole(recorded: str) -> None:
    done = run("runs", "list")
    assert done.exit_code == 0, done.output
    assert recorded in done.stdout
    assert "failed" in done.stdout


def test_runs_are_listed_as_json(recorded: str) -> None:
    assert [item["run_id"] for item in json.loads(run("runs", "list", "--json").stdout)] == [recorded]
    assert json.loads(run("runs", "list", "--json", "--status", "running").stdout) == []


def test_no_runs_are_said_to_be_none_and_where(recorded: str, tmp_path: Path) -> None:
    missing = run("runs", "list", "--checkpoint-dir", "elsewhere")
    assert missing.stdout == f"No runs in {tmp_path}/elsewhere, there is no such folder; name another with --checkpoint-dir\n"
    (tmp_path / "empty").mkdir()
    empty = run("runs", "list", "--checkpoint-dir", "empty")
    assert empty.stdout == f"No runs in {tmp_path}/empty; name another folder with --checkpoint-dir\n"
    # What is asked for is not there, and the folder is the right one.
    assert run("runs", "list", "--status", "completed").stdout == "No such runs, of 1\n"
    assert (missing.exit_code, empty.exit_code) == (0, 0)


def test_a_run_is_shown_with_its_error(recorded: str) -> None:
    done = run("runs", "show", recorded)
    assert done.exit_code == 0, done.output
    assert "ValueError: [oh] no" in done.stdout
    assert "[bold]" in done.stdout
    assert json.loads(run("runs", "show", recorded, "--json").stdout)["run_id"] == recorded


def test_a_run_is_shown_with_its_checkpoints(saved: list[Path], recorded: str, tmp_path: Path) -> None:
    model = PPO.load(saved[0], device="cpu")
    path = checkpoints.save_checkpoint(model, agent_id="ppo_agent", run_id=recorded, episode=50)
    assert path.name in run("runs", "show", recorded).stdout


def test_a_run_that_is_missing_is_one_line() -> None:
    assert fails("runs", "show", "abc", code=1).startswith("LookupError: Run not found: 'abc'")


def test_a_status_that_there_is_not_is_one_line() -> None:
    assert "'done' is not one of" in fails("runs", "list", "--status", "done")


# The whole program


def test_a_group_without_a_command_prints_its_help() -> None:
    done = run("checkpoints")
    assert "Commands:" in done.output


def test_the_program_says_its_version(tmp_path: Path) -> None:
    done = program("sb3_mlflow_ckpt", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"sb3-mlflow-ckpt {version('sb3-mlflow-ckpt')}\n")


def _commands(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        yield from _commands(inner, *words, name)


@pytest.mark.parametrize("words", [*_commands(main)], ids=" ".join)
def test_every_command_takes_h_for_help(words: tuple[str, ...]) -> None:
    short, long = run(*words, "-h"), run(*words, "--help")
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert short.stdout.startswith("Usage: ")


def test_a_command_that_there_is_not_names_the_nearest() -> None:
    assert fails("checkpoints", "lits").startswith("Error: No such command 'lits'.")


@pytest.mark.parametrize("module", ["sb3_mlflow_ckpt.trainer", "sb3_mlflow_ckpt"])
def test_the_program_prints_one_line_and_its_code(module: str, tmp_path: Path) -> None:
    words = [module] if module.endswith("trainer") else [module, "train"]
    done = program(*words, "--n_envs", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: n_envs: '0' is not valid: input should be greater than or equal to 1 (from --n-envs)\n"
    )


def test_the_program_tells_of_a_missing_checkpoint_without_a_traceback(tmp_path: Path) -> None:
    done = program("sb3_mlflow_ckpt.trainer", "--resume-from-checkpoint", "nope.zip", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("FileNotFoundError: Checkpoint not found: nope.zip")
    assert done.stderr.count("\n") == 1


def test_the_program_lists_what_a_pipe_can_read(saved: list[Path], tmp_path: Path) -> None:
    done = program("sb3_mlflow_ckpt", "checkpoints", "list", cwd=tmp_path)
    assert done.stdout.splitlines() == [str(path) for path in sorted(saved)]


def test_a_device_that_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    if th.cuda.is_available():
        pytest.skip("There is a GPU")
    line = fails("train", "--device", "cuda:1", "--mlflow", "false")
    assert line.startswith("Error: device: 'cuda:1' is not there: torch ")
    assert line.endswith("finds no GPU. `auto` takes one where there is one, `cpu` trains without")
    assert not list(tmp_path.iterdir())


def test_an_environment_variable_that_is_misspelt_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_MLFLOW_CKPT_OF_SOMEBODY_ELSE", "1")
    monkeypatch.setenv("SB3_MLFLOW_CKPT_TOTAL_TIMESTEP", "500")
    assert fails("train", "--dry-run") == (
        "Error: SB3_MLFLOW_CKPT_TOTAL_TIMESTEP: it is no setting. Did you mean SB3_MLFLOW_CKPT_TOTAL_TIMESTEPS?"
    )


def test_an_environment_of_ones_own_is_found_in_the_folder_that_the_command_is_given_in(tmp_path: Path) -> None:
    (tmp_path / "own_env.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('Own-v0', CartPoleEnv, max_episode_steps=20)\n"
    )
    command = Path(sys.executable).with_name("sb3-mlflow-ckpt")
    small = ("--total-timesteps", "64", "--hyperparameters", "n_steps=64", "--mlflow", "false")
    for words in (("train", "--env-id", "own_env:Own-v0", "--vec-env", "subproc", *small), ("check-env", "own_env:Own-v0")):
        done = subprocess.run([command, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_auto_goes_on_with_the_training_that_the_command_names_and_with_no_other(tmp_path: Path) -> None:
    def train(*words: str) -> str:
        small = ("--total-timesteps", "128", "--hyperparameters", "n_steps=64", "--mlflow", "false")
        done = program("sb3_mlflow_ckpt", "train", *small, "--resume-from-checkpoint", "auto", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    # A loop over seeds trained the first one only.
    for seed in ("0", "1"):
        said = train("--seed", seed)
        assert "Trained 128 timesteps" in said and "Resuming" not in said
    assert "auto begins a new training: run " in said
    assert "has seed 0 and not 1. To go on from it, name its checkpoint" in said.replace("\n", " ")
    for seed in ("0", "1"):
        assert "Resuming" in (said := train("--seed", seed, "--total-timesteps", "192")), said
        assert "seed:" not in said and "begins a new" not in said
    assert "Resuming" not in train("--seed", "1", "--env-id", "Acrobot-v1")
    found = [verify_checkpoint(path) for path in list_checkpoints("checkpoints")]
    trainings = {m.run_id: (m.config["seed"], m.config["env_id"]) for m in found}
    assert sorted(trainings.values()) == [
        (0, "CartPole-v1"), (0, "CartPole-v1"), (1, "Acrobot-v1"), (1, "CartPole-v1"), (1, "CartPole-v1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("latst", "Did you mean latest?"),
        ("run:/abc", "A checkpoint in MLflow is written runs:/<run id>, or runs:/<run id>/checkpoints/ep000100.zip"),
    ],
)
def test_what_is_to_be_resumed_is_misspelt(reference: str, hint: str) -> None:
    line = fails("train", "--resume-from-checkpoint", reference, "--mlflow", "false", code=1)
    assert line == f"FileNotFoundError: Checkpoint not found: {reference}. {hint}"


def test_a_checkpoint_of_another_algorithm_is_a_wrong_setting(tmp_path: Path) -> None:
    path = checkpoints.save_checkpoint(
        PPO("MlpPolicy", "CartPole-v1", n_steps=8), tmp_path, agent_id="a", run_id="r", episode=1
    )
    line = fails("train", "--resume-from-checkpoint", str(path), "--algo", "a2c", "--mlflow", "false")
    assert "it was trained with 'ppo', this run asks for 'a2c'" in line


def test_a_server_that_is_not_there_is_told_by_what_was_the_matter(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    done = program("sb3_mlflow_ckpt", "train", "--total-timesteps", "64", "--tracking-uri", address, cwd=tmp_path)
    assert done.returncode == 1
    line = done.stderr
    assert line.startswith(f"Error: MLflow at {address} does not answer: Failed to establish a new connection: [Errno ")
    assert "refused. Start it or correct the address; with start_offline" in line
