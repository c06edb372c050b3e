"""Every algorithm loads without a pickle to what SB3's own load makes of it: our checkpoints and SB3's own zips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from test_algorithms import CASES, VARIANTS, _equal
from toy_algorithms import MyPPO

from sb3_mlflow_ckpt import EpisodeCheckpointCallback, load_checkpoint, save_checkpoint, verify_checkpoint
from sb3_mlflow_ckpt.algorithms import build_model
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.environments import make_env
from sb3_mlflow_ckpt.errors import ForeignCheckpointError, IncompatibleCheckpointError, UntrustedCheckpointError
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.spaces import decode_space, encode_space
from sb3_mlflow_ckpt.trainer import train


def trained(name: str) -> tuple[Any, Any]:
    settings = VARIANTS.get(name) or {"algo": name, **CASES[name]}
    config = build_config([Layer("the test", {**settings, "seed": 3, "vec_env": "dummy"})])
    env = make_env(config, seed=3)
    model = build_model(config, env, seed=3)
    model.learn(300)
    return model, config


def same(left: Any, right: Any, env: Any) -> None:
    for name, value in left.get_parameters().items():
        mine = right.get_parameters()[name]
        if "optimizer" in name:
            value, mine = value["state"], mine["state"]
        assert _equal(value, mine), name
    observation = env.reset()
    states = None
    assert np.array_equal(
        left.predict(observation, states, deterministic=True)[0],
        right.predict(observation, states, deterministic=True)[0],
    )
    for counter in ("num_timesteps", "_n_updates", "exploration_rate"):
        assert getattr(left, counter, None) == getattr(right, counter, None)


@pytest.mark.parametrize("name", [*CASES, *(name for name in VARIANTS if name != "subprocesses")])
def test_a_safe_load_equals_sb3s_own(name: str, tmp_path: Path) -> None:
    model, config = trained(name)
    path = save_checkpoint(model, tmp_path, agent_id="a", run_id="r", episode=1, config={"note": "of my own"})
    fresh = make_env(config, seed=4)
    theirs = type(model).load(path, env=make_env(config, seed=4))
    same(theirs, load_checkpoint(path, env=fresh).model, fresh)
    alone = load_checkpoint(path).model
    same(theirs, alone, fresh)
    assert alone.observation_space == theirs.observation_space and alone.action_space == theirs.action_space
    model.save(tmp_path / "foreign.zip")
    foreign = load_checkpoint(tmp_path / "foreign.zip", env=fresh, algo=config.algo).model
    same(theirs, foreign, fresh)
    with pytest.raises(ForeignCheckpointError):
        load_checkpoint(tmp_path / "foreign.zip", env=fresh)


def test_a_checkpoint_without_an_environment_can_be_given_one(tmp_path: Path) -> None:
    model, config = trained("dqn")
    path = save_checkpoint(model, tmp_path, agent_id="a", run_id="r", episode=1)
    loaded = load_checkpoint(path).model
    loaded.set_env(make_env(config))
    loaded.learn(30, reset_num_timesteps=False)
    assert 330 <= loaded.num_timesteps < 340


def test_a_plain_environment_and_another_number_of_them_will_do(tmp_path: Path) -> None:
    model, _ = trained("ppo")
    path = save_checkpoint(model, tmp_path, agent_id="a", run_id="r", episode=1)
    assert load_checkpoint(path, env=gym.make("CartPole-v1")).model.n_envs == 1
    loaded = load_checkpoint(path, env=make_vec_env("CartPole-v1", n_envs=3)).model
    loaded.learn(96, reset_num_timesteps=False)
    assert loaded.num_timesteps == 320 + 96


def test_an_activation_that_the_config_does_not_tell_of_comes_back(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": th.nn.ReLU, "net_arch": [8]}, device="cpu")
    path = save_checkpoint(model, tmp_path, agent_id="a", run_id="r", episode=1, config={"lr": 1})
    assert load_checkpoint(path).model.policy.activation_fn is th.nn.ReLU
    model.save(tmp_path / "foreign.zip")
    loaded = load_checkpoint(tmp_path / "foreign.zip", env=gym.make("CartPole-v1"), algo="ppo").model
    assert loaded.policy.activation_fn is th.nn.ReLU
    result = train(
        build_config(
            [
                Layer(
                    "t",
                    {
                        "resume_from_checkpoint": str(path), "env_id": "CartPole-v1", "mlflow": False, "total_timesteps": 10,
                        "checkpoint_dir": str(tmp_path / "c"), "hyperparameters": {"n_steps": 16, "batch_size": 16},
                    },
                )
            ]
        )
    )  # fmt: skip
    assert PPO.load(result.checkpoint).policy.activation_fn is th.nn.ReLU


def test_an_activation_that_is_only_a_pickle_is_refused_with_its_text(tmp_path: Path) -> None:
    kwargs = {"activation_fn": lambda: th.nn.ReLU()}
    PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu").save(tmp_path / "f.zip")
    with pytest.raises(UntrustedCheckpointError, match=r"policy_kwargs is known only as a pickle .*<lambda>.*Give it"):
        load_checkpoint(tmp_path / "f.zip", env=gym.make("CartPole-v1"), algo="ppo")
    given = {"policy_kwargs": {"activation_fn": th.nn.ReLU}}
    loaded = load_checkpoint(tmp_path / "f.zip", env=gym.make("CartPole-v1"), algo="ppo", hyperparameters=given).model
    trusted = load_checkpoint(tmp_path / "f.zip", env=gym.make("CartPole-v1"), algo="ppo", trusted=True).model
    assert _equal(loaded.get_parameters()["policy"], trusted.get_parameters()["policy"])


def test_other_spaces_are_refused_for_a_zip_of_sb3s_own(tmp_path: Path) -> None:
    model, _ = trained("sac")
    model.save(tmp_path / "f.zip")
    other = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1.0, 1.0)
    with pytest.raises(IncompatibleCheckpointError, match="Action spaces do not match"):
        load_checkpoint(tmp_path / "f.zip", env=other, algo="sac")


def test_training_goes_on_from_a_zip_of_sb3s_own_as_a_new_run(tmp_path: Path) -> None:
    model, _ = trained("ppo")
    model.save(tmp_path / "foreign.zip")
    settings = {
        "resume_from_checkpoint": str(tmp_path / "foreign.zip"), "algo": "ppo", "env_id": "CartPole-v1",
        "total_timesteps": 400, "mlflow": False, "checkpoint_dir": str(tmp_path / "c"),
    }  # fmt: skip
    result = train(build_config([Layer("t", settings)]))
    assert 400 <= result.num_timesteps < 500
    record = FolderRuns(tmp_path / "c").get(result.run_folder.name)
    assert record["parent"]["checkpoint"] == str(tmp_path / "foreign.zip")
    assert (record["parent"]["episode"], len(record["parent"]["sha256"])) == (0, 64)
    assert record["root_run_id"] == record["run_id"]
    with pytest.raises(IncompatibleCheckpointError):
        verify_checkpoint(tmp_path / "foreign.zip")


def test_a_callback_goes_on_from_a_zip_of_sb3s_own(tmp_path: Path) -> None:
    model, _ = trained("ppo")
    model.save(tmp_path / "foreign.zip")
    loaded = load_checkpoint(tmp_path / "foreign.zip", env=gym.make("CartPole-v1"), algo="ppo").model
    callback = EpisodeCheckpointCallback(checkpoint_dir=tmp_path / "c")
    loaded.learn(64, callback=callback, reset_num_timesteps=False)
    assert FolderRuns(tmp_path / "c").get(str(callback.run_id))["parent"]["run_id"] == ""


def test_a_class_of_ones_own_is_found_where_it_is_imported(tmp_path: Path) -> None:
    path = save_checkpoint(MyPPO("MlpPolicy", "CartPole-v1"), tmp_path, agent_id="a", run_id="r", episode=1)
    assert type(load_checkpoint(path).model) is MyPPO


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Box(np.array([-np.inf, 0], np.float64), np.array([1, np.inf], np.float64), dtype=np.float64),
        spaces.Box(0, 255, (84, 84, 4), np.uint8),
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiBinary(4),
        spaces.MultiBinary([2, 3]),
        spaces.Dict([("b", spaces.Discrete(2)), ("a", spaces.Tuple([spaces.MultiBinary(2), spaces.Discrete(3)]))]),
        spaces.Text(5, charset="abc"),
        spaces.Sequence(spaces.Discrete(3)),
        spaces.Graph(spaces.Box(0, 1, (2,)), spaces.Discrete(3)),
        spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (1,))]),
    ],
    ids=str,
)
def test_every_kind_of_space_comes_back(space: gym.Space[Any]) -> None:
    import json

    from sb3_mlflow_ckpt import tree

    document, arrays = tree.encode(encode_space(space))
    content = b"".join(piece.tobytes() for piece in tree.pieces(arrays))
    decoded = decode_space(tree.decode(json.loads(json.dumps(document)), content))
    assert decoded == space
    if isinstance(space, spaces.Dict):
        assert list(decoded.spaces) == list(space.spaces)
