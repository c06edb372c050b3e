"""Owns durable bytes: temporary, fsync, rename, fsync of the folder; appended lines; hashes.

A reader sees either the old file or the new one, and what it sees survives a power cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX


def temporary_sibling(path: Path) -> Path:
    """Return a fresh name in the same folder: a rename must not cross file systems."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def fsync_dir(folder: Path) -> None:
    """Make the renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary beside `path`; on success it is complete on disk under its temporary name.

    The caller renames it. On any error the temporary is removed and `path` was never touched.

    Yields:
        The open binary file and the temporary's path.
    """
    temporary = temporary_sibling(path)
    try:
        with open(temporary, "xb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def commit(temporary: Path, path: Path) -> None:
    """Give a staged file its name, durably."""
    os.replace(temporary, path)
    fsync_dir(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content atomically and durably."""
    with staged(path) as (file, temporary):
        file.write(content)
    commit(temporary, path)


def dump_json(value: Any, *, indent: int | None = 2) -> bytes:
    """Return strict JSON (no NaN, no infinities) as UTF-8 with a final newline."""
    return (json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")


def append_line(path: Path, value: Any, *, durable: bool = True) -> None:
    """Append one JSON document as a line.

    A line that a crash tore is closed first, so that it spoils itself alone.

    Args:
        path: The file; made if it is missing.
        value: Anything that strict JSON can hold.
        durable: Whether the line must survive a power cut (a checkpoint's event) or only a crash of the
            process (a point of the learning curve).
    """
    line = dump_json(value, indent=None)
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the complete JSON lines from a byte offset on; torn and foreign lines are passed over.

    A file that is shorter than that is another one than before, and is read from its beginning.

    Returns:
        The documents and the offset behind the last complete line.
    """
    try:
        with open(path, "rb") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], offset
    end = content.rfind(b"\n") + 1
    rows = []
    for line in content[:end].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows, offset + end


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as file:
        return digest(file)


def digest(file: Any) -> str:
    """Return the SHA-256 of an open file from where it stands."""
    if hasattr(hashlib, "file_digest"):
        return hashlib.file_digest(file, "sha256").hexdigest()
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
