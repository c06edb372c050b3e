"""Owns durable bytes: temporary, fsync, rename, fsync of the folder; hashes.

A reader sees either the old file or the new one, and what it sees survives a power cut. The files of a run folder
are opened as what they are: a symbolic link, a pipe or a device in the place of one is refused, never followed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from sb3_mlflow_ckpt.errors import ForeignFileError
from sb3_mlflow_ckpt.layout import TEMPORARY_PREFIX

SLICE = 1 << 22
"""Bytes that the disk is given at a time."""
LARGEST_DOCUMENT = 16 * 2**20
"""Bytes of the largest JSON document or line that is read."""

# Bytes from which a piece is hashed and written by itself.
_PIECE = 1 << 16
_NOT_FOLLOWED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# Opening a pipe that nobody writes to would wait for ever.
_NOT_WAITED_FOR = getattr(os, "O_NONBLOCK", 0)


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
def named(path: Path) -> Iterator[None]:
    """Make an OSError say which file it is about; those of open files do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def staged(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary beside `path`; on success it is complete on disk under its temporary name.

    The caller renames it. On any error the temporary is removed and `path` was never touched.

    Yields:
        The open binary file and the temporary's path.
    """
    temporary = temporary_sibling(path)
    try:
        with named(path), open(temporary, "xb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        discard(temporary)
        raise


class HashedFile:
    """A file that is hashed and counted while it is written, from its beginning to its end.

    Small pieces are gathered until there are some, or until `flush`. The disk writes what it has been given while the
    next slice is hashed, so a file of many megabytes is durable sooner.

    Args:
        file: The file, open and empty.

    Attributes:
        bytes: What was written.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._gathered = bytearray()
        self._given = 0
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of what was written and flushed, as hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, content: bytes | memoryview) -> int:
        """Write bytes."""
        size = memoryview(content).nbytes
        self.bytes += size
        if size < _PIECE:
            self._gathered += content
        if size >= _PIECE or len(self._gathered) >= _PIECE:
            self._write_gathered()
        if size >= _PIECE:
            self._digest.update(content)
            self._file.write(content)
        if self.bytes - len(self._gathered) - self._given >= SLICE:
            self._give_to_disk()
        return size

    def flush(self) -> None:
        """Flush the file."""
        self._write_gathered()
        self._file.flush()

    def _give_to_disk(self) -> None:
        written = self.bytes - len(self._gathered)
        if hasattr(os, "posix_fadvise"):
            # Begins to write what is not on disk, and forgets only what is.
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), self._given, written - self._given, os.POSIX_FADV_DONTNEED)
        self._given = written

    def _write_gathered(self) -> None:
        content, self._gathered = self._gathered, bytearray()
        self._digest.update(content)
        self._file.write(content)


def slices(content: memoryview) -> Iterator[memoryview]:
    """Yield the bytes of a large piece in slices, so that the disk writes one while the next is looked at."""
    for start in range(0, len(content), SLICE):
        yield content[start : start + SLICE]


def discard(path: Path) -> None:
    """Remove a file that failed; where the disk refuses even that, what was wrong first is what counts."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def commit(temporary: Path, path: Path) -> None:
    """Give a staged file its name, durably. On an error it may have the name, and then stays under no other."""
    try:
        with named(path):
            os.replace(temporary, path)
            fsync_dir(path.parent)
    except BaseException:
        discard(temporary)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content atomically and durably."""
    with staged(path) as (file, temporary):
        file.write(content)
    commit(temporary, path)


def dump_json(value: Any, *, indent: int | None = 2) -> bytes:
    """Return strict JSON (no NaN, no infinities) as UTF-8 with a final newline.

    A character that UTF-8 lacks (half of a surrogate pair, which stands for a byte of a file's name that is no
    text) is written as JSON's own escape.
    """
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[BinaryIO]:
    """Open a file of a run folder, unbuffered where it is written to.

    Args:
        path: The file.
        flags: As `os.open` takes them.

    Raises:
        ForeignFileError: A link, a folder, a pipe or a device lies there.
        OSError: It cannot be opened.
    """
    if path.is_symlink():
        raise ForeignFileError(path)
    descriptor = os.open(path, flags | _NOT_FOLLOWED | _NOT_WAITED_FOR, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ForeignFileError(path)
        writes = flags & (os.O_WRONLY | os.O_RDWR)
    except BaseException:
        os.close(descriptor)
        raise
    with open(descriptor, "rb+" if writes else "rb", buffering=0 if writes else -1) as file:
        yield file


def is_own_file(path: Path) -> bool:
    """Tell whether a regular file lies at a path: not a link to one, and nothing else."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def own_folder(path: Path) -> Path:
    """Return a folder within a run folder, made if it is missing.

    Raises:
        ForeignFileError: A link lies there: what is written to it would be written elsewhere.
    """
    if path.is_symlink():
        raise ForeignFileError(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def read_bytes(path: Path, limit: int = LARGEST_DOCUMENT) -> bytes:
    """Return the content of a file of a run folder.

    Raises:
        ForeignFileError: Something else lies there.
        OSError: It cannot be read, or is larger than `limit`.
    """
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
    return content


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
