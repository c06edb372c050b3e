import hashlib
import io
import itertools
import os
import random
from pathlib import Path

import pytest

from sb3_mlflow_ckpt import atomic, json_lines


def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    atomic.write_bytes(path, b"old")
    with pytest.raises(ValueError, match="broken"), atomic.staged(path) as (file, _):
        file.write(b"half")
        raise ValueError("broken")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    json_lines.append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "tor')
    assert json_lines.read_lines(path)[0] == [{"n": 1}]
    json_lines.append_line(path, {"n": 3})
    assert [row["n"] for row in json_lines.read_lines(path)[0]] == [1, 3]


def test_reading_goes_on_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    json_lines.append_line(path, {"n": 1})
    _, offset = json_lines.read_lines(path)
    json_lines.append_line(path, {"n": 2})
    assert json_lines.read_lines(path, offset)[0] == [{"n": 2}]
    assert json_lines.read_lines(tmp_path / "missing") == ([], 0)


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.dump_json({"x": float("nan")})


@pytest.mark.parametrize("sizes", [[], [1], [3, 70_000, 5], [9 << 20, 10], [100_000] * 100, [1 << 22, 1 << 22]])
def test_a_hashed_file_is_what_was_written_and_given_to_the_disk_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    given: list[tuple[int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        # A buffer of Python's own may hold the last bytes of small pieces.
        assert os.fstat(descriptor).st_size >= offset + length - io.DEFAULT_BUFFER_SIZE
        given.append((offset, length))
        raise OSError("a file system that does not know it")

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    content = random.Random(0).randbytes(sum(sizes))
    with open(tmp_path / "file", "wb") as file:
        hashed, at = atomic.HashedFile(file), 0
        for size in sizes:
            for piece in atomic.slices(memoryview(content)[at : at + size]):
                hashed.write(piece)
            at += size
        hashed.flush()
    assert (tmp_path / "file").read_bytes() == content
    assert (hashed.bytes, hashed.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    starts = list(itertools.accumulate((length for _, length in given), initial=0))
    assert [offset for offset, _ in given] == starts[:-1]
    assert len(content) - starts[-1] < 1 << 22
