"""Owns the opening of a checkpoint's zip as what it may be: a stranger's. Imports no torch.

What the directory of the zip claims is checked before any member is read, and a member is read up to what it claims.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sb3_mlflow_ckpt import strict_json
from sb3_mlflow_ckpt.errors import CheckpointCorruptError

LARGEST_JSON = 16 * 2**20
READ_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
    OverflowError,
    zlib.error,
)
"""What zipfile, numpy and torch raise for content that is damaged or made up."""

_MOST_MEMBERS = 4096
_LARGEST_DIRECTORY = 4 * 2**20
_SLACK = 64 * 2**20
_RATIO = 16
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_NAME = re.compile(r"[\w .+@=,()\[\]-]+(/[\w .+@=,()\[\]-]+)*", re.ASCII)


class Container:
    """A zip whose directory is plausible.

    Attributes:
        where: The path or URI that an error names.
        size: Bytes of the file.
        names: The members' names, in order.
    """

    def __init__(self, archive: zipfile.ZipFile, where: object, size: int) -> None:
        self.where = where
        self.size = size
        self._archive = archive
        self._members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        self.names = list(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return a member's content; its CRC is checked.

        Raises:
            ValueError: It is larger than `limit`, or than it claims.
            KeyError: There is no such member.
        """
        info = self._members[name]
        if limit is not None and info.file_size > limit:
            raise ValueError(f"its member {name} is larger than {limit} bytes")
        with self._archive.open(info) as member:
            content = member.read(info.file_size + 1)
        if len(content) != info.file_size:
            raise ValueError(f"its member {name} has another size than the zip says")
        return content

    def read_json(self, name: str, limit: int = LARGEST_JSON) -> Any:
        """Return the value of a JSON member; ValueError where it is none."""
        try:
            return strict_json.loads(self.read(name, limit), finite=False)
        except UnicodeDecodeError as error:
            raise ValueError(f"its member {name} is not UTF-8") from error

    def check_members(self) -> None:
        """Read every member, which checks its CRC."""
        for name, info in self._members.items():
            try:
                with self._archive.open(info) as member:
                    while member.read(1 << 20):
                        pass
            except READ_ERRORS as error:
                raise CheckpointCorruptError(self.where, f"its member {name!r} is damaged") from error


@contextmanager
def open_container(source: Path | BinaryIO, where: object = None, *, trusted: bool = False) -> Iterator[Container]:
    """Open a checkpoint's zip.

    Args:
        source: Its path, or the open file.
        where: The path or URI that an error names.
        trusted: Whether sizes are believed.

    Raises:
        CheckpointCorruptError: It is no zip, or its directory is not one that a checkpoint has.
    """
    where = source if where is None else where
    if isinstance(source, Path):
        try:
            file: BinaryIO = open(source, "rb")  # noqa: SIM115
        except OSError as error:
            raise CheckpointCorruptError(where, f"its zip cannot be read ({error.strerror or error})") from error
        with file, open_container(file, where, trusted=trusted) as container:
            yield container
        return
    size = source.seek(0, os.SEEK_END)
    guard = _Guard(source)
    try:
        archive = zipfile.ZipFile(guard)
        problem = _problem(archive.infolist(), size, trusted)
    except READ_ERRORS as error:
        raise CheckpointCorruptError(where, f"its zip cannot be read ({_reason(error)})") from error
    if problem:
        raise CheckpointCorruptError(where, f"its zip {problem}")
    guard.limit = None
    with archive:
        yield Container(archive, where, size)


def _problem(members: list[zipfile.ZipInfo], size: int, trusted: bool) -> str:
    names = [info.filename for info in members]
    if len(names) > _MOST_MEMBERS:
        return f"has {len(names)} members"
    if len({name.lower() for name in names}) < len(names):
        return "holds two members of one name"
    for info in members:
        name = info.filename.removesuffix("/")
        if info.filename != info.orig_filename or not _NAME.fullmatch(name) or {"..", "."} & set(name.split("/")):
            return f"has a member with the name {info.orig_filename[:80]!r}"
        if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
            return f"has a member {name!r} that is compressed or encrypted in a way that is not read"
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            return f"has a member {name!r} with two sizes"
    if sum(info.compress_size for info in members) > size:
        return "has members that overlap"
    total = sum(info.file_size for info in members)
    if total > _RATIO * size + _SLACK and not trusted:
        return f"of {size} bytes claims to hold {total}"
    return ""


def _reason(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


class _Guard(io.RawIOBase):
    """A file of which no more than a directory is read at once while the zip is opened."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.limit: int | None = _LARGEST_DIRECTORY

    def read(self, size: int = -1) -> bytes:
        if self.limit is not None and size > self.limit:
            raise zipfile.BadZipFile("its directory is too large")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
