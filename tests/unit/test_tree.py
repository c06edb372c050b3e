"""The plain form of nested state."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from sb3_mlflow_ckpt import tree

_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    arrays_of.arrays(
        st.sampled_from(["<f4", "<f8", "<i8", "|u1", "|b1"]), arrays_of.array_shapes(min_dims=0, min_side=0),
        elements={"allow_nan": False},
    ),
)  # fmt: skip
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


def _through_a_file(value: Any) -> Any:
    document, arrays = tree.encode(value)
    content = b"".join(piece.tobytes() for piece in tree.pieces(arrays))
    return tree.decode(json.loads(json.dumps(document)), content)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return bool(isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and left == right


@given(_VALUES)
def test_what_is_written_comes_back_the_same(value: Any) -> None:
    assert _same(value, _through_a_file(value))


def test_states_of_random_generators_come_back_the_same() -> None:
    generator = np.random.default_rng(3)
    state = {"python": random.getstate(), "pcg": generator.bit_generator.state}
    assert _through_a_file(state) == state


def test_a_value_that_is_not_finite_comes_back() -> None:
    back = _through_a_file([math.inf, -math.inf, math.nan, np.float32("nan")])
    assert back[:2] == [math.inf, -math.inf]
    assert math.isnan(back[2]) and np.isnan(back[3])


def test_arrays_are_copies_that_can_be_written_to() -> None:
    back = _through_a_file({"a": np.arange(3), "b": np.arange(2)})
    back["a"][:] = 9
    assert back["b"].tolist() == [0, 1]


def test_a_tensor_comes_back_as_one() -> None:
    torch = pytest.importorskip("torch")
    value = torch.tensor([[1.5, 2.5]], dtype=torch.float64)
    assert torch.equal(_through_a_file([value])[0], value)


def test_a_deque_becomes_a_list() -> None:
    assert _through_a_file(deque([1, 2])) == [1, 2]


@pytest.mark.parametrize("value", [object(), {"a": [lambda: None]}, np.array([object()]), {1, 2}, 1j])
def test_what_has_no_plain_form_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(tree.NotPlainError, match="state"):
        tree.encode(value)


@pytest.mark.parametrize(
    "document",
    [
        {"$": "array", "dtype": "<f8", "shape": [2**40], "at": 0},
        {"$": "array", "dtype": "<f8", "shape": [2], "at": -8},
        {"$": "array", "dtype": "<f8", "shape": [-1], "at": 0},
        {"$": "array", "dtype": "|O", "shape": [1], "at": 0},
        {"$": "array", "dtype": "os.system", "shape": [1], "at": 0},
        {"$": "array"},
        {"$": "reduce", "dtype": "<f8", "shape": [], "at": 0},
        {"$": "scalar", "dtype": "<f8", "shape": [1], "at": 0},
        {"$": "map", "items": [[1]]},
    ],
)
def test_a_document_that_was_tampered_with_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="the state holds"):
        tree.decode(document, bytes(64))


def test_a_document_that_is_nested_without_end_is_refused() -> None:
    document: Any = []
    for _ in range(200):
        document = [document]
    with pytest.raises(ValueError, match="nested too deeply"):
        tree.decode(document)
