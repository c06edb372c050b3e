"""The short form of the matrix: every row is killed at random instants and must end as if it had not been."""

from __future__ import annotations

import multiprocessing

import pytest
from matrix import Matrix
from rows import ROWS

_KILLS = 2


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("NOT TESTED: this system starts no processes by forkserver")
    return Matrix(_KILLS)


@pytest.mark.parametrize("name", ROWS)
def test_a_killed_training_ends_with_the_bytes_of_an_uninterrupted_one(matrix: Matrix, name: str) -> None:
    outcome = matrix.outcome(name, ROWS[name])
    assert (outcome.differs, outcome.inexact) == ([], [])
