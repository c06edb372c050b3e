"""Owns the file format of one chunk of a replay buffer: a stretch of the ring's rows, compressed. No pickle.

A zstandard frame around: eight bytes that tell the length of a JSON document, the document of `tree.encode`, the
bytes of its arrays. `observations` and `next_observations` are coded as streams of frames (`frame_streams`); all other
columns are stored as they are. Whoever reads a chunk says what it must hold, and nothing beyond that is unpacked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import zstandard
from numpy.typing import NDArray

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.errors import CheckpointCorruptError
from sb3_mlflow_ckpt.state.replay.frame_streams import (
    Stack,
    Stream,
    decode_pairs,
    decode_sequence,
    encode_pairs,
    encode_sequence,
)

Array = NDArray[Any]
Infos = list[list[dict[str, Any]]]

_FORMAT = 1
_LEVEL = 1
_LARGEST_WINDOW = 8 * 2**20
_LARGEST_DOCUMENT = 2**20
_LARGEST_INFOS = 64 * 2**20
_PIECE = 2**20
_OBSERVATIONS, _NEXT = "observations", "next_observations"


@dataclass(frozen=True)
class ChunkRows:
    """A stretch of a ring, as views of its rows.

    Attributes:
        start: The clock of the first row.
        columns: The rows of each column, (rows, environments, ...); `observations` and `next_observations` alone,
            or with a key after a dot.
        following: The observations after the last row, where the buffer keeps no `next_observations`.
        infos: The info dictionaries of each row, where the buffer keeps them.
    """

    start: int
    columns: Mapping[str, Array]
    following: Mapping[str, Array] = field(default_factory=dict)
    infos: Infos | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def write_chunk(file: IO[bytes], rows: ChunkRows) -> None:
    """Write a chunk; memory is bounded by the rows' own size.

    Args:
        file: Where to.
        rows: What.

    Raises:
        tree.NotPlainError: `infos` hold something that has no plain form, or too much; nothing was written then.
    """
    plain, streams = {}, {}
    for name, column in rows.columns.items():
        if _partner(name) in rows.columns:
            if name.startswith(_OBSERVATIONS):
                streams[name] = _described(encode_pairs(column, rows.columns[_partner(name)]))
        elif name.startswith(_OBSERVATIONS):
            streams[name] = _described(encode_sequence(column))
        else:
            plain[name] = column
    value = {
        "format": _FORMAT,
        "start": rows.start,
        "columns": {name: describe(column) for name, column in rows.columns.items()},
        "plain": plain,
        "streams": streams,
        "following": dict(rows.following),
        "infos": rows.infos,
    }
    document, arrays = tree.encode(value)
    header = json.dumps(document).encode()
    stored = sum(array.nbytes for array in arrays)
    if rows.infos is not None and (
        len(header) > _LARGEST_INFOS or stored > _columns_bytes(rows.columns, rows.following) + _LARGEST_INFOS
    ):
        raise tree.NotPlainError("the info dictionaries are larger than a chunk may hold")
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with compressor.stream_writer(file, closefd=False) as writer:
        writer.write(len(header).to_bytes(8, "little"))
        writer.write(header)
        for piece in tree.pieces(arrays):
            writer.write(piece.data)


def read_chunk(
    file: IO[bytes], into: ChunkRows, where: object, *, infos: bool = False
) -> tuple[dict[str, Array], Infos | None]:
    """Fill rows from a chunk.

    Args:
        file: The chunk.
        into: Rows of the buffer's own shape and type; its columns are overwritten.
        where: What an error calls the chunk.
        infos: Whether info dictionaries may be in it.

    Returns:
        The following observations and the info dictionaries, where they are in it.

    Raises:
        CheckpointCorruptError: It is no chunk, holds more or less than the rows need, or belongs elsewhere.
        ValueError: Its columns are those of another buffer.
    """
    try:
        value = _read(file, into, infos)
    except CheckpointCorruptError:
        raise
    except (zstandard.ZstdError, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointCorruptError(where, f"the chunk cannot be read ({error})") from error
    differences = _differences(value.get("columns"), into)
    if differences:
        raise ValueError(f"The replay chunk {where} is of another buffer: {'; '.join(differences)}")
    try:
        return _fill(value, into)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointCorruptError(where, f"the chunk does not hold what it says ({error})") from error


def describe(column: Array) -> dict[str, Any]:
    """Return the type and shape of one row of a column, as plain JSON."""
    return {"dtype": column.dtype.str, "shape": list(column.shape[1:])}


def _partner(name: str) -> str:
    """Return the column that a stream is shared with: `observations.x` <-> `next_observations.x`."""
    if name.startswith(_NEXT):
        return name.removeprefix("next_")
    return f"next_{name}" if name.startswith(_OBSERVATIONS) else ""


def _described(stream: Stream) -> dict[str, Any]:
    return {"stack": list(stream.stack), "kinds": stream.kinds, "frames": stream.frames}


def _columns_bytes(columns: Mapping[str, Array], following: Mapping[str, Array]) -> int:
    """Return the most bytes that the arrays of a chunk of these columns take."""
    rows: int = sum(column.nbytes for column in columns.values())
    kinds: int = sum(column.shape[0] * column.shape[1] for name, column in columns.items() if "observations" in name)
    # One full stack of each environment may stand before the first row, and each array is padded.
    extra: int = sum(column[:1].nbytes for column in columns.values()) + sum(
        array.nbytes for array in following.values()
    )
    return rows + kinds + extra + 256 * (3 * len(columns) + 8)


def _read(file: IO[bytes], into: ChunkRows, infos: bool) -> dict[str, Any]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    allowance = _LARGEST_INFOS if infos else 0
    with decompressor.stream_reader(file, closefd=False) as reader:
        length = int.from_bytes(_exactly(reader, 8), "little")
        if length > _LARGEST_DOCUMENT + allowance:
            raise ValueError(f"its document has {length} bytes")
        document = json.loads(_exactly(reader, length))
        following = {n: c[:1] for n, c in into.columns.items() if n.startswith(_OBSERVATIONS)}
        content = _at_most(reader, _columns_bytes(into.columns, following) + allowance)
    if not isinstance(document, dict):
        raise ValueError("its document is not an object")
    # Many arrays may claim the same bytes, and each would become a copy of its own.
    if _claimed(document) > len(content):
        raise ValueError("its arrays are larger than its bytes")
    value = tree.decode(document, memoryview(content))
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError("it is of an unknown format")
    if value.get("start") != into.start:
        raise ValueError(f"it begins at row {value.get('start')} in place of {into.start}")
    return value


def _exactly(reader: IO[bytes], size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = reader.read(min(_PIECE, size - len(content)))
        if not piece:
            raise ValueError("it is truncated")
        content += piece
    return bytes(content)


def _at_most(reader: IO[bytes], limit: int) -> bytearray:
    content = bytearray()
    while piece := reader.read(min(_PIECE, limit + 1 - len(content))):
        content += piece
        if len(content) > limit:
            raise ValueError(f"it unpacks to more than the {limit} bytes that its rows can have")
    return content


def _claimed(document: Any) -> int:
    """Return how many bytes the arrays of a document say that they have."""
    total: int = 0
    waiting = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            if "dtype" in item and "at" in item:
                total += math.prod(int(n) for n in item["shape"]) * int(tree.dtype_of(item["dtype"]).itemsize)
            else:
                waiting += item.values()
    return total


def _differences(columns: Any, into: ChunkRows) -> list[str]:
    saved = columns if isinstance(columns, Mapping) else {}
    here = {name: describe(column) for name, column in into.columns.items()}
    return compare_columns(saved, here)


def compare_columns(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every column that differs between what was saved and a buffer."""
    names: Sequence[str] = sorted({*saved, *here})
    return [
        f"saved {name} {_spelled(saved.get(name))}, this buffer's {_spelled(here.get(name))}"
        for name in names
        if saved.get(name) != here.get(name)
    ]


def _spelled(column: Any) -> str:
    if not isinstance(column, Mapping):
        return "is absent" if column is None else repr(column)
    return f"{column.get('dtype')} {tuple(column.get('shape') or ())}"


def _fill(value: Mapping[str, Any], into: ChunkRows) -> tuple[dict[str, Array], Infos | None]:
    for name, column in into.columns.items():
        if name.startswith(_OBSERVATIONS):
            stored = value["streams"][name]
            last, size, depth = stored["stack"]
            stream = Stream(Stack(bool(last), int(size), int(depth)), stored["kinds"], stored["frames"])
            if _partner(name) in into.columns:
                decode_pairs(stream, column, into.columns[_partner(name)])
            else:
                decode_sequence(stream, column)
        elif not name.startswith(_NEXT):
            plain = value["plain"][name]
            if plain.dtype != column.dtype or plain.shape != column.shape:
                raise ValueError(f"{name} is {plain.dtype} {plain.shape} in place of {column.dtype} {column.shape}")
            column[...] = plain
    following = value["following"]
    for name, array in following.items():
        column = into.columns[name]
        if array.dtype != column.dtype or array.shape != column.shape[1:]:
            raise ValueError(f"the observations after the last row are {array.dtype} {array.shape}")
    return dict(following), _checked(value["infos"], into)


def _checked(infos: Any, into: ChunkRows) -> Infos | None:
    if infos is None:
        return None
    envs = next(iter(into.columns.values())).shape[1]
    if not isinstance(infos, list) or len(infos) != len(into):
        raise ValueError("its info dictionaries are not one for each row")
    if not all(isinstance(row, list) and len(row) == envs and all(isinstance(i, dict) for i in row) for row in infos):
        raise ValueError("its info dictionaries are not one for each environment")
    return infos
