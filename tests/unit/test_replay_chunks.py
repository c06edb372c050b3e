"""The file of a chunk: exact, small where frames overlap, and harmless whoever wrote it."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.errors import CheckpointCorruptError
from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows, read_chunk, write_chunk
from sb3_mlflow_ckpt.state.replay.frame_streams import decode_sequence, encode_sequence

DTYPES = ["u1", "<f4", "<f8", "<i8", "?", "<c16", "<f2"]


def _dump(rows: ChunkRows) -> bytes:
    file = io.BytesIO()
    write_chunk(file, rows)
    return file.getvalue()


def _empty(rows: ChunkRows) -> ChunkRows:
    return ChunkRows(rows.start, {name: np.zeros_like(column) for name, column in rows.columns.items()})


def _overlapping(count: int, envs: int, shape: tuple[int, ...], dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    before = np.frombuffer(rng.bytes(count * envs * int(np.prod(shape)) * size), "u1").copy()
    before = (before % 2).view(dtype) if dtype == "?" else before.view(dtype)
    before = before.reshape(count, envs, *shape)
    after = before[rng.permutation(count)].copy()
    style = rng.integers(0, 4, (count, envs))
    for t in range(count):
        for e in range(envs):
            if shape and style[t, e] == 1:
                after[t, e][:-1] = before[t, e][1:]
            elif shape and style[t, e] == 2:
                after[t, e][..., :-1] = before[t, e][..., 1:]
            if t + 1 < count and style[t, e] != 3:
                before[t + 1, e] = after[t, e]
    return before, after


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.lists(st.integers(1, 6), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
def test_a_chunk_gives_back_every_byte(count: int, envs: int, shape: list[int], dtype: str, seed: int) -> None:
    before, after = _overlapping(count, envs, tuple(shape), dtype, seed)
    rewards = np.full((count, envs), -0.0, dtype=np.float32)
    rows = ChunkRows(7, {"observations.a": before, "next_observations.a": after, "rewards": rewards})
    target = _empty(rows)
    assert read_chunk(io.BytesIO(_dump(rows)), target, "chunk") == ({}, None)
    for name, column in rows.columns.items():
        assert target.columns[name].tobytes() == column.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 8), st.integers(0, 2**32))
def test_a_sequence_of_stacks_gives_back_every_byte(count: int, envs: int, depth: int, seed: int) -> None:
    before, _ = _overlapping(count, envs, (3, depth), "u1", seed)
    target = np.zeros_like(before)
    decode_sequence(encode_sequence(before), target)
    assert target.tobytes() == before.tobytes()


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_stacked_frames_are_stored_once(last: bool, size: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (104, 1, 10, 10, size), dtype=np.uint8)
    windows = np.concatenate([frames[i : i + 101] for i in range(4)], axis=-1)
    if not last:
        windows = np.ascontiguousarray(np.moveaxis(windows, -1, 2))
    rows = ChunkRows(0, {"observations": windows[:-1].copy(), "next_observations": windows[1:].copy()})
    content = _dump(rows)
    assert len(content) < 1.1 * frames.nbytes
    target = _empty(rows)
    read_chunk(io.BytesIO(content), target, "chunk")
    assert all(target.columns[name].tobytes() == column.tobytes() for name, column in rows.columns.items())


def test_info_dictionaries_come_back_and_what_is_not_plain_is_refused() -> None:
    rewards = np.zeros((2, 1), np.float32)
    infos = [[{"a": np.arange(3), "b": {"c": (1, None)}}], [{}]]
    rows = ChunkRows(0, {"rewards": rewards}, infos=infos)
    _, saved = read_chunk(io.BytesIO(_dump(rows)), _empty(rows), "chunk", infos=True)
    assert saved is not None and saved[0][0]["b"] == {"c": (1, None)}
    assert saved[0][0]["a"].tolist() == [0, 1, 2]
    with pytest.raises(tree.NotPlainError):
        _dump(ChunkRows(0, {"rewards": rewards}, infos=[[{"x": object()}], [{}]]))


def _rows() -> ChunkRows:
    return ChunkRows(0, {"observations": np.ones((5, 1, 4), np.float32), "rewards": np.ones((5, 1), np.float32)})


def _file(document: object, content: bytes = b"") -> bytes:
    header = json.dumps(document).encode()
    return zstandard.compress(len(header).to_bytes(8, "little") + header + content)


def test_a_truncated_chunk_is_refused_or_gives_every_row() -> None:
    content = _dump(_rows())
    for length in range(len(content)):
        target = _empty(_rows())
        try:
            read_chunk(io.BytesIO(content[:length]), target, "chunk")
        except CheckpointCorruptError:
            continue
        # All that may lack is the checksum and the end mark; the file's hash in the metadata tells.
        assert length > len(content) - 8
        assert all(target.columns[name].tobytes() == column.tobytes() for name, column in _rows().columns.items())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_never_gives_other_rows(at: int, change: int) -> None:
    content = bytearray(_dump(_rows()))
    content[at % len(content)] ^= change
    target = _empty(_rows())
    try:
        read_chunk(io.BytesIO(bytes(content)), target, "chunk")
    except (CheckpointCorruptError, ValueError):
        return
    assert all(target.columns[name].tobytes() == column.tobytes() for name, column in _rows().columns.items())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pickle.dumps({"observations": 1}),
        zstandard.compress(pickle.dumps([1, 2, 3])),
        zstandard.compress((2**40).to_bytes(8, "little") + b"{}"),
        _file([]),
        _file({"format": 99}),
        _file({"format": 1, "start": 3}),
        _file("[" * 50_000),
        _file({"x": {"$": "array", "dtype": "|O", "shape": [1], "at": 0}}, b"12345678"),
        _file({str(i): {"$": "array", "dtype": "u1", "shape": [100], "at": 0} for i in range(100)}, b"x" * 100),
    ],
    ids=["empty", "pickle", "pickle inside", "long document", "list", "format", "start", "nested", "objects", "claims"],
)
def test_what_is_no_chunk_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointCorruptError):
        read_chunk(io.BytesIO(content), _empty(_rows()), "chunk")


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = _file({"format": 1}, b"\0" * 500_000_000)
    assert len(bomb) < 100_000

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            content = super().read(16 if size is None or size < 0 else min(size, 16))
            self.taken += len(content)
            return content

    file = Counted(bomb)
    with pytest.raises(CheckpointCorruptError, match="unpacks to more than"):
        read_chunk(file, _empty(_rows()), "chunk")
    assert file.taken < len(bomb) / 10


def test_a_chunk_of_another_buffer_names_both_sides() -> None:
    target = ChunkRows(0, {"observations": np.ones((5, 1, 3), np.float32), "rewards": np.ones((5, 1), np.float32)})
    with pytest.raises(ValueError, match=r"saved observations <f4 \(1, 4\), this buffer's <f4 \(1, 3\)"):
        read_chunk(io.BytesIO(_dump(_rows())), target, "chunk")
