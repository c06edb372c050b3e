"""The state of one environment: captured, written, restored elsewhere, compared byte for byte."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import toy_environments  # noqa: F401
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mlflow_ckpt import CheckpointableEnv, tree

_CALLS = {"steps": 0}


def through_a_file(state: Any) -> Any:
    document, arrays = tree.encode(state)
    content = b"".join(piece.tobytes() for piece in tree.pieces(arrays))
    return tree.decode(json.loads(json.dumps(document)), content)


def play(env: gym.Env, actions: list[Any], over: bool = False) -> tuple[list[bytes], bool]:
    answers = []
    for action in actions:
        begun = env.reset()[0] if over else None
        observation, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        answers.append(repr((np.asarray(begun).tobytes(), np.asarray(observation).tobytes(), reward, over)).encode())
    return answers, over


def check_at_every_point(make: Callable[[], CheckpointableEnv], how: str, points: int = 6, seed: int = 5) -> None:
    env, pick, over = make(), random.Random(seed), False
    sampler = copy.deepcopy(env.action_space)
    sampler.seed(seed)
    env.reset(seed=seed)
    for _ in range(points):
        _, over = play(env, [sampler.sample() for _ in range(pick.randrange(1, 60))], over)
        state = env.capture_env_state()
        assert (state["how"], state["reason"]) == (how, None)
        following = [sampler.sample() for _ in range(80)]
        other = make()
        assert other.restore_env_state(through_a_file(state)) is None
        # A resumed run is killed again: what was restored is captured, and restored once more.
        third = make()
        assert third.restore_env_state(through_a_file(other.capture_env_state())) is None
        expected, after = play(env, following, over)
        assert play(other, following, over) == (expected, after)
        assert play(third, following, over) == (expected, after)
        over = after


class Counter(gym.Env):
    """Its answers depend on a count that outlives resets, and on a generator of its own."""

    def __init__(self, bonus: int = 0) -> None:
        self.observation_space, self.action_space = spaces.Box(-9e9, 9e9, (2,), np.float64), spaces.Discrete(2)
        self.bonus, self.episodes, self.rng = bonus, 0, np.random.RandomState(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes += 1
        self.at = 0
        return np.array([self.episodes, self.np_random.random()]), {}

    def step(self, action):
        self.at += 1
        return np.array([self.episodes, self.rng.rand()]), float(self.at + self.bonus), self.at == 7, False, {}


class HiddenState(Counter):
    """Its answers depend on a count outside of it."""

    def step(self, action):
        _CALLS["steps"] += 1
        _, reward, terminated, truncated, info = super().step(action)
        return np.array([0.0, _CALLS["steps"]]), reward, terminated, truncated, info


class Own(Counter):
    """It knows its state."""

    def __init__(self) -> None:
        super().__init__()
        self.simulator = object()

    def get_checkpoint_state(self):
        return {"episodes": self.episodes, "at": self.at, "rng": self.rng.get_state(legacy=False)}

    def set_checkpoint_state(self, state):
        self.episodes, self.at = state["episodes"], state["at"]
        self.rng.set_state(state["rng"])


class OwnWrapper(gym.Wrapper):
    """It knows the state of everything beneath it."""

    def get_checkpoint_state(self):
        inner = self.unwrapped
        return {"at": inner.at, "episodes": inner.episodes, "rng": inner.rng.get_state(legacy=False)}

    def set_checkpoint_state(self, state):
        Own.set_checkpoint_state(self.unwrapped, state)


class Drift(gym.Wrapper):
    """Adds what it has seen so far to rewards; resets do not change it."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.total, self.last = 0.0, None

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.total += reward
        self.last = np.array([self.total])
        return observation, reward + self.total, terminated, truncated, info


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1", "FixedLength-v0"])
def test_an_episode_that_is_replayed_goes_on_the_same(env_id: str) -> None:
    check_at_every_point(lambda: CheckpointableEnv(gym.make(env_id)), "replay")


def test_counts_and_generators_that_outlive_resets_come_back() -> None:
    check_at_every_point(lambda: CheckpointableEnv(Drift(Counter())), "replay")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gym.wrappers.RecordEpisodeStatistics(env),
        lambda env: gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(env)),
        lambda env: gym.wrappers.FrameStackObservation(env, 3),
        lambda env: gym.wrappers.StickyAction(env, 0.4),
    ],
)
def test_wrappers_come_back(wrap: Callable[[gym.Env], gym.Env]) -> None:
    check_at_every_point(lambda: CheckpointableEnv(wrap(gym.make("CartPole-v1"))), "replay")


def test_an_environment_that_knows_its_state_is_asked_for_it() -> None:
    check_at_every_point(lambda: CheckpointableEnv(Drift(Own())), "own")


def test_a_wrapper_that_knows_the_state_beneath_is_asked_for_it() -> None:
    check_at_every_point(lambda: CheckpointableEnv(Drift(OwnWrapper(Counter()))), "own")


def test_a_wrapper_above_the_owner_without_a_plain_form_leads_to_a_replay() -> None:
    class Strange(gym.Wrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            self.memory = object()

    check_at_every_point(lambda: CheckpointableEnv(Strange(Own())), "replay")


def test_an_own_state_that_is_not_plain_is_named() -> None:
    class NotPlain(Own):
        def get_checkpoint_state(self):
            return {"body": object()}

    env = CheckpointableEnv(NotPlain())
    env.reset(seed=1)
    assert env.capture_env_state() == {"reason": "state.own.body is a builtins.object", "how": None}


def test_an_own_state_that_raises_is_a_reason() -> None:
    class Raises(Own):
        def set_checkpoint_state(self, state):
            raise RuntimeError("no simulator")

    env = CheckpointableEnv(Raises())
    env.reset(seed=1)
    assert env.restore_env_state(env.capture_env_state()) == "restoring failed (RuntimeError: no simulator)"


def test_a_state_outside_of_the_environment_is_noticed() -> None:
    env = CheckpointableEnv(HiddenState())
    env.reset(seed=1)
    play(env, [0, 1, 0])
    state = env.capture_env_state()
    assert state["reason"] is None
    why = CheckpointableEnv(HiddenState()).restore_env_state(state)
    assert why == "the replay of 3 steps answers something else: the environment has a state of its own"


def test_an_episode_that_is_too_long_is_not_captured_and_the_next_one_is() -> None:
    env = CheckpointableEnv(gym.make("Pendulum-v1"), max_recorded_steps=10)
    env.reset(seed=1)
    play(env, [np.zeros(1, np.float32)] * 11)
    assert env.capture_env_state()["reason"] == "the episode is longer than max_recorded_steps (10)"
    env.reset()
    assert env.capture_env_state()["reason"] is None


def test_an_environment_without_a_seed_is_replayed_too() -> None:
    env, other = CheckpointableEnv(gym.make("CartPole-v1")), CheckpointableEnv(gym.make("CartPole-v1"))
    env.reset()
    assert other.restore_env_state(env.capture_env_state()) is None
    assert play(env, [0, 1] * 40) == play(other, [0, 1] * 40)


def test_an_environment_that_was_never_reset_is_restored_as_such() -> None:
    env, other = CheckpointableEnv(gym.make("CartPole-v1")), CheckpointableEnv(gym.make("CartPole-v1"))
    other.reset(seed=9)
    state = through_a_file(env.capture_env_state())
    assert state["reason"] is None and state["fresh"] is True
    assert other.restore_env_state(state) is None
    assert np.array_equal(env.reset(seed=4)[0], other.reset(seed=4)[0])


def test_what_the_constructor_was_given_wins_over_the_state() -> None:
    env = CheckpointableEnv(Own())
    env.reset(seed=1)
    state = env.capture_env_state()
    changed = Own()
    changed.bonus = 5
    other = CheckpointableEnv(changed)
    assert other.restore_env_state(state) is None
    assert changed.bonus == 5


def test_a_failing_step_leaves_a_reason() -> None:
    env = CheckpointableEnv(gym.make("FixedLength-v0", fails_at=3))
    env.reset(seed=1)
    with pytest.raises(RuntimeError, match="broke"):
        play(env, [0, 0, 0])
    assert env.capture_env_state()["reason"] == "a step of the episode failed"


def test_actions_and_observations_may_be_reused_by_the_caller() -> None:
    env, other = CheckpointableEnv(gym.make("Pendulum-v1")), CheckpointableEnv(gym.make("Pendulum-v1"))
    env.reset(seed=1)
    action = np.zeros(1, np.float32)
    for value in (1.0, -1.0, 0.5):
        action[:] = value
        env.step(action)[0][:] = 0
    assert other.restore_env_state(env.capture_env_state()) is None


def test_a_text_from_a_file_never_becomes_an_attribute() -> None:
    class Logs(Own):
        def __init__(self) -> None:
            super().__init__()
            self.path = "here"

    env = CheckpointableEnv(Drift(Logs()))
    env.reset(seed=1)
    state = through_a_file(env.capture_env_state())
    state["attributes"][0]["last"] = "/etc/passwd"
    assert "another form" in str(env.restore_env_state(state))


def _recorded() -> dict[str, Any]:
    env = CheckpointableEnv(Drift(gym.make("CartPole-v1")))
    env.reset(seed=1)
    play(env, [0, 1, 0, 1])
    return through_a_file(env.capture_env_state())


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in _paths(item, (*path, key)))]


_STATE = _recorded()
_RUBBISH = [
    None, -1, 2**200, float("nan"), "text", b"bytes", [], {}, (1, 2), [[]] * 3, {"a": 1}, np.zeros(3), np.zeros((2, 0)),
    np.array(["x"]), np.full(1000, np.nan), np.array(2**63, dtype=np.uint64),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_paths(_STATE)), st.sampled_from(range(len(_RUBBISH))), st.booleans())
def test_a_hostile_state_is_answered_and_leaves_a_usable_environment(path: Any, rubbish: int, remove: bool) -> None:
    state: Any = copy.deepcopy(_STATE)
    if not path:
        state = _RUBBISH[rubbish]
    else:
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        if remove:
            del inner[path[-1]]
        else:
            inner[path[-1]] = _RUBBISH[rubbish]
    env = CheckpointableEnv(Drift(gym.make("CartPole-v1")))
    answer = env.restore_env_state(state)
    assert answer is None or isinstance(answer, str)
    env.reset(seed=3)
    play(env, [0, 1] * 5)
    assert env.capture_env_state()["reason"] is None


@pytest.mark.parametrize(("name", "position"), [("rng", 625), ("rng", -1), ("rng", 2**31)])
def test_a_position_beyond_a_generators_memory_is_refused(name: str, position: int) -> None:
    env = CheckpointableEnv(Counter())
    env.reset(seed=1)
    state = through_a_file(env.capture_env_state())
    state["generators"][0][name]["state"]["pos"] = position
    assert "random number generator" in str(CheckpointableEnv(Counter()).restore_env_state(state))


def test_the_state_of_another_environment_is_refused() -> None:
    env = CheckpointableEnv(gym.make("CartPole-v1"))
    env.reset(seed=1)
    other = CheckpointableEnv(gym.make("Pendulum-v1"))
    assert other.restore_env_state(env.capture_env_state()) == (
        "it was captured in other wrappers, or of another environment"
    )
