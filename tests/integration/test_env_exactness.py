"""Simulators of others, vectorised environments and the command that checks them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import toy_environments
from click.testing import CliRunner
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_mlflow_ckpt import CheckpointableEnv, tree
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.env_check import EnvSpecification, check_env
from sb3_mlflow_ckpt.environments import make_env

ATARI = ("stable_baselines3.common.atari_wrappers:AtariWrapper",)
STICKY = ({"stable_baselines3.common.atari_wrappers:AtariWrapper": {"action_repeat_probability": 0.25}},)
MUJOCO_IDS = [
    "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5",
]  # fmt: skip


def need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"NOT TESTED: {module} is not installed; install the extra [{extra}]")


def through_a_file(state: Any) -> Any:
    document, arrays = tree.encode(state)
    return tree.decode(json.loads(json.dumps(document)), b"".join(piece.tobytes() for piece in tree.pieces(arrays)))


def check_exact(env_id: str, how: str, *, wrappers: Any = (), points: int = 5, steps: int = 100, **kwargs: Any) -> None:
    report = check_env(EnvSpecification(env_id, kwargs, wrappers), points=points, steps=steps, seed=7)
    assert (report.reason, report.how, report.exact_points) == (None, how, points)


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
def test_mujoco_is_copied_exactly(env_id: str) -> None:
    need("mujoco", "mujoco")
    check_exact(env_id, "mujoco", points=9, steps=150)


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3", "BipedalWalkerHardcore-v3"])
def test_box2d_is_replayed_exactly(env_id: str) -> None:
    need("Box2D", "box2d")
    check_exact(env_id, "replay", points=16, steps=300)


@pytest.mark.parametrize(
    ("env_id", "wrappers"),
    [("ALE/Pong-v5", ()), ("ALE/Breakout-v5", ()), ("BreakoutNoFrameskip-v4", ATARI), ("PongNoFrameskip-v4", STICKY)],
)
def test_atari_is_replayed_exactly(env_id: str, wrappers: Any) -> None:
    need("ale_py", "atari")
    check_exact(env_id, "replay", wrappers=wrappers, points=4)


@pytest.mark.parametrize(
    ("path", "value", "answer"),
    [
        (("arrays", "qpos"), np.full(9, np.nan), "not finite"),
        (("arrays", "qpos"), np.zeros(2**16), "another shape"),
        (("arrays", "qpos"), "os.system", "another shape"),
        (("arrays", "efc_force"), np.zeros(3), "other quantities"),
        (("model",), 1, "not the one"),
        (("time",), "soon", "other quantities"),
        ((), None, "missing"),
    ],
)
def test_a_hostile_simulation_is_refused_and_leaves_a_usable_environment(path: Any, value: Any, answer: str) -> None:
    need("mujoco", "mujoco")
    env = CheckpointableEnv(gym.make("HalfCheetah-v5"))
    env.reset(seed=1)
    state = through_a_file(env.capture_env_state())
    inner = state
    for key in ("simulation", *path)[:-1]:
        inner = inner[key]
    inner[("simulation", *path)[-1]] = value
    assert answer in str(env.restore_env_state(state))
    env.reset()
    assert env.capture_env_state()["reason"] is None


def test_an_environment_that_changes_its_model_is_replayed_from_its_next_reset_on() -> None:
    need("mujoco", "mujoco")
    env = CheckpointableEnv(gym.make("Hopper-v5"))
    env.reset(seed=1)
    env.unwrapped.model.body_mass[1] *= 1.5
    assert env.capture_env_state()["reason"] == "the environment changes its MuJoCo model"
    env.reset()
    assert (env.capture_env_state()["how"], env.capture_env_state()["reason"]) == ("replay", None)


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("system", np.full(625, 625, dtype=np.uint32), "impossible position"),
        ("sticky", np.zeros(7, dtype=np.uint32), "another form"),
        ("sticky", b"\xff" * 7000, "another form"),
        ("ram", np.zeros(2**16, dtype=np.uint8), "another size"),
        ("frame_number", 2**40, "out of range"),
    ],
)
def test_a_hostile_emulator_is_refused_and_leaves_a_usable_environment(key: str, value: Any, answer: str) -> None:
    need("ale_py", "atari")
    import ale_py

    gym.register_envs(ale_py)
    env = CheckpointableEnv(gym.make("ALE/Pong-v5"))
    env.reset(seed=1)
    state = through_a_file(env.capture_env_state())
    state["recording"]["before"]["emulator"][key] = value
    assert answer in str(env.restore_env_state(state))
    env.reset()
    assert env.capture_env_state()["reason"] is None


class DrawsFromTheProcess(gym.Env):
    """Draws from numpy's global generator, which a worker has to itself."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float64), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.random.rand(1), {}

    def step(self, action):
        value = np.random.rand(1)
        return value, 0.0, bool(value < 0.1), False, {}


def answers(env: Any, actions: list[Any]) -> list[Any]:
    found = []
    for action in actions:
        observations, rewards, dones, _ = env.step(action)
        found.append((observations.tobytes(), rewards.tobytes(), dones.tobytes()))
    return found


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5", DrawsFromTheProcess])
def test_vectorised_environments_go_on_the_same(kind: Any, env_id: Any) -> None:
    need("mujoco", "mujoco")
    if kind is DummyVecEnv and env_id is DrawsFromTheProcess:
        pytest.skip("the trainer's own generators are not an environment's to restore")

    def make(seed: int) -> Any:
        return make_vec_env(env_id, n_envs=2, seed=seed, wrapper_class=CheckpointableEnv, vec_env_cls=kind)

    env, other = make(1), make(2)
    space = copy.deepcopy(env.action_space)
    space.seed(3)
    try:
        env.reset(), other.reset()
        for _ in range(3):
            answers(env, [np.stack([space.sample(), space.sample()]) for _ in range(37)])
            states = env.env_method("capture_env_state")
            assert [state["reason"] for state in states] == [None, None]
            for index, state in enumerate(states):
                assert other.env_method("restore_env_state", through_a_file(state), indices=index) == [None]
            following = [np.stack([space.sample(), space.sample()]) for _ in range(60)]
            assert answers(env, following) == answers(other, following)
    finally:
        env.close(), other.close()


def test_the_trainers_environments_can_be_captured() -> None:
    env = make_env(build_config([Layer("test", {"env_id": "CartPole-v1", "n_envs": 2, "frame_stack": 2})]))
    env.reset()
    assert [state["how"] for state in env.env_method("capture_env_state")] == ["replay", "replay"]


def test_a_wrapper_of_the_user_that_captures_is_not_wrapped_again() -> None:
    given = {"env_id": "CartPole-v1", "env_wrappers": ["sb3_mlflow_ckpt:CheckpointableEnv"]}
    env: Any = make_env(build_config([Layer("test", given)]))
    assert not isinstance(env.envs[0].env, CheckpointableEnv)


def test_check_env_prints_a_line_for_each_environment() -> None:
    done = CliRunner().invoke(
        main, ["check-env", "CartPole-v1", "toy_environments:FixedLength-v0", "--points", "2", "--steps", "20"]
    )
    assert done.exit_code == 0, done.output
    assert [line.split()[:3] for line in done.output.splitlines()[1:]] == [
        ["CartPole-v1", "replay", "yes"], ["toy_environments:FixedLength-v0", "replay", "yes"],
    ]  # fmt: skip


def test_check_env_exits_with_1_where_a_resume_is_not_exact() -> None:
    arguments = ["check-env", "toy_environments:Unrepeatable-v0", "--points", "2", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    (report,) = json.loads(done.output)
    assert report["exact"] is False and "a state of its own" in report["reason"]


def test_check_env_takes_arguments_and_wrappers_as_the_trainer_does() -> None:
    words = ["--env-kwargs", "length=7", "--env-wrappers", "gymnasium.wrappers:RecordEpisodeStatistics"]
    done = CliRunner().invoke(main, ["check-env", "toy_environments:FixedLength-v0", *words, "--points", "1", "--json"])
    assert done.exit_code == 0, done.output


def test_an_environment_that_only_this_process_knows_is_said_to_be_so() -> None:
    gym.register("OnlyHere-v0", toy_environments.FixedLength)
    report = check_env(EnvSpecification("OnlyHere-v0"), points=2, steps=5)
    assert report.exact_points == 1
    assert str(report.reason).startswith("it cannot be made in a process of its own")


def test_check_env_names_an_environment_that_does_not_exist() -> None:
    done = CliRunner().invoke(main, ["check-env", "CartPol-v1"])
    assert done.exit_code == 2 and "CartPol-v1" in done.output and "Traceback" not in done.output


def test_a_check_is_a_function_as_well() -> None:
    make: Callable[..., EnvSpecification] = EnvSpecification
    assert check_env(make("CartPole-v1"), points=1, steps=5).exact
