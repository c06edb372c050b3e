import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.errors import InvalidIdError
from sb3_mlflow_ckpt.layout import (
    RunFolder,
    check_id,
    id_spellings,
    metadata_episode,
    metadata_path,
    model_episode,
    model_path,
)


@pytest.mark.parametrize(
    "bad",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "a\0b", "a\nb", "-rf", " a", "a ", "a.", "CON", "nul.txt", "a:b"],
)
def test_an_id_that_could_leave_its_folder_is_refused(bad: str) -> None:
    with pytest.raises(InvalidIdError):
        RunFolder(Path("checkpoints"), "agent", bad)
    with pytest.raises(InvalidIdError):
        RunFolder(Path("checkpoints"), bad, "run")


def test_an_id_longer_than_a_file_name_is_refused() -> None:
    with pytest.raises(InvalidIdError, match="longer than 200 bytes"):
        check_id("ü" * 101, "run_id")


@pytest.mark.parametrize(
    "good", ["ppo_agent", "run123", "550e8400-e29b-41d4-a716-446655440000", "a b", "größe", "v1.2"]
)
def test_an_ordinary_id_is_taken_as_it_is(good: str) -> None:
    assert check_id(good, "run_id") == good


@given(st.text(max_size=30))
def test_any_text_either_names_a_direct_child_or_is_refused(text: str) -> None:
    try:
        folder = RunFolder(Path("/base"), "agent", text)
    except InvalidIdError:
        return
    assert folder.path.parent == Path("/base/agent")
    assert folder.path.name == text


@pytest.mark.parametrize(("episode", "name"), [(0, "ep000000.zip"), (50, "ep000050.zip"), (1_234_567, "ep1234567.zip")])
def test_episodes_widen_beyond_six_digits(episode: int, name: str) -> None:
    folder = RunFolder(Path("c"), "a", "r")
    assert folder.model(episode).name == name
    assert model_episode(name) == episode
    assert metadata_episode(folder.metadata(episode).name) == episode
    assert metadata_path(folder.model(episode)) == folder.metadata(episode)
    assert model_path(folder.metadata(episode)) == folder.model(episode)


@pytest.mark.parametrize(
    "name", ["ep50.zip", "xep000050.zip", "ep000050.zip.part", ".tmp-1-ab-ep000050.zip", "ep00005a.zip"]
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert model_episode(name) is None


def test_a_uuid_is_spelled_with_and_without_dashes() -> None:
    run = uuid.uuid4()
    assert set(id_spellings(str(run))) == set(id_spellings(run.hex)) == {str(run), run.hex}
    assert id_spellings("run123") == ("run123",)
