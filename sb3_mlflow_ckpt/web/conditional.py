"""Owns answers that are sent only where they have changed: entity tags, 304, gzip, and the bodies that are kept.

Tags are weak: one tag stands for a document, compressed or not.
"""

from __future__ import annotations

import gzip
import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastapi import Request, Response

JSON = "application/json"
_WORTH_COMPRESSING = 1000
_KEPT_BYTES = 64 * 2**20
_GZIP_LEVEL = 5


@dataclass
class _Kept:
    body: bytes
    compressed: bytes | None = None

    @property
    def size(self) -> int:
        return len(self.body) + len(self.compressed or b"")


class Bodies:
    """Bodies by their tags, the ones that were asked for last. Safe to lose, and to use from any thread.

    Args:
        most_bytes: How much is kept.

    Attributes:
        salt: Goes into the tags of versions: another program, or other settings, make another body of one version.
    """

    def __init__(self, most_bytes: int = _KEPT_BYTES) -> None:
        self.salt = secrets.token_hex(8)
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tag: str, make: Callable[[], bytes]) -> bytes:
        """Return the body that has a tag, made if it is not kept."""
        with self._lock:
            kept = self._kept.get(tag)
            if kept is not None:
                self._kept.move_to_end(tag)
                return kept.body
        body = make()
        self._keep(tag, _Kept(body))
        return body

    def compressed(self, tag: str, body: bytes) -> bytes:
        """Return a body as gzip."""
        with self._lock:
            kept = self._kept.get(tag)
        if kept is not None and kept.compressed is not None:
            return kept.compressed
        # Without the time: the same body has the same bytes.
        compressed = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        self._keep(tag, _Kept(body, compressed))
        return compressed

    def _keep(self, tag: str, fresh: _Kept) -> None:
        with self._lock:
            before = self._kept.pop(tag, None)
            self._bytes += fresh.size - (before.size if before is not None else 0)
            self._kept[tag] = fresh
            while self._bytes > self._most_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].size


def respond_to_version(request: Request, version: str, make: Callable[[], bytes], media_type: str = JSON) -> Response:
    """Return the answer whose body is another one only where a version is; `make` is called only if it is needed.

    Args:
        request: What is asked; the version is that of the answer to its path and query.
        version: Any text.
        make: Returns the body.
        media_type: The body's.
    """
    address = f"{request.scope['path']}?{request.scope['query_string'].decode('latin-1')}"
    bodies: Bodies = request.app.state.bodies
    tag = _tag(f"{bodies.salt}\n{address}\n{version}".encode("utf-8", "surrogatepass"))
    if _is_known(request, tag):
        return _unchanged(tag)
    return _answer(request, tag, bodies.get(tag, make), media_type)


def respond(request: Request, body: bytes, media_type: str = JSON, *, status: int = 200) -> Response:
    """Return an answer whose tag follows from its body."""
    tag = _tag(body)
    if status == 200 and _is_known(request, tag):
        return _unchanged(tag)
    return _answer(request, tag, body, media_type, status)


def matches(if_none_match: str, tag: str) -> bool:
    """Return whether an `If-None-Match` header names a tag, by the weak comparison."""
    names = {name.strip().removeprefix("W/") for name in if_none_match.split(",")}
    return "*" in names or tag.removeprefix("W/") in names


def _is_known(request: Request, tag: str) -> bool:
    return any(matches(value, tag) for value in request.headers.getlist("if-none-match"))


def _tag(content: bytes) -> str:
    return f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'


def _headers(tag: str) -> Mapping[str, str]:
    return {"ETag": tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}


def _unchanged(tag: str) -> Response:
    return Response(status_code=304, headers=_headers(tag))


def _answer(request: Request, tag: str, body: bytes, media_type: str, status: int = 200) -> Response:
    headers = dict(_headers(tag))
    if len(body) > _WORTH_COMPRESSING and _takes_gzip(request.headers.get("accept-encoding", "")):
        body = request.app.state.bodies.compressed(tag, body)
        headers["Content-Encoding"] = "gzip"
    return Response(body, status, headers, media_type)


def _takes_gzip(accepted: str) -> bool:
    for item in accepted.lower().split(","):
        name, _, weight = item.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
