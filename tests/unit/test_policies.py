import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.policies import EveryNEpisodes, MirrorBacklog, Retention, SavedCheckpoint


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


def saved(*episodes: int) -> list[SavedCheckpoint]:
    return [SavedCheckpoint(episode) for episode in episodes]


@pytest.mark.parametrize(
    ("n", "protected", "removed"),
    [(2, (), [10, 20]), (0, (), []), (10, (), []), (2, (10,), [20]), (1, (30, 40), [10, 20])],
)
def test_the_newest_n_and_the_protected_stay(n: int, protected: tuple[int, ...], removed: list[int]) -> None:
    assert Retention(n).removable(saved(10, 20, 30, 40), {"pinned": protected}) == removed


def test_what_was_committed_last_stays_whatever_its_number() -> None:
    """A run that goes back to an older checkpoint commits lower numbers after higher ones."""
    assert Retention(2).removable(saved(80, 90, 93, 10, 20)) == [80, 90, 93]


def test_each_checkpoint_that_stays_has_its_reasons() -> None:
    rewards = [SavedCheckpoint(50, 9.0), SavedCheckpoint(100, 1.0), SavedCheckpoint(150, 2.0), SavedCheckpoint(200, 3.0)]
    reasons = Retention(1, best_n=1, every_n_episodes=100).reasons(rewards, {"pinned": {50, 200}})
    assert reasons == {50: ("pinned", "best"), 100: ("milestone",), 150: (), 200: ("pinned", "last", "milestone")}


def test_what_is_no_number_is_never_the_best_and_of_equals_the_newer_stays() -> None:
    rewards = [SavedCheckpoint(e, r) for e, r in ((1, math.nan), (2, 5.0), (3, None), (4, 5.0), (5, math.nan))]
    assert Retention(1, best_n=1).removable([*rewards, SavedCheckpoint(6, None)]) == [1, 2, 3, 5]


_REWARD = st.none() | st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf, 1.0])
_HISTORY = st.lists(st.tuples(st.integers(0, 400), _REWARD), min_size=1, max_size=60, unique_by=lambda item: item[0])
_RETENTION = st.builds(Retention, st.integers(1, 5), st.integers(0, 4), st.sampled_from([0, 1, 7, 50]))


@given(_RETENTION, _HISTORY, st.sets(st.integers(0, 400)))
def test_retention_keeps_what_it_promises_and_nothing_else(retention, history, protected) -> None:
    items = [SavedCheckpoint(*item) for item in history]
    removed = retention.removable(items, {"pinned": protected})
    kept = [item for item in items if item.episode not in removed]
    assert {item.episode for item in items[-retention.last_n :]} <= {item.episode for item in kept}
    assert not protected & set(removed)
    numbers = [(i.mean_reward, n) for n, i in enumerate(items) if i.mean_reward is not None and i.mean_reward == i.mean_reward]
    best = sorted(numbers)[-retention.best_n :] if retention.best_n else []
    assert {items[n].episode for _, n in best} <= {item.episode for item in kept}
    size = retention.every_n_episodes
    crossed = {item.episode // size for item in items} - {0} if size else set()
    assert crossed <= {item.episode // size for item in kept} if size else True
    bound = retention.last_n + retention.best_n + len(crossed) + len(protected & {i.episode for i in items})
    assert len(kept) <= bound


@given(_RETENTION, _HISTORY)
def test_pruning_after_every_commit_comes_to_the_same_as_pruning_once(retention, history) -> None:
    """What was the best when it was committed must not have gone before it is compared with the rest."""
    ordered = [SavedCheckpoint(*item) for item in sorted(history, key=lambda item: item[0])]
    there: list[SavedCheckpoint] = []
    for item in ordered:
        there.append(item)
        removed = retention.removable(there)
        there = [one for one in there if one.episode not in removed]
    once = retention.removable(ordered)
    assert [item.episode for item in there] == [item.episode for item in ordered if item.episode not in once]


def test_a_backlog_beyond_its_limit_gives_up_the_oldest() -> None:
    assert MirrorBacklog(2).split([1, 2, 3, 4]) == ({3, 4}, {1, 2})
    assert MirrorBacklog(2).split([]) == (set(), set())
    # A run that went back to an older checkpoint: what was committed last is what is protected.
    assert MirrorBacklog(2).split([300, 400, 110, 120]) == ({110, 120}, {300, 400})
