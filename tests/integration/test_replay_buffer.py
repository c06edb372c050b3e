"""Replay buffers in checkpoints: only new rows are written, and every checkpoint gives back all of its own."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_buffers import KINDS, Filled, content, run_folder

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.state.replay import buffer as replay_buffer
from sb3_mlflow_ckpt.state.replay.buffer import ReplayRecorder, restore_replay


def _restored(kind: str, filled: Filled, state: dict[str, Any], folder: RunFolder) -> Filled:
    other = Filled(kind, filled.buffer.buffer_size, filled.buffer.n_envs, seed=99)
    assert restore_replay(other.model, state, lambda name: folder.chunk(name).open("rb")) == []
    return other


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_gives_back_its_rows_whatever_came_later(kind: str, n_envs: int, tmp_path: Path) -> None:
    filled, folder, rng = Filled(kind, 40, n_envs), run_folder(tmp_path), np.random.default_rng(1)
    recorder, saved = ReplayRecorder(filled.model), []
    for _ in range(170):
        filled.step(recorder)
        if rng.random() < 0.15:
            capture = recorder.capture()
            assert capture is not None
            expected = content(filled.buffer)
            capture.write(folder)
            saved.append((capture.state, expected))
    assert len(saved) > 10
    for state, expected in saved:
        assert content(_restored(kind, filled, state, folder).buffer) == expected


def test_a_buffer_goes_on_alike_after_its_restore(tmp_path: Path) -> None:
    filled, folder = Filled("her", 40, 2), run_folder(tmp_path)
    for _ in range(77):
        filled.step()
    capture = ReplayRecorder(filled.model).capture()
    assert capture is not None
    capture.write(folder)
    other = _restored("her", filled, capture.state, folder)
    other.rng, other.last = np.random.default_rng(5), filled.last
    filled.rng = np.random.default_rng(5)
    for _ in range(100):
        filled.step()
        other.step()
        assert content(other.buffer) == content(filled.buffer)


def test_rows_are_read_while_training_goes_on_and_it_waits_before_it_overwrites_them(tmp_path: Path) -> None:
    filled, folder = Filled("optimized", 60, 2), run_folder(tmp_path)
    recorder, saved, queue = ReplayRecorder(filled.model), [], []
    ended = threading.Event()

    def work() -> None:
        while not (ended.is_set() and not queue):
            if queue:
                time.sleep(0.02)
                queue.pop(0).write(folder)
            else:
                time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    for step in range(600):
        filled.step(recorder)
        if step % 17 == 0:
            capture = recorder.capture()
            assert capture is not None
            saved.append((capture, content(filled.buffer)))
            queue.append(capture)
    ended.set()
    thread.join()
    assert recorder.waited_seconds > 0
    for capture, expected in saved:
        assert content(_restored("optimized", filled, capture.state, folder).buffer) == expected


def test_a_capture_that_nobody_holds_does_not_hold_training_up(tmp_path: Path) -> None:
    filled = Filled("vector", 20)
    recorder = ReplayRecorder(filled.model)
    for _ in range(100):
        filled.step(recorder)
        recorder.capture()
    assert recorder.waited_seconds < 1


@pytest.mark.parametrize("rows", [5000, 400])
def test_the_number_of_chunks_grows_with_the_logarithm(rows: int, tmp_path: Path) -> None:
    filled, folder = Filled("vector", rows), run_folder(tmp_path)
    recorder, most = ReplayRecorder(filled.model), 0
    for _ in range(3000):
        filled.step(recorder)
        capture = recorder.capture()
        assert capture is not None
        most = max(most, len(capture.write(folder)))
        for path in {*folder.replay.iterdir()} - {folder.chunk(c["name"]) for c in capture.state["chunks"]}:
            path.unlink()
    assert most <= 80
    assert content(_restored("vector", filled, capture.state, folder).buffer) == content(filled.buffer)


def test_a_row_is_written_few_times(tmp_path: Path) -> None:
    filled, folder = Filled("vector", 5000), run_folder(tmp_path)
    recorder, seen, rows = ReplayRecorder(filled.model), set(), 0
    for _ in range(2000):
        filled.step(recorder)
        capture = recorder.capture()
        assert capture is not None
        capture.write(folder)
        for chunk in capture.state["chunks"]:
            rows += (chunk["end"] - chunk["start"]) * (chunk["name"] not in seen)
            seen.add(chunk["name"])
    assert rows <= 4 * 2000


def test_no_chunk_is_larger_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_buffer, "LARGEST_CHUNK", 100 * 40)
    filled, folder = Filled("vector", 3000), run_folder(tmp_path)
    recorder = ReplayRecorder(filled.model)
    for step in range(5000):
        filled.step(recorder)
        if step % 7 == 1:
            capture = recorder.capture()
            assert capture is not None
            capture.write(folder)
    lengths = [chunk["end"] - chunk["start"] for chunk in capture.state["chunks"]]
    assert max(lengths) <= 100
    assert len(lengths) <= 2 * 3000 / 100 + 40
    assert content(_restored("vector", filled, capture.state, folder).buffer) == content(_snapshot(filled, capture))


def _snapshot(filled: Filled, capture: Any) -> Any:
    assert capture.clock == 5000 - (4999 % 7) or capture.clock <= 5000
    if capture.clock != filled.model.num_timesteps:
        pytest.fail("the last step must be a capture's: choose the interval so")
    return filled.buffer


def test_what_a_failed_write_left_out_is_written_by_the_next(tmp_path: Path) -> None:
    filled, folder = Filled("image", 60), run_folder(tmp_path / "disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT TESTED: a file system of its own can only be mounted by root")
    try:
        recorder = ReplayRecorder(filled.model)
        for step in range(150):
            filled.step(recorder)
            if step == 70:
                with pytest.raises(OSError, match="No space left"), open(disk / "filler", "wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 4096)
            if step == 110:
                (disk / "filler").unlink()
                subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            if step % 20 == 19:
                capture = recorder.capture()
                assert capture is not None
                if 70 <= step < 110:
                    with pytest.raises(OSError, match="No space left"):
                        capture.write(folder)
                    continue
                capture.write(folder)
                restored = _restored("image", filled, capture.state, folder)
                assert content(restored.buffer) == content(filled.buffer)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_chunks_that_somebody_removed_are_written_again_where_the_rows_are_still_there(tmp_path: Path) -> None:
    filled, folder = Filled("vector", 50), run_folder(tmp_path)
    recorder = ReplayRecorder(filled.model)
    for _ in range(30):
        filled.step(recorder)
    first = recorder.capture()
    assert first is not None
    first.write(folder)
    shutil.rmtree(folder.path)
    filled.step(recorder)
    second = recorder.capture()
    assert second is not None
    second.write(folder)
    assert content(_restored("vector", filled, second.state, folder).buffer) == content(filled.buffer)


def test_a_resumed_run_takes_over_the_chunks_of_its_parent_and_leaves_them_alone(tmp_path: Path) -> None:
    filled, parent, child = Filled("image", 50), run_folder(tmp_path, "parent"), run_folder(tmp_path, "child")
    recorder = ReplayRecorder(filled.model)
    for step in range(120):
        filled.step(recorder)
        if step % 10 == 9:
            capture = recorder.capture()
            assert capture is not None
            capture.write(parent)
    before = {path.name: path.read_bytes() for path in parent.replay.iterdir()}
    other = _restored("image", filled, capture.state, parent)
    other.model.num_timesteps = filled.model.num_timesteps
    resumed = ReplayRecorder(other.model)
    resumed.continue_from(capture.state, parent.path)
    for _ in range(5):
        other.step(resumed)
    continued = resumed.capture()
    assert continued is not None
    entries = continued.write(child)
    shared = {entry.name.partition("/")[2] for entry in entries} & set(before)
    assert len(shared) >= 4
    assert all(child.chunk(name).samefile(parent.chunk(name)) for name in shared)
    assert {path.name: path.read_bytes() for path in parent.replay.iterdir()} == before
    assert content(_restored("image", other, continued.state, child).buffer) == content(other.buffer)


def test_a_buffer_of_another_size_or_space_is_refused_and_stays_empty(tmp_path: Path) -> None:
    filled, folder = Filled("vector", 40), run_folder(tmp_path)
    filled.step()
    capture = ReplayRecorder(filled.model).capture()
    assert capture is not None
    capture.write(folder)
    for other, message in (
        (Filled("vector", 41), "saved buffer_size 40, this buffer's 41"),
        (Filled("vector", 40, 2), "saved n_envs 1, this buffer's 2"),
        (Filled("image", 40), r"saved observations <f4 \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            restore_replay(other.model, capture.state, lambda name: folder.chunk(name).open("rb"))
        assert other.buffer.size() == 0


def test_names_of_chunks_cannot_leave_the_folder(tmp_path: Path) -> None:
    filled, folder = Filled("vector", 40), run_folder(tmp_path)
    filled.step()
    capture = ReplayRecorder(filled.model).capture()
    assert capture is not None
    capture.write(folder)
    opened: list[str] = []
    for name in ("../../etc/passwd", "/etc/passwd", "", "000000000000-000000000001-0000000g.zst"):
        chunks = [{**capture.state["chunks"][0], "name": name}]
        with pytest.raises(ValueError, match="cannot be one of its own"):
            restore_replay(filled.model, {**capture.state, "chunks": chunks}, lambda name: opened.append(name))  # type: ignore[arg-type,return-value]
    assert opened == []


def test_another_class_of_buffer_is_not_captured_and_says_why() -> None:
    filled = Filled("vector")

    class Own(type(filled.buffer)):  # type: ignore[misc]
        pass

    filled.buffer.__class__ = Own
    recorder = ReplayRecorder(filled.model)
    assert recorder.capture() is None
    assert "Own" in recorder.reason
    assert recorder.protect() == 0
