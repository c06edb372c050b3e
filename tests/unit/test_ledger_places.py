"""What a ledger keeps of each checkpoint's place is what all of its lines say, whatever their order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.ledger import CheckpointLedger

EPISODES = st.integers(0, 5)
EVENTS = st.one_of(
    st.builds(lambda e, s: {"event": "saved", "episode": e, "sha256": s}, EPISODES, st.sampled_from("ab")),
    st.builds(
        lambda e, s: {"event": "mirrored", "episode": e, "uri": f"runs:/1/{e}", "sha256": s},
        EPISODES,
        st.sampled_from("ab"),
    ),
    st.builds(lambda k, e: {"event": k, "episode": e}, st.sampled_from(["unmirrored", "missing", "pruned"]), EPISODES),
)


@given(st.lists(EVENTS, max_size=40))
def test_on_disk_and_waiting_are_what_the_facts_say(events: list[dict[str, object]]) -> None:
    ledger = CheckpointLedger()
    for event in events:
        ledger.apply(event)
    assert [*ledger.on_disk] == [episode for episode in ledger.saved if episode not in ledger.pruned]
    assert ledger.waiting == set(ledger.saved) - set(ledger.uris) - ledger.pruned - ledger.retired
    mirrored = [episode for episode in ledger.saved if episode in ledger.uris]
    assert ledger.newest_mirrored() == (mirrored[-1] if mirrored else None)
    again = CheckpointLedger()
    for event in ledger.events():
        again.apply(event)
    assert (again.on_disk, again.waiting) == (ledger.on_disk, ledger.waiting)


@given(st.lists(EVENTS, max_size=40))
def test_a_copy_of_the_disk_says_the_same_of_what_is_there(events: list[dict[str, object]]) -> None:
    ledger = CheckpointLedger()
    for event in events:
        ledger.apply(event)
    copy = ledger.copy_of(ledger.on_disk)
    assert copy.saved == {episode: ledger.saved[episode] for episode in ledger.on_disk}
    assert (copy.on_disk, copy.waiting, copy.pruned) == (ledger.on_disk, ledger.waiting, set())
    assert copy.waiting == set(copy.saved) - set(copy.uris) - copy.retired


def test_what_went_long_ago_is_not_in_the_copy_that_retention_looks_at() -> None:
    ledger = CheckpointLedger()
    for episode in range(1, 10_001):
        ledger.apply({"event": "saved", "episode": episode})
        if episode > 3:
            ledger.apply({"event": "pruned", "episode": episode - 3})
    copy = ledger.copy_of(ledger.on_disk)
    assert [*copy.saved] == [*copy.on_disk] == [9_998, 9_999, 10_000]


@given(st.lists(EVENTS, max_size=30), st.lists(EVENTS, max_size=30))
def test_what_changed_since_a_line_is_what_later_lines_told_of(
    before: list[dict[str, object]], after: list[dict[str, object]]
) -> None:
    ledger = CheckpointLedger()
    for event in before:
        ledger.apply(event)
    changed, line = ledger.changed_since(0)
    assert set(ledger.saved) <= changed
    assert ledger.changed_since(line) == (set(), line)
    told = {ledger.apply(event) for event in after} - {None}
    changed, last = ledger.changed_since(line)
    assert changed == told
    copy = ledger.copy_of(changed)
    assert [*copy.saved.items()] == [item for item in ledger.saved.items() if item[0] in changed]
    assert (copy.uris.items() <= ledger.uris.items(), last >= line) == (True, True)
