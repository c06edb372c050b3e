"""Owns which files the rows of a replay buffer lie in: what of a ring is to be written, and what is merged. Pure.

Rows are counted by the add clock: how many `add` calls came before them since the buffer was empty. The row of the
ring is the clock modulo the ring's length; no chunk reaches over the ring's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_FANOUT_BITS = 4
FANOUT = 2**_FANOUT_BITS


@dataclass(frozen=True)
class Chunk:
    """A file that holds the rows from `start` to before `end`.

    Attributes:
        name: The file's name.
        start: The clock of its first row.
        end: The clock after its last row.
        bytes: The file's size.
        sha256: The file's hash.
        reason: What of its rows could not be stored, or nothing.
    """

    name: str
    start: int
    end: int
    bytes: int
    sha256: str
    reason: str = ""


class Span(NamedTuple):
    """Rows that lie in one chunk: one on disk, or one that is to be written (None)."""

    start: int
    end: int
    chunk: Chunk | None

    @property
    def rows(self) -> int:
        return self.end - self.start


class Ring(NamedTuple):
    """What a plan must know of a ring.

    Attributes:
        size: Its rows.
        max_rows: The most rows of a chunk.
        merge_from: The clock from which on rows may be read again, to merge chunks.
    """

    size: int
    max_rows: int
    merge_from: int


def plan(present: Sequence[Span], start: int, end: int, ring: Ring) -> list[Span]:
    """Return the spans that hold the rows from `start` to before `end`, oldest first.

    New rows absorb smaller chunks before them, and sixteen chunks of about one size become one. So sizes fall from
    old to new, there are at most fifteen of each magnitude, and a row is written again once for each magnitude.

    Args:
        present: The chunks that are there, without a gap; those of rows before `start` are left out.
        start: The clock of the first row that is needed.
        end: The clock after the last one.
        ring: The ring.
    """
    spans = [span for span in present if span.end > start]
    at = max(start, spans[-1].end) if spans else start
    while at < end:
        lap_end = (at // ring.size + 1) * ring.size
        spans.append(Span(at, min(end, lap_end, at + ring.max_rows), None))
        at = spans[-1].end
        while _merge(spans, ring):
            pass
    return spans


def _merge(spans: list[Span], ring: Ring) -> bool:
    """Merge the last spans if it is time; return whether to look again."""
    last = spans[-1]
    if _sealed(last, ring) or len(spans) < 2:
        return False
    before = spans[-2]
    if _magnitude(before) < _magnitude(last) and _joins(before, last, ring):
        if before.rows + last.rows > ring.max_rows:
            return False
        spans[-2:] = [Span(before.start, last.end, None)]
        return True
    first = len(spans) - 1
    while first and _magnitude(spans[first - 1]) == _magnitude(last) and _joins(spans[first - 1], last, ring):
        first -= 1
    run = spans[first:]
    if sum(span.rows for span in run) > ring.max_rows:
        if len(run) > 2:
            spans[first:] = [Span(run[0].start, run[-2].end, None), last]
        return False
    if len(run) < FANOUT:
        return False
    spans[first:] = [Span(run[0].start, last.end, None)]
    return True


def _joins(span: Span, last: Span, ring: Ring) -> bool:
    one_lap = span.start // ring.size == (last.end - 1) // ring.size
    return one_lap and span.start >= ring.merge_from and not _sealed(span, ring)


def _sealed(span: Span, ring: Ring) -> bool:
    return 2 * span.rows > ring.max_rows


def _magnitude(span: Span) -> int:
    return (span.rows.bit_length() - 1) // _FANOUT_BITS
