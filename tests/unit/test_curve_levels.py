"""Which points of a curve stand for all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sb3_mlflow_ckpt.json_lines import read_line_at
from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.curve import HIGHEST_LEVEL, level_of, lowest_level, read_curve, read_points


@given(start=st.integers(1, 10**12), length=st.integers(1, 5000))
def test_a_level_is_the_greatest_power_of_two_of_which_the_line_holds_a_multiple(start: int, length: int) -> None:
    level = level_of(start, start + length)
    assert -(-start // 2**level) * 2**level < start + length
    assert -(-start // 2 ** (level + 1)) * 2 ** (level + 1) >= start + length
    assert level_of(0, length) == HIGHEST_LEVEL


@given(size=st.integers(0, 10**12), points=st.integers(1, 5000))
def test_the_lowest_level_leaves_no_more_than_twice_what_is_wanted(size: int, points: int) -> None:
    level = lowest_level(size, points)
    assert size >> level <= 2 * points
    assert level == 0 or size >> (level - 1) >= 2 * points


@given(
    lines=st.lists(
        st.sampled_from(
            [
                b"\n",
                b"no json\n",
                b"[]\n",
                b'{"a": 1}\n',
                b'{"time": "t", "num_timesteps": 5}\n',
                b'{"pad": "' + b"x" * 5000 + b'"}\n',
            ]
        ),
        max_size=30,
    ),
    torn=st.sampled_from([b"", b'{"time"', b"x" * 3000]),
)
def test_the_line_at_every_byte_is_found(tmp_path_factory: object, lines: list[bytes], torn: bytes) -> None:
    content = b"".join(lines) + torn
    path = Path(tmp_path_factory.getbasetemp()) / "lines"  # type: ignore[attr-defined]
    path.write_bytes(content)
    with path.open("rb") as file:
        for offset in range(0, len(content), 37):
            row, start, end = read_line_at(file, offset)
            expected = content[content.rfind(b"\n", 0, offset) + 1 : end]
            assert start <= offset < end
            assert content[start:end] == expected
            assert expected.endswith(b"\n") or end == len(content)
            try:
                whole = json.loads(expected) if expected.endswith(b"\n") else None
            except ValueError:
                whole = None
            assert row == (whole if isinstance(whole, dict) else None)


def test_few_points_of_a_long_curve_are_found_without_reading_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "agent", "run")
    folder.path.mkdir(parents=True)
    with folder.metrics.open("w") as file:
        for step in range(100_000):
            file.write(json.dumps({"time": f"{step:09d}", "num_timesteps": step, "x": "y" * (step % 60)}) + "\n")
    few = read_curve(folder, 500)
    assert 250 <= len(few) <= 500
    assert (few[0]["num_timesteps"], few[-1]["num_timesteps"]) == (0, 99_999)
    gaps = [two["num_timesteps"] - one["num_timesteps"] for one, two in itertools.pairwise(few[:-1])]
    assert max(gaps) <= 3 * min(gaps)
    chosen = {point["num_timesteps"] for point in few}
    levels = {placed.point["num_timesteps"]: placed.level for placed in read_points(folder.metrics)[0]}
    lowest = min(levels[step] for step in chosen - {99_999})
    assert {step for step, level in levels.items() if level >= lowest} | {99_999} == chosen
