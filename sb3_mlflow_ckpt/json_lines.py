"""Owns files of JSON lines: what is appended is whole or not there, and is read whole wherever a crash came."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sb3_mlflow_ckpt import atomic, strict_json

# Bytes on either side of an offset, in which most lines end.
_USUAL_LINE = 1024


def append_line(path: Path, value: Any, *, durable: bool = True) -> None:
    """Append one JSON document as a line.

    A line that a crash tore is closed first, so that it spoils itself alone. One that fails is taken back.

    Args:
        path: The file; made if it is missing.
        value: Anything that strict JSON can hold.
        durable: Whether the line must survive a power cut (a checkpoint's event) or only a crash of the
            process (a point of the learning curve).

    Raises:
        ForeignFileError: Something else lies there.
        OSError: It cannot be written.
    """
    line = atomic.dump_json(value, indent=None)
    # Unbuffered: what a failed write left in a buffer would be written by close().
    with atomic.named(path), atomic.opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise


def is_torn(path: Path) -> bool:
    """Return whether the last line of a file has no end: a crash came while it was written."""
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def close_line(path: Path) -> None:
    """Give a torn last line an end, durably."""
    with open(path, "ab") as file:
        file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, offset: int = 0, at_most: int = -1) -> tuple[list[dict[str, Any]], int]:
    """Read the complete JSON lines from a byte offset on; torn, foreign and endless lines are passed over.

    A file that is shorter than that is another one than before, and is read from its beginning.

    Args:
        path: The file; it may be missing.
        offset: Where to begin, in bytes.
        at_most: About how many bytes to read; all where it is negative. A line is never cut by it.

    Returns:
        The documents and the offset behind the last complete line.

    Raises:
        ForeignFileError: Something else lies there.
        OSError: It cannot be read.
    """
    lines, offset = read_placed_lines(path, offset, at_most)
    return [line.row for line in lines], offset


class PlacedLine(NamedTuple):
    """A JSON line and where it lies in its file: from the byte `start` to before the byte `end`."""

    row: dict[str, Any]
    start: int
    end: int


def read_placed_lines(path: Path, offset: int = 0, at_most: int = -1) -> tuple[list[PlacedLine], int]:
    """Read lines as `read_lines` does, and tell where each lies."""
    lines: list[PlacedLine] = []
    try:
        with atomic.opened(path) as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            begin = offset
            for line, end in _complete_lines(file, offset):
                start, offset = offset, end
                row = _row(line)
                if row is not None:
                    lines.append(PlacedLine(row, start, end))
                if 0 <= at_most <= offset - begin:
                    break
    except FileNotFoundError:
        return [], offset
    return lines, offset


def read_line_at(file: BinaryIO, offset: int) -> tuple[dict[str, Any] | None, int, int]:
    """Read the line that holds one byte of an open file.

    Returns:
        The document, None for a line that is torn, foreign or endless, and from where to where the line lies.

    Raises:
        OSError: It cannot be read.
    """
    reach = _USUAL_LINE
    while True:
        begin = max(0, offset - reach)
        file.seek(begin)
        window = file.read(offset - begin + reach)
        start, end = window.rfind(b"\n", 0, offset - begin) + 1, window.find(b"\n", offset - begin) + 1
        at_end = len(window) < offset - begin + reach
        endless = reach > atomic.LARGEST_DOCUMENT
        if endless or ((start or not begin) and (end or at_end)):
            row = None if endless or not end else _row(window[start:end])
            return row, begin + start, begin + (end or len(window))
        reach *= 8


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = strict_json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _complete_lines(file: BinaryIO, offset: int) -> Iterator[tuple[bytes, int]]:
    """Yield each line that has an end, and the offset behind it; one beyond all bounds as an empty line."""
    whole = True
    while piece := file.readline(atomic.LARGEST_DOCUMENT):
        offset += len(piece)
        if piece.endswith(b"\n"):
            yield (piece if whole else b""), offset
            whole = True
        else:
            whole = False
