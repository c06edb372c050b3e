"""Owns the check of whether a resume is exact in an environment: capture, write, restore elsewhere, compare bytewise.

Points are taken right after a reset, right after an episode's end, and anywhere in between. Each is restored in a fresh
environment, the first of them in a process of its own, and both environments are given the same actions.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.environments import make_checkpointable

if TYPE_CHECKING:
    import gymnasium

_LONGEST_WALK = 600


@dataclass(frozen=True)
class EnvSpecification:
    """What is checked.

    Attributes:
        env_id: As gymnasium knows it, or `module:Id`.
        env_kwargs: Arguments of the environment.
        env_wrappers: Wrappers, as in the training's configuration.
    """

    env_id: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    env_wrappers: Sequence[str | Mapping[str, Mapping[str, Any]]] = ()

    def make(self) -> gymnasium.Env[Any, Any]:
        """Return a fresh one."""
        return make_checkpointable(self.env_id, self.env_kwargs, self.env_wrappers)


@dataclass
class EnvReport:
    """What was found.

    Attributes:
        env_id: The environment.
        how: How its state is captured: own, mujoco, replay; None where it is not.
        points: How many points were tried.
        exact_points: At how many of them both environments answered the same bytes.
        reason: The first that was wrong, or None.
        state_bytes: The longest state.
        capture_ms: The longest time that capturing took.
        restore_ms: The longest time that restoring took.
    """

    env_id: str
    how: str | None = None
    points: int = 0
    exact_points: int = 0
    reason: str | None = None
    state_bytes: int = 0
    capture_ms: float = 0.0
    restore_ms: float = 0.0

    @property
    def exact(self) -> bool:
        return self.points > 0 and self.points == self.exact_points

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {**asdict(self), "exact": self.exact}


def check_env(specification: EnvSpecification, *, points: int = 8, steps: int = 200, seed: int = 0) -> EnvReport:
    """Return whether a resume is exact in an environment.

    Args:
        specification: The environment.
        points: How many points to try.
        steps: How many steps to compare from each of them, through resets.
        seed: What seeds the environment, the points and the actions.

    Raises:
        ConfigError: The environment, an argument of it or a wrapper does not exist.
    """
    report = EnvReport(specification.env_id)
    pick, player = random.Random(seed), _Player(specification.make())
    try:
        actions = _Actions(player.env, seed)
        player.env.reset(seed=seed)
        for point in range(points):
            player.walk(actions, pick, point)
            problem = _check_point(player, specification, [actions.next() for _ in range(steps)], report)
            report.points += 1
            report.exact_points += problem is None
            report.reason = report.reason or problem
    except Exception as error:
        report.points += 1
        report.reason = report.reason or f"the environment fails ({type(error).__name__}: {error})"
    finally:
        player.env.close()
    return report


class _Actions:
    """Random actions from a space of its own, so that the environment's is as its own code leaves it."""

    def __init__(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        self._space = copy.deepcopy(env.action_space)
        self._space.seed(seed)

    def next(self) -> Any:
        return self._space.sample()


class _Player:
    """An environment that is reset where its episode is over, as by SB3."""

    def __init__(self, env: gymnasium.Env[Any, Any], over: bool = False) -> None:
        self.env, self.over = env, over

    def answer(self, action: Any) -> bytes:
        """Step, and return a hash of what the environment answers, to the reset before as well."""
        begun = _hash(self.env.reset()[0]) if self.over else b""
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.over = bool(terminated or truncated)
        return begun + _hash([observation, reward, bool(terminated), bool(truncated)])

    def walk(self, actions: _Actions, pick: random.Random, point: int) -> None:
        """Step to where the state is captured: anywhere, after a reset, at an episode's end, or deep in an episode."""
        kind = ("anywhere", "reset", "end", "deep")[point % 4]
        length = pick.randrange(1, _LONGEST_WALK // 4)
        length += _LONGEST_WALK // 2 if kind == "deep" else 0
        for taken in range(2 * _LONGEST_WALK):
            if taken >= length and (self.over or kind != "end"):
                break
            self.answer(actions.next())
        if kind == "reset" or (self.over and kind != "end"):
            self.env.reset()
            self.over = False


def _timed_capture(env: gymnasium.Env[Any, Any], report: EnvReport) -> tuple[bytes, str | None]:
    begin = time.perf_counter()
    state = env.get_wrapper_attr("capture_env_state")()
    report.capture_ms = max(report.capture_ms, 1000 * (time.perf_counter() - begin))
    report.how = state["how"] or report.how
    if state["reason"] is not None:
        return b"", str(state["reason"])
    content = _to_file(state)
    report.state_bytes = max(report.state_bytes, len(content))
    return content, None


def _to_file(state: Any) -> bytes:
    document, arrays = tree.encode(state)
    head = json.dumps(document).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(piece.tobytes() for piece in tree.pieces(arrays))])


def _from_file(content: bytes) -> Any:
    end = 8 + int.from_bytes(content[:8], "little")
    return tree.decode(json.loads(content[8:end]), content[end:])


def _check_point(player: _Player, specification: EnvSpecification, actions: list[Any], report: EnvReport) -> str | None:
    """Return where a restored environment differs from the one that goes on, or None."""
    content, problem = _timed_capture(player.env, report)
    arguments = (specification, content, actions, player.over)
    ours = [player.answer(action) for action in actions]
    if problem is not None:
        return problem
    if report.points == 0:
        # In a process of its own, once: what the environment keeps in modules must not be there already.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            problem, took, theirs = pool.submit(_restored_elsewhere, *arguments).result()
    else:
        problem, took, theirs = _restored_answers(*arguments)
    report.restore_ms = max(report.restore_ms, took)
    if problem is not None:
        return problem
    differing = (at for at, (one, other) in enumerate(zip(ours, theirs, strict=True), 1) if one != other)
    first = next(differing, None)
    return None if first is None else f"step {first} after restoring answers something else"


def _restored_elsewhere(*arguments: Any) -> tuple[str | None, float, list[bytes]]:
    try:
        return _restored_answers(*arguments)
    except Exception as error:
        # As a text: an error whose class takes other arguments than its message cannot be sent.
        return f"it cannot be made in a process of its own ({type(error).__name__}: {error})", 0.0, []


def _restored_answers(
    specification: EnvSpecification, content: bytes, actions: list[Any], over: bool
) -> tuple[str | None, float, list[bytes]]:
    player = _Player(specification.make(), over)
    try:
        begin = time.perf_counter()
        problem = player.env.get_wrapper_attr("restore_env_state")(_from_file(content))
        took = 1000 * (time.perf_counter() - begin)
        return problem, took, [] if problem is not None else [player.answer(action) for action in actions]
    finally:
        player.env.close()


def _hash(value: Any) -> bytes:
    document, arrays = tree.encode(value)
    digest = hashlib.blake2b(json.dumps(document).encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
