"""Owns the unfinished rollout of an on-policy algorithm: captured in mid-rollout, entered again on a resume.

SB3 begins every `learn` with an empty rollout buffer. The rows that were filled are put back and the rest is
collected: `collect_rollouts` is asked for the missing steps only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

# Computed from the others when the rollout is full.
_DERIVED = frozenset({"advantages", "returns"})


def capture(model: BaseAlgorithm) -> dict[str, Any] | None:
    """Return a copy of the filled rows, or None where no rollout is under way."""
    buffer = _buffer(model)
    if buffer is None or not 0 < buffer.pos < buffer.buffer_size:
        return None
    return {"pos": buffer.pos, "rows": {name: array[: buffer.pos].copy() for name, array in _arrays(buffer)}}


def problem(model: BaseAlgorithm, state: Any) -> str | None:
    """Return why a captured rollout cannot go on in this model, or None."""
    buffer = _buffer(model)
    if buffer is None:
        return "the algorithm collects no rollouts"
    if not isinstance(state, Mapping):
        return "it is not described"
    pos, rows = state.get("pos"), state.get("rows")
    if type(pos) is not int or not isinstance(rows, Mapping):
        return "it is not described"
    if not 0 < pos < buffer.buffer_size:
        return f"it has {pos} steps, the rollouts of this run have {buffer.buffer_size}"
    for name, array in _arrays(buffer):
        saved = rows.get(name)
        if not isinstance(saved, np.ndarray) or saved.shape != (pos, *array.shape[1:]) or saved.dtype != array.dtype:
            return f"its {name} are not those of this run's environments"
    return None


def announce(model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Make the next rollout collect only what is missing. Call before `learn` asks for its first rollout."""
    cast("Any", model).n_steps -= int(state["pos"])


def restore(model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Put the rows back and the length of later rollouts right. Call when the first rollout has been begun."""
    buffer, pos = _buffer(model), int(state["pos"])
    assert buffer is not None
    withdraw(model, state)
    for name, array in _arrays(buffer):
        array[:pos] = state["rows"][name]
    buffer.pos = pos


def withdraw(model: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Take `announce` back."""
    cast("Any", model).n_steps += int(state["pos"])


def unknown(model: BaseAlgorithm) -> str | None:
    """Return why the rollout buffer may hold more than what is captured here, or None."""
    buffer = getattr(model, "rollout_buffer", None)
    if buffer is None or type(buffer).__module__.partition(".")[0] in ("stable_baselines3", "sb3_contrib"):
        return None
    return f"what state {type(buffer).__name__} adds to its rows is not known"


def _buffer(model: BaseAlgorithm) -> RolloutBuffer | None:
    buffer = getattr(model, "rollout_buffer", None)
    return buffer if isinstance(buffer, RolloutBuffer) else None


def _arrays(buffer: RolloutBuffer) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays with a row for each step; those of dictionary observations one by one."""
    for name, value in vars(buffer).items():
        if name in _DERIVED:
            continue
        parts = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        for part, array in parts.items():
            if isinstance(array, np.ndarray) and array.ndim > 1 and len(array) == buffer.buffer_size:
                yield part, array
