"""The training configuration: precedence, inheritance, numbers, and one clear line for everything that is wrong."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.config import (
    INHERIT,
    Layer,
    TrainingConfig,
    build_config,
    differences,
    flatten,
    inheritable_fields,
    nearest,
    schedule_start,
)
from sb3_mlflow_ckpt.errors import ConfigError


def build(**values: Any) -> TrainingConfig:
    return build_config([Layer("train.yaml", values)])


def built(layers: Sequence[Layer]) -> TrainingConfig | str:
    """Return what layers make: a configuration or an error's message."""
    try:
        return build_config(layers)
    except ConfigError as error:
        return str(error)


def message(**values: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        build(**values)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_without_layers_every_setting_has_its_default() -> None:
    config = build_config([])
    assert config == TrainingConfig()
    assert config.model_fields_set == set()
    assert (config.checkpoint_interval_episodes, config.keep_last_n_checkpoints) == (50, 3)


def test_the_first_layer_that_names_a_setting_wins() -> None:
    file = Layer("file", {"n_envs": 2, "seed": 3})
    config = build_config([Layer("flags", {"n_envs": 1}), file, Layer("environment", {"seed": 4, "algo": "a2c"})])
    assert (config.n_envs, config.seed, config.algo) == (1, 3, "a2c")
    assert config.model_fields_set == {"n_envs", "seed", "algo"}


def test_mappings_merge_key_by_key() -> None:
    lower = Layer("b", {"hyperparameters": {"n_steps": 9, "gamma": 1}})
    config = build_config([Layer("a", {"hyperparameters": {"n_steps": 8}}), lower])
    assert config.hyperparameters == {"n_steps": 8, "gamma": 1}


def test_a_switch_over_a_mapping_replaces_it() -> None:
    layers = [Layer("a", {"normalize": False}), Layer("b", {"normalize": {"norm_reward": False}})]
    assert build_config(layers).normalize is False


def test_an_error_names_the_layer_that_won() -> None:
    layers = [Layer("flags", {"n_envs": "0"}, {"n_envs": "--n-envs"}), Layer("train.yaml", {"n_envs": 4})]
    with pytest.raises(ConfigError, match=r"\(from --n-envs\)$"):
        build_config(layers)


def test_layers_are_not_changed() -> None:
    own, parent = {"hyperparameters": {"a": 1}}, {"hyperparameters": {"b": 2}}
    build_config([Layer("x", own), Layer("y", parent)])
    assert (own, parent) == ({"hyperparameters": {"a": 1}}, {"hyperparameters": {"b": 2}})


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("total_timesteps", "1e6", 1_000_000),
        ("total_timesteps", 1e6, 1_000_000),
        ("total_timesteps", "5000", 5000),
        ("learning_rate", "3e-4", 3e-4),
        ("learning_rate", "0.0001", 1e-4),
        ("learning_rate", 1, 1.0),
        ("learning_rate", "lin_3e-4", "lin_3e-4"),
        ("heartbeat_seconds", "2.5", 2.5),
        ("seed", "0", 0),
        ("mlflow", "false", False),
        ("normalize", "true", True),
    ],
)
def test_numbers_and_switches_may_be_texts(key: str, given: Any, expected: Any) -> None:
    value = getattr(build(**{key: given}), key)
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("3e-4", 3e-4), ("1e6", 1_000_000), ("256", 256), ("0.9", 0.9), ("lin_0.2", "lin_0.2"), ("Tanh", "Tanh")],
)
def test_texts_of_hyperparameters_become_numbers_where_they_are_numbers(given: str, expected: Any) -> None:
    config = build(hyperparameters={"a": given, "b": {"c": [given]}})
    assert config.hyperparameters == {"a": expected, "b": {"c": [expected]}}
    assert type(config.hyperparameters["a"]) is type(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"total_timestep": 5},
            "total_timestep: is not a setting (from train.yaml). Did you mean 'total_timesteps'?",
        ),
        (
            {"gamma": 0.9},
            "gamma: is not a setting (from train.yaml). "
            "Settings of the algorithm's own constructor go under 'hyperparameters:'",
        ),
        (
            {"n_envs": 0},
            "n_envs: 0 is not valid: input should be greater than or equal to 1 (from train.yaml)",
        ),
        (
            {"n_envs": "four"},
            "n_envs: 'four' is not valid: input should be a valid integer, unable to parse string as an integer "
            "(from train.yaml)",
        ),
        ({"n_envs": True}, "n_envs: True is not an integer (from train.yaml)"),
        ({"mode": "ful"}, "mode: 'ful' is not one of full, smoke (from train.yaml). Did you mean 'full'?"),
        (
            {"vec_env": "thread"},
            "vec_env: 'thread' is not one of dummy, subproc (from train.yaml). Known: dummy, subproc",
        ),
        (
            {"learning_rate": "fast"},
            "learning_rate: 'fast' is neither a number nor a schedule such as lin_3e-4 (from train.yaml)",
        ),
        ({"learning_rate": -1}, "learning_rate: -1 must be a finite number, 0 or greater (from train.yaml)"),
        (
            {"learning_rate": float("nan")},
            "learning_rate: nan must be a finite number, 0 or greater (from train.yaml)",
        ),
        (
            {"hyperparameters": {"learning_rate": 1}},
            "hyperparameters: {'learning_rate': 1} holds 'learning_rate', which is a setting of its own: "
            "write 'learning_rate:' beside it (from train.yaml)",
        ),
        (
            {"hyperparameters": {"env": "X"}},
            "hyperparameters: {'env': 'X'} holds 'env', which is a setting of its own: "
            "write 'env_id:' beside it (from train.yaml)",
        ),
        (
            {"hyperparameters": [1]},
            "hyperparameters: [1] is not valid: input should be a valid dictionary (from train.yaml)",
        ),
        (
            {"seed": 2**32},
            "seed: 4294967296 is not valid: input should be less than 4294967296 (from train.yaml)",
        ),
        (
            {"heartbeat_seconds": 0},
            "heartbeat_seconds: 0 is not valid: input should be greater than 0 (from train.yaml)",
        ),
        ({"env_id": 5}, "env_id: 5 is not valid: input should be a valid string (from train.yaml)"),
        (
            {"mongo_uri": ["mongodb://me:secret@db"]},
            "mongo_uri: ['mongodb://***@db'] is not valid: input should be a valid string (from train.yaml)",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_exact_line(values: dict[str, Any], expected: str) -> None:
    assert message(**values) == expected


@pytest.mark.parametrize("value", ["../x", "", "a/b", ".hidden", "CON"])
@pytest.mark.parametrize("key", ["agent_id", "run_id"])
def test_an_id_that_could_leave_the_folder_is_named(key: str, value: str) -> None:
    text = message(**{key: value})
    assert text.startswith(f"{key}: {value!r} ")
    assert text.endswith("(from train.yaml)")
    assert text.count(repr(value)) == 1


def test_the_agent_is_named_after_the_algorithm() -> None:
    assert build(algo="PPO").agent == "ppo_agent"
    assert build(algo="my.module:Fancy").agent == "fancy_agent"
    assert build(algo="PPO", agent_id="me").agent == "me"


def test_a_resumed_run_inherits_what_was_not_given() -> None:
    parent = build(n_envs=4, learning_rate=1e-3, hyperparameters={"n_steps": 64, "gamma": 0.9}).to_json()
    config = build(learning_rate="1e-4", hyperparameters={"n_steps": 128}).inherit(parent)
    assert (config.n_envs, config.learning_rate) == (4, 1e-4)
    assert config.hyperparameters == {"n_steps": 128, "gamma": 0.9}


def test_a_value_that_equals_its_default_is_still_given() -> None:
    parent = build(n_envs=4).to_json()
    assert build(n_envs=1).inherit(parent).n_envs == 1


def test_what_belongs_to_a_launch_is_not_inherited() -> None:
    launch = {"mode": "smoke", "checkpoint_dir": "/old", "device": "cuda", "run_id": "old", "mongo_db": "old"}
    inherited = TrainingConfig().inherit(build(**launch).to_json())
    assert [getattr(inherited, key) for key in launch] == [getattr(TrainingConfig(), key) for key in launch]


def test_keys_of_another_version_are_passed_over() -> None:
    assert TrainingConfig().inherit({"n_envs": 2, "of_the_future": 1}).n_envs == 2


def test_a_bad_value_of_the_checkpoint_is_named_as_the_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"n_envs: 'x' .* \(from the checkpoint's config\)"):
        TrainingConfig().inherit({"n_envs": "x"})


def test_inheriting_nothing_changes_nothing() -> None:
    config = build(n_envs=4, hyperparameters={"a": 1}, seed=None)
    assert config.inherit({}) == config


def test_credentials_do_not_reach_the_record() -> None:
    document = build(mongo_uri="mongodb://me:secret@db/x", tracking_uri="http://me:secret@ml").to_json()
    assert "secret" not in str(document)
    assert document["mongo_uri"] == "mongodb://***@db/x"


def test_differences_name_nested_keys_and_leave_out_where_a_run_writes() -> None:
    before = build(n_envs=1, hyperparameters={"n_steps": 64}, device="cpu").to_json()
    after = build(n_envs=2, hyperparameters={"n_steps": 128}, device="cuda").to_json()
    assert differences(before, after) == {
        "n_envs": {"from": 1, "to": 2},
        "hyperparameters.n_steps": {"from": 64, "to": 128},
    }


def test_flattening_dots_the_keys() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


@pytest.mark.parametrize(("text", "start"), [("lin_3e-4", 3e-4), ("lin_0.2", 0.2), ("lin_.5", 0.5)])
def test_a_schedule_begins_at_its_number(text: str, start: float) -> None:
    assert schedule_start(text) == start


@pytest.mark.parametrize("text", ["lin_", "lin_x", "cos_1", "3e-4", "lin_-1"])
def test_other_texts_are_no_schedules(text: str) -> None:
    with pytest.raises(ValueError, match="is not a schedule"):
        schedule_start(text)


def test_the_nearest_name_is_offered() -> None:
    assert nearest("POO", ["ppo", "sac"]) == "Did you mean 'ppo'?"
    assert nearest("zzz", ["ppo", "sac"]) == "Known: ppo, sac"


def test_the_sentinel_is_no_value_of_a_number_or_a_choice() -> None:
    for key in ("n_envs", "mode", "learning_rate", "mlflow", "hyperparameters"):
        message(**{key: INHERIT})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build().n_envs = 4  # type: ignore[misc]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(list(TrainingConfig.model_fields))


@given(st.lists(st.dictionaries(KEYS | st.text(max_size=10), JSON, max_size=4), max_size=3))
def test_any_layers_make_a_configuration_or_one_line(layers: list[dict[str, Any]]) -> None:
    result = built([Layer(f"layer {n}", values) for n, values in enumerate(layers)])
    if isinstance(result, str):
        assert "\n" not in result
    else:
        assert result.model_fields_set == {key for layer in layers for key in layer}


# A name of an algorithm that does not exist is refused before anything is recorded.
@given(KEYS.filter(lambda key: key != "algo"), JSON)
def test_what_validates_survives_a_record_and_a_resume(key: str, value: Any) -> None:
    config = built([Layer("train.yaml", {key: value})])
    if isinstance(config, str):
        return
    recorded = json.loads(json.dumps(config.to_json()))
    inherited = TrainingConfig().inherit(recorded).to_json()
    assert {k: str(inherited[k]) for k in inheritable_fields()} == {k: str(recorded[k]) for k in inheritable_fields()}
