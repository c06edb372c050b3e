"""Settings as texts: flags, files and environment variables become layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.cli import train_command
from sb3_mlflow_ckpt.cli.settings import environment_layer, file_layer, flag_layer, settings
from sb3_mlflow_ckpt.config import Layer, TrainingConfig, build_config
from sb3_mlflow_ckpt.errors import ConfigError


def flags_given(words: list[str]) -> dict[str, Any]:
    """Return the texts of a command line's options."""
    params = train_command.make_context("train", words).params
    return {k: v for k, v in params.items() if k not in ("config_file", "dry_run")}


def flags(*words: str) -> dict[str, Any]:
    """Return the layer that a command line gives."""
    return dict(flag_layer(flags_given(list(words))).values)


def file(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "train.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return dict(file_layer(path).values)


def problem(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as raised:
        file(tmp_path, text)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(str(tmp_path / "train.yaml"), "FILE")


def test_what_is_not_given_is_in_no_layer() -> None:
    assert flags() == {}


def test_inherit_means_not_given() -> None:
    words = [word for setting in settings() for word in (setting.flag, "inherit")]
    assert flags(*words) == {}


@pytest.mark.parametrize("flag", ["--total-timesteps", "--total_timesteps"])
def test_a_flag_may_be_spelled_with_underscores(flag: str) -> None:
    assert flags(flag, "1e6") == flags(f"{flag}=1e6") == {"total_timesteps": "1e6"}


def test_the_underscore_spelling_is_not_in_the_help() -> None:
    assert "--total_timesteps" not in train_command.get_help(click.Context(train_command))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--normalize"], True),
        (["--normalize", "--seed", "1"], True),
        (["--normalize", "true"], True),
        (["--normalize", "false"], False),
        (["--normalize=false"], False),
        (["--normalize", "{norm_reward: false}"], {"norm_reward": False}),
        (["--normalize", "norm_reward=false", "--normalize", "clip_obs=5"], {"norm_reward": False, "clip_obs": 5}),
    ],
)
def test_a_switch_takes_a_value_or_none(words: list[str], value: Any) -> None:
    assert build_config([flag_layer(flags_given(words))]).normalize == value


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["{n_steps: 256, gamma: 0.9}"], {"n_steps": 256, "gamma": 0.9}),
        (['{"n_steps": 256}'], {"n_steps": 256}),
        (["n_steps: 256"], {"n_steps": 256}),
        (["n_steps=256", "gamma=0.9"], {"n_steps": 256, "gamma": 0.9}),
        (["{n_steps: 1, gamma: 0.9}", "n_steps=2"], {"n_steps": 2, "gamma": 0.9}),
        (["net_arch=[64, 64]"], {"net_arch": [64, 64]}),
        (["policy_kwargs={activation_fn: Tanh}"], {"policy_kwargs": {"activation_fn": "Tanh"}}),
        (["ent_coef=3e-4"], {"ent_coef": 3e-4}),
        (["buffer_size=1e6"], {"buffer_size": 1_000_000}),
        (["a=b=c"], {"a": "b=c"}),
        (["clip_range=lin_0.2"], {"clip_range": "lin_0.2"}),
        (["inherit"], {}),
    ],
)
def test_a_mapping_is_yaml_or_pairs(texts: list[str], value: dict[str, Any]) -> None:
    words = [word for text in texts for word in ("--hyperparameters", text)]
    config = build_config([flag_layer(flags_given(words))])
    assert config.hyperparameters == value
    assert [type(v) for v in config.hyperparameters.values()] == [type(v) for v in value.values()]


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["a.b:Wrapper"], ["a.b:Wrapper"]),
        (["a.b:First", "a.b:Second"], ["a.b:First", "a.b:Second"]),
        (["[a.b:First, {a.b:Second: {n: 1}}]"], ["a.b:First", {"a.b:Second": {"n": 1}}]),
        (["{a.b:Wrapper: {n: 1}}"], [{"a.b:Wrapper": {"n": 1}}]),
    ],
)
def test_a_list_is_yaml_or_repeated(texts: list[str], value: list[Any]) -> None:
    words = [word for text in texts for word in ("--env-wrappers", text)]
    assert build_config([flag_layer(flags_given(words))]).env_wrappers == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "256",
            "hyperparameters: '256' is neither a mapping such as '{a: 1, b: 2}' nor a pair such as a=1 "
            "(from --hyperparameters)",
        ),
        (
            "{n_steps: [}",
            "hyperparameters: is not valid YAML at line 1, column 12: expected the node content, but found '}' "
            "(from --hyperparameters)",
        ),
        ("{a: 1, a: 2}", "a: is given twice, on line 1 (from --hyperparameters)"),
    ],
)
def test_a_bad_mapping_names_its_flag(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        flags("--hyperparameters", text)
    assert str(raised.value) == expected


def test_credentials_in_a_bad_mapping_are_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        flags("--env-kwargs", "[http://me:secret@host]")
    assert "secret" not in str(raised.value)


def test_each_flag_is_named_as_the_source_of_its_value() -> None:
    layer = flag_layer({"n_envs": "0", "seed": None})
    assert layer.label("n_envs") == "--n-envs"


def test_environment_variables_are_a_layer() -> None:
    layer = environment_layer(
        {
            "SB3_MLFLOW_CKPT_N_ENVS": "4",
            "SB3_MLFLOW_CKPT_HYPERPARAMETERS": "{n_steps: 8}",
            "SB3_MLFLOW_CKPT_NORMALIZE": "{norm_obs: false}",
            "SB3_MLFLOW_CKPT_SEED": "",
            "SB3_MLFLOW_CKPT_ALGO": "inherit",
            "SB3_MLFLOW_CKPT_TEST_MONGO_URI": "of something else",
            "N_ENVS": "9",
        }
    )
    assert layer.values == {"n_envs": "4", "hyperparameters": {"n_steps": 8}, "normalize": {"norm_obs": False}}
    assert layer.label("n_envs") == "SB3_MLFLOW_CKPT_N_ENVS"


def test_flags_win_over_the_file_and_the_file_over_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("n_envs: 2\nseed: 2\nhyperparameters: {gamma: 0.2, n_steps: 2}\n")
    environment = {f"SB3_MLFLOW_CKPT_{key}": "3" for key in ("N_ENVS", "SEED", "FRAME_STACK")}
    flag = flag_layer({"n_envs": "1", "hyperparameters": ("n_steps=1",)})
    config = build_config([flag, file_layer(path), environment_layer(environment)])
    assert (config.n_envs, config.seed, config.frame_stack) == (1, 2, 3)
    assert config.hyperparameters == {"n_steps": 1, "gamma": 0.2}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# nothing yet\n", {}),
        ("n_envs: 4\n", {"n_envs": 4}),
        ("learning_rate: 3e-4\n", {"learning_rate": 3e-4}),
        ("total_timesteps: 1e6\n", {"total_timesteps": 1_000_000}),
        ("learning_rate: -1.5e+3\n", {"learning_rate": -1500.0}),
        ("run_name: 2024-01-01\n", {"run_name": "2024-01-01"}),
        ("run_name: größe\n", {"run_name": "größe"}),
        ("run_name: 1e6x\n", {"run_name": "1e6x"}),
        ("env_kwargs: &a {x: 1}\nnormalize: *a\n", {"env_kwargs": {"x": 1}, "normalize": {"x": 1}}),
        (
            "env_kwargs: &a {x: 1, y: 2}\nnormalize: {<<: *a, x: 3}\n",
            {"env_kwargs": {"x": 1, "y": 2}, "normalize": {"x": 3, "y": 2}},
        ),
    ],
)
def test_a_file_is_read_as_people_mean_it(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    read = file(tmp_path, text)
    assert read == values
    assert [type(value) for value in read.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_envs: 4\n  seed: 1\n", "config: is not valid YAML at line 2, column 7: mapping values are not allowed"),
        ("n_envs: [1, 2\n", "config: is not valid YAML at line 2, column 1: expected ',' or ']', but got"),
        ("\tn_envs: 4\n", "config: is not valid YAML at line 1, column 1: found character '\\t' that cannot start"),
        ("n_envs: 1\nseed: 2\nn_envs: 3\n", "n_envs: is given twice, on lines 1 and 3"),
        ("hyperparameters:\n  gamma: 1\n  gamma: 2\n", "gamma: is given twice, on lines 2 and 3"),
        ("- n_envs\n", "config: holds a list, not settings"),
        ("n_envs\n", "config: holds only 'n_envs', not settings"),
        ("a: 1\n---\na: 2\n", "config: is not valid YAML at line 2, column 1: but found another document"),
        (b"\xff\xfe\x00", "config: is not valid YAML"),
        (b"\x89PNG\r\n", "config: is not valid YAML"),
        ("a: !!python/object:os.system {}\n", "config: is not valid YAML at line 1, column 4: could not determine"),
        ("n_envs: !!int x\n", "config: is not valid YAML"),
        ("env_kwargs: &a {x: *a}\n", "config: is nested too deeply, or holds itself"),
        ("env_kwargs: " + "[" * 5000, "config: is nested too deeply, or holds itself"),
        ("? [a, b]\n: 1\n", "config: is not valid YAML at line 1, column 3: found unhashable key"),
        ("a: *nobody\n", "config: is not valid YAML at line 1, column 4: found undefined alias 'nobody'"),
    ],
)
def test_a_bad_file_is_one_line_with_the_place(tmp_path: Path, text: str | bytes, expected: str) -> None:
    found = problem(tmp_path, text)
    assert found.startswith(expected)
    assert "(from FILE)" in found


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope.yaml cannot be read: No such file or directory \(from --config\)"):
        file_layer(tmp_path / "nope.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        file_layer(tmp_path)


def test_a_name_that_no_file_can_have_is_an_error_of_its_own() -> None:
    with pytest.raises(ConfigError):
        file_layer("a\0b")


def outcome(layer: Callable[[], Layer]) -> str:
    """Return the message of the error that a layer ends in; empty where it makes a configuration."""
    try:
        build_config([layer()])
    except ConfigError as error:
        return str(error)
    return ""


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_layer_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "train.yaml"
    path.write_bytes(content)
    assert "\n" not in outcome(lambda: file_layer(path))


@given(st.sampled_from(list(TrainingConfig.model_fields)), st.text(max_size=40))
def test_any_text_of_a_flag_is_a_configuration_or_one_line(name: str, text: str) -> None:
    assert "\n" not in outcome(lambda: flag_layer({name: [text]}))


def test_types_are_shown_in_a_few_characters() -> None:
    shown = {setting.name: setting.metavar for setting in settings()}
    assert shown["total_timesteps"] == shown["seed"] == "INTEGER"
    assert shown["heartbeat_seconds"] == "NUMBER"
    assert shown["learning_rate"] == "NUMBER|lin_NUMBER"
    assert shown["mode"] == "full|smoke"
    assert shown["normalize"] == "true|false|MAPPING"
    assert shown["env_wrappers"] == "LIST"
    assert shown["policy"] == "TEXT"
