import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.policies import EveryNEpisodes, KeepLastN, MirrorBacklog


@given(st.integers(1, 60), st.lists(st.integers(0, 16), max_size=200))
def test_no_crossing_of_the_interval_is_missed(interval: int, ends: list[int]) -> None:
    """`episodes % N == 0` misses where several environments end in one step."""
    policy, count, labels = EveryNEpisodes(interval), 0, []
    for ended in ends:
        label = policy.due(count, count + ended)
        count += ended
        if label is not None:
            labels.append(label)
            assert label % interval == 0 and count - ended < label <= count
    assert len(labels) == len(set(labels))
    if count >= interval:
        assert labels[-1] == count // interval * interval


def test_an_interval_of_zero_is_never_due() -> None:
    assert EveryNEpisodes(0).due(0, 1000) is None


@pytest.mark.parametrize(
    ("n", "protected", "removed"),
    [(2, (), [10, 20]), (0, (), []), (10, (), []), (2, (10,), [20]), (1, (30, 40), [10, 20])],
)
def test_the_newest_n_and_the_protected_stay(n: int, protected: tuple[int, ...], removed: list[int]) -> None:
    assert KeepLastN(n).removable([10, 20, 30, 40], protected) == removed


def test_what_was_committed_last_stays_whatever_its_number() -> None:
    """A run that goes back to an older checkpoint commits lower numbers after higher ones."""
    assert KeepLastN(2).removable([80, 90, 93, 10, 20]) == [80, 90, 93]


@given(st.integers(1, 9), st.sets(st.integers(0, 99), min_size=1))
def test_the_newest_is_never_removed(n: int, episodes: set[int]) -> None:
    assert [*episodes][-1] not in KeepLastN(n).removable([*episodes])


def test_a_backlog_beyond_its_limit_gives_up_the_oldest() -> None:
    assert MirrorBacklog(2).split({1, 2, 3, 4}) == ({3, 4}, {1, 2})
