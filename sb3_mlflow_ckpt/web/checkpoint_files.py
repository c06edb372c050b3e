"""Owns checkpoints' files as the web hands them out: found by id alone, within the checkpoint folder, checked once.

Nobody names a path: ids that could leave the folder, and links that do, are as good as absent.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from anyio import to_thread
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, InvalidIdError
from sb3_mlflow_ckpt.layout import RunFolder, chunk_path, entry_chunk, id_spellings, metadata_path
from sb3_mlflow_ckpt.metadata import FileEntry
from sb3_mlflow_ckpt.runs.folder_index import Stamp, stamp
from sb3_mlflow_ckpt.verification import read_metadata, verify_checkpoint
from sb3_mlflow_ckpt.web.conditional import matches
from sb3_mlflow_ckpt.web.problems import Problem, ProblemError, not_found
from sb3_mlflow_ckpt.web.security import HEAD_KEY

_CHUNK_BYTES = 1 << 18
_MOST_CHECKS = 20_000
_STRIPES = 16
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def run_folder(checkpoint_dir: Path, record: Mapping[str, Any]) -> RunFolder | None:
    """Return the folder of a run on this machine, or None: it is not here, or is a link out of the checkpoint folder.

    Args:
        checkpoint_dir: The folder of all agents.
        record: The run's record, which anybody may have written.
    """
    agent_id, run_id = record.get("agent_id"), record.get("run_id")
    if not isinstance(agent_id, str) or not isinstance(run_id, str):
        return None
    for spelling in id_spellings(run_id):
        try:
            folder = RunFolder(checkpoint_dir, agent_id, spelling)
            if folder.path.is_dir():
                return folder if folder.path.resolve().is_relative_to(checkpoint_dir.resolve()) else None
        except (InvalidIdError, OSError, RuntimeError):  # A link to itself is a RuntimeError to older Pythons.
            return None
    return None


@dataclass(frozen=True)
class Check:
    """What is known of a checkpoint's content.

    Attributes:
        state: `verified`; `corrupt`; `unreadable`, where it could not be told; `absent`, where it is not here.
        problem: What is wrong, in one sentence; None where nothing is.
    """

    state: str
    problem: str | None = None


class Checks:
    """What was found out about checkpoints' contents: each content is hashed once. Safe to use from any thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[dict[Path, Stamp | None], Check]] = OrderedDict()
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]

    def known(self, folder: RunFolder, episode: int) -> Check | None:
        """Return what is known of a checkpoint as it lies there now; nothing is read but its files' times."""
        path = folder.model(episode)
        with self._lock:
            stamps, check = self._known.get(path, (None, None))
        return check if stamps is not None and all(stamp(file) == then for file, then in stamps.items()) else None

    def check(self, folder: RunFolder, episode: int) -> Check:
        """Return what is known of a checkpoint, after reading it whole where nothing is. It may take seconds."""
        path = folder.model(episode)
        # Two that ask for one checkpoint wait for one reading of it.
        with self._stripes[hash(path) % _STRIPES]:
            known = self.known(folder, episode)
            if known is not None:
                return known
            before = _stamps(path)
            found = _examine(path)
            if found.state != "unreadable" and _stamps(path) == before:
                self._remember(path, before, found)
            return found

    def _remember(self, path: Path, stamps: dict[Path, Stamp | None], found: Check) -> None:
        with self._lock:
            self._known[path] = (stamps, found)
            self._known.move_to_end(path)
            while len(self._known) > _MOST_CHECKS:
                self._known.popitem(last=False)


def _examine(path: Path) -> Check:
    if not atomic.is_own_file(path):
        return Check("absent", "Its file is not on this machine")
    try:
        verify_checkpoint(path)
    except CheckpointNotFoundError as error:
        return Check("absent", str(error))
    except CheckpointCorruptError as error:
        return Check("corrupt", str(error))
    except (CheckpointError, OSError) as error:
        return Check("unreadable", str(error))
    return Check("verified")


def _stamps(path: Path) -> dict[Path, Stamp | None]:
    """Return when the files of a checkpoint were written, its chunks of a replay buffer among them."""
    files = [path, metadata_path(path)]
    try:
        names = [entry_chunk(entry.name) for entry in read_metadata(path, settle=False).files[1:]]
    except (CheckpointError, OSError):
        names = []
    files += [chunk_path(path.parent, name) for name in names if name is not None]
    return {file: stamp(file) for file in files}


def download(request: Request, folder: RunFolder | None, episode: int) -> Response:
    """Return the zip of a committed checkpoint, or the part of it that is asked for.

    Raises:
        ProblemError: There is none, it is damaged, or the part lies outside it.
    """
    missing = not_found(f"There is no committed checkpoint of episode {episode} of this run on this machine")
    if folder is None:
        raise missing
    try:
        file, entry = _open(folder, episode)
    except (CheckpointError, OSError) as error:
        raise missing from error
    try:
        return _file_response(request, file, entry, folder.model(episode).name)
    except BaseException:
        file.close()
        raise


def _open(folder: RunFolder, episode: int) -> tuple[BinaryIO, FileEntry]:
    """Open a checkpoint's zip, which from then on may be pruned or saved anew."""
    path = folder.model(episode)
    for is_last in (False, True):
        with atomic.opened(path) as file:
            files = read_metadata(path).files
            size = os.fstat(file.fileno()).st_size
            if files and files[0].bytes == size:
                return open(os.dup(file.fileno()), "rb"), files[0]
        # Saved anew between the two looks; or damaged.
        if is_last:
            said = f"{files[0].bytes}" if files else "nothing"
            detail = f"The file has {size} bytes, its metadata says {said}: it is damaged"
            raise ProblemError(Problem(409, detail, "checkpoint-damaged"))
    raise AssertionError("unreachable")


def _file_response(request: Request, file: BinaryIO, entry: FileEntry, name: str) -> Response:
    tag = f'"{entry.sha256}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Accept-Ranges": "bytes"}
    if any(matches(value, tag) for value in request.headers.getlist("if-none-match")):
        file.close()
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}"'
    start, end, status = 0, entry.bytes, 200
    part = byte_range(request.headers.get("range", ""), entry.bytes)
    if part is not None and request.headers.get("if-range", tag) == tag:
        (start, end), status = part, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.bytes}"
    headers["Content-Length"] = str(end - start)
    if HEAD_KEY in request.scope:
        file.close()
        return Response(status_code=status, headers=headers, media_type="application/zip")
    file.seek(start)
    return StreamingResponse(_parts(file, end - start), status, headers, "application/zip")


async def _parts(file: BinaryIO, size: int) -> AsyncIterator[bytes]:
    with file:
        while size:
            part = await to_thread.run_sync(file.read, min(size, _CHUNK_BYTES))
            if not part:
                raise OSError("The checkpoint became shorter while it was sent")
            size -= len(part)
            yield part


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return the part of a file that a `Range` header asks for: its first byte, and the one behind its last.

    Returns:
        None where it asks for none, for several, or for what is no number of bytes: then the whole is sent.

    Raises:
        ProblemError: There is no such part.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or found[0].endswith("=-"):
        return None
    if found[1]:
        start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
        if found[2] and int(found[2]) < start:
            return None
    else:
        start, end = max(0, size - int(found[2])), size
    if start >= end:
        raise ProblemError(Problem(416, f"The file has {size} bytes", "range", {"Content-Range": f"bytes */{size}"}))
    return start, end
