"""Links that somebody planted in a run folder: nothing outside of it is written, truncated, removed or uploaded."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import journals
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from processes import trainer

from sb3_mlflow_ckpt import atomic, json_lines, prune_checkpoints
from sb3_mlflow_ckpt.checkpoints import list_checkpoints
from sb3_mlflow_ckpt.cli import main
from sb3_mlflow_ckpt.config import Layer, build_config
from sb3_mlflow_ckpt.errors import CheckpointError, ForeignFileError
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.sync import MirrorAddresses, sync_runs
from sb3_mlflow_ckpt.trainer import train
from sb3_mlflow_ckpt.verification import verify_checkpoint

FLAGS = ("--mlflow", "false", "--total-timesteps", 200, "--checkpoint-interval-episodes", 2, "--hyperparameters", "n_steps=32")
NAMES = ["run.json", "metrics.jsonl", "checkpoints.jsonl", ".lock", "ep000002.zip", "ep000002_metadata.json"]
OUTSIDE = b'{"event": "saved", "episode": 1}\nnobody touches this'


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "file"
    path.parent.mkdir()
    path.write_bytes(OUTSIDE)
    return path


def _planted(tmp_path: Path, name: str, target: Path) -> Path:
    folder = tmp_path / "checkpoints" / "ppo_agent" / "mine"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(target)
    return folder


def _train(tmp_path: Path, **settings: object) -> None:
    small = {"mlflow": False, "total_timesteps": 200, "checkpoint_interval_episodes": 2, "run_id": "mine"}
    where = {"checkpoint_dir": str(tmp_path / "checkpoints"), "agent_id": "ppo_agent", "heartbeat_seconds": 3600}
    defaults = {"hyperparameters": {"n_steps": 32}}
    train(build_config([Layer("the test", {**defaults, **small, **where, **settings})]))


@pytest.mark.parametrize("name", NAMES)
def test_a_training_writes_to_nothing_that_a_link_in_its_folder_points_to(
    tmp_path: Path, outside: Path, name: str
) -> None:
    folder = _planted(tmp_path, name, outside)
    if name.startswith("ep"):
        _train(tmp_path)
        # What belongs there took the place of the link.
        assert not (folder / name).is_symlink()
    else:
        with pytest.raises(CheckpointError, match=re.escape(str(folder / name))):
            _train(tmp_path)
    assert outside.read_bytes() == OUTSIDE
    assert [*outside.parent.iterdir()] == [outside]


def test_a_link_in_the_place_of_the_lock_is_one_line_of_the_command(tmp_path: Path, outside: Path) -> None:
    _planted(tmp_path, ".lock", outside)
    done = trainer(*FLAGS, "--run-id", "mine", cwd=tmp_path)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("OSError: checkpoints/ppo_agent/mine/.lock is not a file of its own")
    assert outside.read_bytes() == OUTSIDE


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints.jsonl", ".lock"])
def test_a_training_makes_no_file_where_a_link_points_to_nothing(tmp_path: Path, name: str) -> None:
    _planted(tmp_path, name, tmp_path / "not there")
    with pytest.raises(CheckpointError):
        _train(tmp_path)
    assert not (tmp_path / "not there").exists()


def test_chunks_of_a_replay_buffer_are_neither_written_nor_swept_behind_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    chunk = elsewhere / "000000000000-000000000004-0123abcd.zst"
    chunk.write_bytes(b"another's")
    folder = _planted(tmp_path, "replay", elsewhere)
    with pytest.raises(CheckpointError, match=re.escape(str(folder / "replay"))):
        _train(tmp_path, algo="dqn", hyperparameters={"learning_starts": 50, "buffer_size": 1000})
    prune_checkpoints(tmp_path / "checkpoints", keep_last_n=1)
    assert [*elsewhere.iterdir()] == [chunk] and chunk.read_bytes() == b"another's"


@pytest.mark.parametrize("name", NAMES)
def test_prune_verify_and_sync_touch_nothing_outside(tmp_path: Path, outside: Path, name: str) -> None:
    checkpoint_dir = tmp_path / "checkpoints"
    journal = journals.start_run(checkpoint_dir, "mine", mirrors=["MLflow"])
    for episode in (1, 2, 3, 4):
        journals.save(journal, episode)
    journal.close()
    path = journal.folder.path / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for words in (["verify"], ["list", "--json"], ["prune", "--keep-last-n", "1"], ["sync", "--tracking-uri", uri]):
        done = CliRunner().invoke(main, ["checkpoints", *words, "--checkpoint-dir", str(checkpoint_dir)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert outside.read_bytes() == OUTSIDE and [*outside.parent.iterdir()] == [outside]
    for file in tmp_path.rglob("*"):
        if file.is_file() and not file.is_symlink() and file != outside and file.name != "mlflow.db":
            assert b"nobody touches this" not in file.read_bytes(), file


def test_a_link_in_the_place_of_a_checkpoint_is_not_uploaded(tmp_path: Path, outside: Path) -> None:
    journal = journals.start_run(tmp_path / "checkpoints", "mine", mirrors=["MLflow"])
    for episode in (1, 2):
        journals.save(journal, episode)
    journal.close()
    model = journal.folder.model(1)
    model.unlink()
    model.symlink_to(outside)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment)
    journal = journals.start_run(tmp_path / "checkpoints", "mine", mirrors=["MLflow"], mlflow={"tracking_uri": uri, "run_id": run.info.run_id})  # fmt: skip
    journal.close()
    sync_runs(tmp_path / "checkpoints", MirrorAddresses(uri))
    uploaded = [path for path in tmp_path.rglob("ep00000*.zip") if "checkpoints/ppo_agent" not in str(path)]
    assert [path.name for path in uploaded] == ["ep000002.zip"]


def test_a_folder_of_agents_or_of_all_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "checkpoints").symlink_to("big disk")
    (tmp_path / "fast disk").mkdir()
    (tmp_path / "big disk" / "ppo_agent").symlink_to(tmp_path / "fast disk")
    _train(tmp_path)
    paths = list_checkpoints(tmp_path / "checkpoints")
    assert paths
    for path in paths:
        verify_checkpoint(path)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_permissions_follow_the_umask_and_nothing_is_writable_by_everybody(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        _train(tmp_path, algo="dqn", hyperparameters={"learning_starts": 50, "buffer_size": 1000})
    finally:
        os.umask(before)
    found = list((tmp_path / "checkpoints").rglob("*"))
    assert {".zip", ".json", ".jsonl", ".zst"} <= {path.suffix for path in found}
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & mask == 0 and mode & 0o002 == 0, (path, oct(mode))
        if path.is_file() and path.name != ".lock":
            assert mode == 0o666 & ~mask, (path, oct(mode))


def test_a_temporary_has_the_permissions_of_what_it_becomes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic.staged(tmp_path / "x") as (_, temporary):
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_link_a_folder_and_a_pipe_are_no_files_of_a_run(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        for use in (json_lines.read_lines, atomic.read_bytes):
            with pytest.raises(ForeignFileError, match="not followed"):
                use(tmp_path / name)
        with pytest.raises(OSError, match=name):
            json_lines.append_line(tmp_path / name, {})
        assert not atomic.is_own_file(tmp_path / name)
    assert outside.read_bytes() == OUTSIDE


def test_lines_without_end_are_passed_over_within_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(b'{"n": 1}\n')
        for _ in range(8):
            file.write(b"x" * atomic.LARGEST_DOCUMENT)
        file.write(b'\n{"n": 2}\n\0\0\n\xff\n{"n": NaN}\n{"n": 3}\n{"n": 4')
    tracemalloc.start()
    rows, end = json_lines.read_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["n"] for row in rows] == [1, 2, 3]
    assert end == path.stat().st_size - len(b'{"n": 4')
    assert peak < 4 * atomic.LARGEST_DOCUMENT  # The file is eight times as long.
    assert RunFolder(tmp_path, "a", "b").path.parent == tmp_path / "a"
