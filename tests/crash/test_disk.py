"""A full and a read-only disk: a clear error with the remedies, and what was saved before stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import trainer

from sb3_mlflow_ckpt.checkpoints import list_checkpoints, verify_checkpoint
from sb3_mlflow_ckpt.runs.folder import FolderRuns

_KIBIBYTES = 600  # A checkpoint of the default policy has 150.
_FLAGS = (
    *("--mlflow", "false", "--checkpoint-interval-episodes", 5, "--keep-last-n-checkpoints", 0),
    *("--total-timesteps", 2000, "--hyperparameters", "n_steps=128"),
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_KIBIBYTES}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT TESTED: a file system of its own can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_training_with_the_remedies_and_leaves_earlier_checkpoints(
    tmp_path: Path, small_disk: Path
) -> None:
    done = trainer(*_FLAGS, "--checkpoint-dir", small_disk, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("OSError: Checkpoint saving failed")]
    assert "No space left on device" in line
    for remedy in ("keep_last_n_checkpoints", "checkpoint_interval_episodes", "clean up", "different checkpoint_dir"):
        assert remedy in line
    paths = list_checkpoints(small_disk)
    assert paths
    for path in paths:
        verify_checkpoint(path)
    assert not [path for path in paths[0].parent.iterdir() if path.name.startswith(".tmp-ep")]


def test_training_goes_on_without_checkpoints_only_if_the_user_said_so(tmp_path: Path, small_disk: Path) -> None:
    done = trainer(*_FLAGS, "--checkpoint-dir", small_disk, "--on-save-failure", "continue", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "training goes on" in done.stderr
    assert "Trained 2048 timesteps" in done.stdout
    for path in list_checkpoints(small_disk):
        verify_checkpoint(path)


def test_a_read_only_folder_is_a_clear_error_before_any_training(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = trainer(*_FLAGS, "--checkpoint-dir", small_disk, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{small_disk}" in done.stderr.splitlines()[-1]
    assert "Read-only file system" in done.stderr.splitlines()[-1]
    assert not FolderRuns(small_disk).list()
