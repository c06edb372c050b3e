"""Owns the CSV file of SB3's Monitor: rows that were written after a checkpoint are set aside when it is resumed.

The file is the one that the Monitor at hand has opened; a path is never taken from a state. Rows that are cut off are
appended to `<name>.after-checkpoint`, beside it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

SUFFIX = ".after-checkpoint"


def file_position(monitor: Any) -> dict[str, int] | None:
    """Return how long a Monitor's file is, and what tells it from another; None where it writes none."""
    path = _path(monitor)
    if path is None:
        return None
    monitor.results_writer.file_handler.flush()
    size = path.stat().st_size
    # The first line is the file's own: it holds a time. Told to append, SB3 writes none before the first row.
    return {"bytes": size, "header": _header(path)} if size else {"bytes": 0, "inode": path.stat().st_ino}


def cut_file(monitor: Any, position: Any) -> None:
    """Set aside what was written to a Monitor's file after `position`, and let it go on from there.

    Nothing happens where the file is another (SB3 begins a new one with override_existing, its default) or shorter,
    except that a torn last row is set aside, so that the next one begins on a line of its own.
    """
    path = _path(monitor)
    if path is None or not isinstance(position, Mapping):
        return
    handle = monitor.results_writer.file_handler
    handle.flush()
    size, then = path.stat().st_size, position.get("bytes")
    if not isinstance(then, int) or then < 0:
        return
    if position.get("inode") != path.stat().st_ino if then == 0 else position.get("header") != _header(path):
        return
    keep = min(then, size)
    with path.open("rb") as file:
        content = file.read()
    # A row is whole where a line ends.
    keep = content.rfind(b"\n", 0, keep) + 1
    if keep < size and (keep > 0 or then == 0):
        with path.with_name(path.name + SUFFIX).open("ab") as surplus:
            surplus.write(content[keep:])
            surplus.flush()
            os.fsync(surplus.fileno())
        os.truncate(path, keep)
    # A handle opened with "w" has a position of its own.
    handle.seek(0, os.SEEK_END)


def _path(monitor: Any) -> Path | None:
    writer = getattr(monitor, "results_writer", None)
    handle = getattr(writer, "file_handler", None)
    return Path(handle.name) if handle is not None and not handle.closed else None


def _header(path: Path) -> int:
    with path.open("rb") as file:
        return crc32(file.readline(65_536))
