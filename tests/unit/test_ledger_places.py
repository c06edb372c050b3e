"""What a ledger keeps of each checkpoint's place is what all of its lines say, whatever their order."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from journals import mirror, save, start_run, unmirror

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.ledger import CheckpointLedger

EPISODES = st.integers(0, 5)
EVENTS = st.one_of(
    st.builds(lambda e, s: {"event": "saved", "episode": e, "sha256": s}, EPISODES, st.sampled_from("ab")),
    st.builds(
        lambda e, s: {"event": "mirrored", "episode": e, "uri": f"runs:/1/{e}", "sha256": s},
        EPISODES,
        st.sampled_from("ab"),
    ),
    st.builds(lambda e, s: {"event": "unmirrored", "episode": e, "sha256": s}, EPISODES, st.sampled_from("ab")),
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


def test_a_removal_from_the_mirror_counts_for_the_content_that_was_removed_alone(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run")
    save(journal, 10)
    mirror(journal, 10, "runs:/1/10")
    removed = journal.ledger.saved[10]["sha256"]
    # While the mirror removes the copy of it, the episode is saved again.
    save(journal, 10, b"new content")
    journal.add_unmirrored(10, removed)
    assert journal.waiting_for_mirror() == {10}
    journal.close()
    again = RunJournal(journal.folder)
    assert again.waiting_for_mirror() == {10}
    mirror(again, 10, "runs:/1/10")
    unmirror(again, 10)
    assert (again.waiting_for_mirror(), again.ledger.retired) == (set(), {10})
    again.close()


def test_a_removal_that_does_not_say_of_what_is_read_as_it_was() -> None:
    ledger = CheckpointLedger()
    ledger.apply({"event": "saved", "episode": 10, "sha256": "a"})
    ledger.apply({"event": "unmirrored", "episode": 10, "time": "2026-01-01T00:00:00.000Z"})
    assert (ledger.waiting, ledger.retired) == (set(), {10})
