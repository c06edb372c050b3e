"""What a crash or a refusing disk leaves between the steps of a commit, a removal and their lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from journals import commit, save, start_run

from sb3_mlflow_ckpt import atomic, json_lines
from sb3_mlflow_ckpt.checkpoints import list_checkpoints
from sb3_mlflow_ckpt.commit import remove_checkpoint
from sb3_mlflow_ckpt.dead_writers import sweep
from sb3_mlflow_ckpt.errors import RunFolderBusyError
from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.layout import RunFolder, temporary_target
from sb3_mlflow_ckpt.runs.folder import read_ledger


def test_an_episode_that_was_saved_again_before_its_line_was_written_waits_for_its_mirror_again(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run")
    save(journal, 1, b"old")
    journal.add_mirrored(1, "runs:/run/1", journal.ledger.saved[1]["sha256"])
    journal.close()
    newer = commit(journal.folder, 1, b"new")
    assert read_ledger(journal.folder).saved[1]["sha256"] == newer.files[0].sha256
    reopened = RunJournal(journal.folder)
    assert reopened.ledger.saved[1]["sha256"] == newer.files[0].sha256
    assert reopened.waiting_for_mirror() == {1}
    reopened.close()


def test_metadata_under_a_temporary_name_takes_its_zip_along_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "agent", "run")
    folder.path.mkdir(parents=True)
    for episode in (1, 2, 3):
        commit(folder, episode)
    # A removal that died half way; a replacement that died before its renames; a zip whose metadata somebody lost.
    folder.metadata(1).rename(atomic.temporary_sibling(folder.metadata(1)))
    atomic.temporary_sibling(folder.metadata(2)).write_bytes(folder.metadata(2).read_bytes())
    folder.metadata(3).unlink()
    sweep(folder)
    left = {path.name for path in folder.path.iterdir()} - {folder.saving.name}
    assert sorted(left) == ["ep000002.zip", "ep000002_metadata.json", "ep000003.zip"]


def test_a_removal_that_failed_is_finished_by_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "agent", "run")
    folder.path.mkdir(parents=True)
    commit(folder, 1)
    folder.metadata(1).unlink()
    remove_checkpoint(folder, 1)
    assert list(folder.path.iterdir()) == []


def test_a_temporary_tells_what_it_was_to_be() -> None:
    path = Path("ep000001_metadata.json")
    assert temporary_target(atomic.temporary_sibling(path).name) == path.name
    assert temporary_target(path.name) is None


@pytest.mark.parametrize("name", ["checkpoints.jsonl", "metrics.jsonl"])
def test_a_last_line_that_is_torn_at_any_byte_spoils_itself_alone(tmp_path: Path, name: str) -> None:
    journal = start_run(tmp_path, "run")
    for episode in (1, 2):
        save(journal, episode)
        journal.add_metrics({"num_timesteps": episode, "time": f"2026-01-01T00:00:0{episode}.000Z"})
    journal.close()
    path = journal.folder.path / name
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        reopened = RunJournal(journal.folder)
        assert set(reopened.ledger.saved) == {1, 2}
        reopened.add_metrics({"num_timesteps": 9, "time": "2026-01-01T00:00:09.000Z"})
        reopened.add_mirrored(1, "x", reopened.ledger.saved[1]["sha256"])
        reopened.close()
        rows, _ = json_lines.read_lines(path)
        if name == "metrics.jsonl":
            # Of a line that lacks its end alone nothing is lost.
            assert [row["num_timesteps"] for row in rows] == ([1, 2, 9] if end == len(whole) - 1 else [1, 9])
        else:
            facts = dict.fromkeys((row["event"], row["episode"]) for row in rows)
            assert [*facts] == [("saved", 1), ("saved", 2), ("mirrored", 1)]
        assert [checkpoint.name for checkpoint in list_checkpoints(tmp_path)] == ["ep000001.zip", "ep000002.zip"]


def test_a_second_journal_of_a_folder_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    journal = start_run(tmp_path, "run")
    with pytest.raises(RunFolderBusyError, match="Another training is writing"):
        RunJournal(journal.folder)
    journal.close()
    RunJournal(journal.folder).close()
