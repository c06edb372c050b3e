"""The settings are written in five places: fields, flags, MLproject, the shared options, docs/training.md."""

import runpy
import sys
from pathlib import Path

import click
import pytest
import yaml

from sb3_mlflow_ckpt.cli import main, options, train_command
from sb3_mlflow_ckpt.cli.settings import settings
from sb3_mlflow_ckpt.config import INHERIT, TrainingConfig

ROOT = Path(__file__).parents[2]
# `mlflow run` itself decides these.
NOT_IN_MLPROJECT = {"run_id", "mlflow", "tracking_uri", "experiment_name"}


def entry_point() -> dict:
    return yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]["main"]


def flags() -> dict[str, click.Option]:
    parameters = train_command.get_params(click.Context(train_command))
    return {str(p.name): p for p in parameters if isinstance(p, click.Option) and "--help" not in p.opts}


def test_every_field_is_a_flag_and_every_flag_a_field() -> None:
    assert set(flags()) - {"config_file", "dry_run"} == set(TrainingConfig.model_fields)


@pytest.mark.parametrize("name", TrainingConfig.model_fields)
def test_a_flag_is_spelled_like_its_field(name: str) -> None:
    assert flags()[name].opts == [f"--{name.replace('_', '-')}"]


def test_no_flag_has_a_default_that_would_hide_the_file_or_the_checkpoint() -> None:
    context = train_command.make_context("train", [])
    assert {name: value for name, value in context.params.items() if value not in (None, (), False)} == {}


def test_every_field_is_described() -> None:
    assert [setting.name for setting in settings() if not setting.description] == []


def test_the_program_and_the_subcommand_are_one_command() -> None:
    assert main.commands["train"] is train_command


def test_mlproject_declares_every_useful_field() -> None:
    assert set(entry_point()["parameters"]) == set(TrainingConfig.model_fields) - NOT_IN_MLPROJECT | {"config"}


def test_every_mlproject_parameter_is_a_string_that_defaults_to_not_given() -> None:
    assert {str(parameter) for parameter in entry_point()["parameters"].values()} == {
        str({"type": "string", "default": INHERIT})
    }


def test_the_mlproject_command_passes_each_parameter_to_its_flag() -> None:
    words = entry_point()["command"].split()
    assert words[:3] == ["python", "-m", "sb3_mlflow_ckpt.trainer"]
    expected = {name: f"--{name.replace('_', '-')}" for name in entry_point()["parameters"]}
    passed = {value.strip("{}"): flag for flag, value in zip(words[3::2], words[4::2], strict=True)}
    assert passed == expected


@pytest.mark.parametrize("setting", [s for s in settings() if s.name not in NOT_IN_MLPROJECT], ids=lambda s: s.name)
def test_mlproject_notes_the_type_and_the_real_default(setting) -> None:
    line = next(x for x in (ROOT / "MLproject").read_text().splitlines() if x.strip().startswith(f"{setting.name}: {{"))
    noted = line.partition("  # ")[2]
    assert noted == f"{setting.metavar}, {'unset' if setting.default is None else setting.default}"


@pytest.mark.parametrize("value", ['{n_steps: 128, y: "it\'s"}', "a b", "$HOME", "runs:/abc/x.zip", "'"])
def test_mlflow_hands_values_over_as_they_are(value: str) -> None:
    import shlex

    from mlflow.projects import _project_spec

    entry = _project_spec.load_project(str(ROOT)).get_entry_point("main")
    words = shlex.split(entry.compute_command({"hyperparameters": value, "made_up": value}, storage_dir=None))
    assert words[words.index("--hyperparameters") + 1] == value
    assert words[words.index("--made_up") + 1] == value


@pytest.mark.parametrize("name", ["checkpoint_dir", "mongo_uri", "mongo_db", "tracking_uri"])
def test_a_shared_option_has_the_fields_default_and_variable(name: str) -> None:
    command = click.command("any")(getattr(options, f"{name}_option")(lambda **_: None))
    setting = next(s for s in settings() if s.name == name)
    assert command.params[0].envvar == setting.variable
    assert command.make_context("any", []).params == {name: TrainingConfig.model_fields[name].default}


def test_the_training_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "docs" / "write_training_reference.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


def test_a_stale_training_reference_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "write_training_reference.py"
    script.write_text((ROOT / "docs" / "write_training_reference.py").read_text())
    (tmp_path / "training.md").write_text("# Something else\n")
    assert runpy.run_path(str(script))["main"](["--check"]) == 1


def test_the_reference_and_mlproject_leave_out_the_same() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "write_training_reference.py"))
    assert set(reference["LEFT_OUT_OF_MLPROJECT"]) == NOT_IN_MLPROJECT


def test_the_example_file_of_the_reference_is_valid() -> None:
    from sb3_mlflow_ckpt.config import Layer, build_config

    text = (ROOT / "docs" / "training.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    config = build_config([Layer("train.yaml", yaml.safe_load(example))])
    assert config.hyperparameters["policy_kwargs"] == {"net_arch": [64, 64]}
