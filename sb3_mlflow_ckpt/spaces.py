"""Owns the plain form of observation and action spaces: bounds and all, without a pickle.

`environments.describe_space` is for people; this is what a model is built from where there is no environment.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from sb3_mlflow_ckpt.tree import NotPlainError, dtype_of

_MOST_VALUES = 2**24
_DEPTH = 16
_KINDS = frozenset("biuf")


def encode_space(space: gymnasium.Space[Any]) -> dict[str, Any]:
    """Return a space as values that `tree.encode` takes.

    Raises:
        NotPlainError: It is of a kind of somebody's own.
    """
    if isinstance(space, spaces.Box):
        bounds = {"low": _shortened(space.low), "high": _shortened(space.high)}
        return {"kind": "Box", **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        start = np.broadcast_to(getattr(space, "start", 0), space.nvec.shape)
        return {"kind": "MultiDiscrete", "nvec": space.nvec, "start": start.copy(), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape or ()), "flat": isinstance(space.n, (int, np.integer))}
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": [[key, encode_space(inner)] for key, inner in space.spaces.items()]}
    if isinstance(space, (spaces.Tuple, spaces.OneOf)):
        return {"kind": type(space).__name__, "spaces": [encode_space(inner) for inner in space.spaces]}
    if isinstance(space, spaces.Text):
        lengths = {"min_length": int(space.min_length), "max_length": int(space.max_length)}
        return {"kind": "Text", **lengths, "charset": "".join(space.character_list)}
    if isinstance(space, spaces.Sequence):
        return {"kind": "Sequence", "space": encode_space(space.feature_space), "stack": bool(space.stack)}
    if isinstance(space, spaces.Graph):
        edges = None if space.edge_space is None else encode_space(space.edge_space)
        return {"kind": "Graph", "nodes": encode_space(space.node_space), "edges": edges}
    raise NotPlainError(f"a {type(space).__module__}.{type(space).__qualname__} is no space of gymnasium's own")


def decode_space(value: Any) -> gymnasium.Space[Any]:
    """Return the space that `encode_space` was given.

    Raises:
        ValueError: It is no space, or one of more values than a policy could take in.
    """
    try:
        return _decode(value, 0)
    except (KeyError, TypeError, AttributeError, AssertionError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"its spaces cannot be understood ({' '.join(str(error).split())[:200]})") from error


def _decode(value: Mapping[str, Any], depth: int) -> gymnasium.Space[Any]:
    if depth > _DEPTH or not isinstance(value, Mapping):
        raise ValueError("its spaces are no spaces")
    kind = value["kind"]
    if kind == "Box":
        shape, dtype = _shape(value["shape"]), _dtype(value["dtype"])
        low, high = (np.broadcast_to(np.asarray(value[key], dtype=dtype), shape).copy() for key in ("low", "high"))
        return spaces.Box(low, high, shape, dtype=dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(int(value["n"]), start=int(value["start"]), dtype=_dtype(value["dtype"]).type)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(value["nvec"], dtype=_dtype(value["dtype"]).type, start=value["start"])
    if kind == "MultiBinary":
        shape = _shape(value["shape"])
        return spaces.MultiBinary(shape[0] if value["flat"] else shape)
    if kind == "Dict":
        # Ordered, or gymnasium sorts the keys, and a policy takes them in in another order.
        return spaces.Dict(OrderedDict((str(key), _decode(inner, depth + 1)) for key, inner in value["spaces"]))
    if kind == "Tuple":
        return spaces.Tuple([_decode(inner, depth + 1) for inner in value["spaces"]])
    if kind == "OneOf":
        return spaces.OneOf([_decode(inner, depth + 1) for inner in value["spaces"]])
    if kind == "Text":
        lengths = {key: int(value[key]) for key in ("min_length", "max_length")}
        return spaces.Text(**lengths, charset=str(value["charset"]))
    if kind == "Sequence":
        return spaces.Sequence(_decode(value["space"], depth + 1), stack=bool(value["stack"]))
    if kind == "Graph":
        nodes, edges = value["nodes"], value["edges"]
        inner: Any = [None if part is None else _decode(part, depth + 1) for part in (nodes, edges)]
        return spaces.Graph(*inner)
    raise ValueError(f"its spaces are of the unknown kind {str(kind)[:40]!r}")


def _shortened(bound: Any) -> Any:
    """Return an image's bound as the one number that it consists of."""
    first = bound.reshape(-1)[:1]
    return first.reshape(()) if bound.size > 1 and bool((bound == first).all()) else bound


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(int(length) for length in value)
    if any(length < 0 for length in shape) or len(shape) > 8 or math.prod(shape) > _MOST_VALUES:
        raise ValueError(f"its spaces have the impossible shape {shape}")
    return shape


def _dtype(value: Any) -> np.dtype[Any]:
    dtype = dtype_of(str(value))
    if dtype.kind not in _KINDS:
        raise ValueError(f"its spaces hold {dtype}")
    return dtype
