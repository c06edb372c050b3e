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
