"""Owns keeping a replay buffer in checkpoints while it is trained with: only what is new since the last is written.

Rows of a ring do not change until the ring comes round to them, so nothing is copied: the background writer reads them
where they lie, and the training thread waits only if it is about to overwrite what is still being read.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.layout import REPLAY_FOLDER, RunFolder, chunk_entry
from sb3_mlflow_ckpt.metadata import FileEntry
from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows
from sb3_mlflow_ckpt.state.replay.columns import columns, keeps_infos, row_bytes, uncaptured_reason
from sb3_mlflow_ckpt.state.replay.files import take_over, write_rows
from sb3_mlflow_ckpt.state.replay.plan import Chunk, Ring, Span, plan
from sb3_mlflow_ckpt.state.replay.restore import buffer_state, chunks_document, restore_replay, saved_chunks

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

__all__ = ["ReplayCapture", "ReplayRecorder", "restore_replay"]

logger = logging.getLogger(__name__)

LARGEST_CHUNK = 64 * 2**20
"""The most bytes of rows, before coding and compression, in one chunk."""
_MOST_INFOS = 4096
_PATIENCE_SECONDS = 300.0


class ReplayCapture:
    """A replay buffer at one moment: what the training thread hands to the writer.

    Rows are shared with the buffer. `write` or `release` must be called: until then training waits before it
    overwrites them.

    Attributes:
        rows: How many valid rows it holds.
    """

    def __init__(self, recorder: ReplayRecorder, buffer: Any, clock: int, read_from: int) -> None:
        size = buffer.buffer_size
        self.clock, self.first = clock, max(0, clock - size)
        self.rows = clock - self.first
        self.buffer, self.columns = buffer, columns(buffer)
        self.read_from: float = read_from
        self.started, self.abandoned = False, False
        self._recorder = recorder
        self._facts = buffer_state(buffer, clock)
        self._state: dict[str, Any] | None = None
        last, after = (clock - 1) % size, clock % size
        # An n-step buffer marks the last row as truncated while it samples.
        self._last = {name: array[last].copy() for name, array in self.columns.items() if array.ndim == 2}
        self._following = {}
        if buffer.optimize_memory_usage:
            self._following = {n: c[after].copy() for n, c in self.columns.items() if n.startswith("observations")}

    @property
    def state(self) -> dict[str, Any]:
        """What the checkpoint's state holds under `replay`, as plain JSON; known once the chunks are written."""
        if self._state is None:
            raise RuntimeError("The chunks of this capture are not written: call write() first")
        return self._state

    def write(self, folder: RunFolder) -> list[FileEntry]:
        """Write the chunks that are not on disk yet; when this returns they survive a power cut.

        Returns:
            The files that a checkpoint of this capture needs.

        Raises:
            OSError: A chunk cannot be written; a later capture writes its rows again.
        """
        try:
            chunks = self._recorder._write(self, folder)
        finally:
            self.release()
        self._state = {**self._facts, "chunks": chunks_document(chunks)}
        return [FileEntry(name=chunk_entry(c.name), bytes=c.bytes, sha256=c.sha256) for c in chunks]

    def release(self) -> None:
        """Let training overwrite the rows."""
        self._recorder._release(self)

    def rows_of(self, span: Span) -> ChunkRows:
        """Return the rows of a span as they are to be stored."""
        size = self.buffer.buffer_size
        low, high = span.start % size, (span.end - 1) % size + 1
        rows = {name: column[low:high] for name, column in self.columns.items()}
        infos = [list(row) for row in self.buffer.infos[low:high]] if keeps_infos(self.buffer) else None
        if span.end != self.clock:
            return ChunkRows(span.start, rows, infos=infos)
        for name, row in self._last.items():
            rows[name] = rows[name].copy()
            rows[name][-1] = row
        return ChunkRows(span.start, rows, self._following, infos)


class ReplayRecorder:
    """Follows the replay buffer of one `learn`, and says which of its rows each checkpoint has to write.

    Args:
        model: Any algorithm; one without a replay buffer has `reason` to capture nothing.

    Attributes:
        reason: Why the buffer is not captured; empty where it is.
        waited_seconds: How long training waited for rows that were being written.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self._model = cast("Any", model)
        self._changed = threading.Condition()
        self._in_flight: list[weakref.ref[ReplayCapture]] = []
        self.waited_seconds = 0.0
        self._buffer: Any = None
        self._chunks: list[Chunk] = []
        self._folder: Path | None = None
        self._begin()

    def continue_from(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from chunks that are on disk; call it after `restore_replay` and after the counters were restored.

        Args:
            state: What `restore_replay` was given.
            folder: The run folder (of the zip that was loaded) whose `replay` holds them; it is only read.
        """
        self._begin()
        if self.reason or (self._buffer.pos, self._buffer.full) != (state["pos"], state["full"]):
            return
        self._clock, self._chunks = int(state["clock"]), saved_chunks(state)
        self._counted = self._clock
        self._folder = folder / REPLAY_FOLDER

    def capture(self) -> ReplayCapture | None:
        """Return the buffer as it stands, or None where it is not captured; call it on the training thread.

        Copies no rows. Where more than half of the ring is to be written while an earlier capture still is, it waits
        for that one: the ring would come round to the rows of both.
        """
        buffer = getattr(self._model, "replay_buffer", None)
        if buffer is not self._buffer:
            self._drain()
            self._begin()
        if self.reason:
            return None
        self._follow()
        if not self._consistent():
            logger.debug("The replay buffer changed otherwise than by adding: all of it is written again")
            self._drain()
            self._begin()
        self._counted, self._timesteps = self._clock, int(self._model.num_timesteps)
        with self._changed:
            if self._folder is not None and not all((self._folder / c.name).exists() for c in self._foreign()):
                self._chunks = []
            if 2 * (self._clock - self._written_until()) > self._size:
                self._wait(lambda: not self._alive())
            capture = ReplayCapture(self, buffer, self._clock, max(self._clock - self._size, self._written_until()))
            self._in_flight.append(weakref.ref(capture))
        return capture

    def protect(self) -> float:
        """Wait if the next `add` would overwrite rows that are being written; call it before every `add`.

        Returns:
            The seconds that it waited.
        """
        if self.reason:
            return 0.0
        if not self._in_flight:
            self._follow()
            return 0.0
        with self._changed:
            self._follow()
            # With optimize_memory_usage an `add` writes the observation of the row after its own, too.
            overwritten = self._clock - self._size + bool(self._buffer.optimize_memory_usage)
            return self._wait(lambda: self._floor() > overwritten)

    def _begin(self) -> None:
        buffer: Any = getattr(self._model, "replay_buffer", None)
        self._buffer = buffer
        self.reason = uncaptured_reason(buffer)
        self._chunks, self._folder, self._adopted = [], None, False
        if self.reason:
            return
        self._size = int(buffer.buffer_size)
        self._max_rows = max(1, LARGEST_CHUNK // max(1, row_bytes(buffer)))
        if keeps_infos(buffer):
            self._max_rows = max(1, min(self._max_rows, _MOST_INFOS // buffer.n_envs))
        self._seen = int(buffer.pos)
        self._clock = self._counted = self._seen + (self._size if buffer.full else 0)
        self._timesteps = int(self._model.num_timesteps)

    def _follow(self) -> None:
        pos = int(self._buffer.pos)
        self._clock += (pos - self._seen) % self._size
        self._seen = pos

    def _consistent(self) -> bool:
        grown = (int(self._model.num_timesteps) - self._timesteps) / self._buffer.n_envs
        # Within a step the timesteps are counted and the transition is not added yet.
        counted = abs(grown - (self._clock - self._counted)) <= 1 and self._size > 3
        return counted and self._clock % self._size == self._seen and self._buffer.full == (self._clock >= self._size)

    def _written_until(self) -> int:
        return self._chunks[-1].end if self._chunks else 0

    def _foreign(self) -> list[Chunk]:
        return [] if self._adopted else self._chunks

    def _alive(self) -> list[ReplayCapture]:
        return [capture for ref in self._in_flight if (capture := ref()) is not None and not capture.abandoned]

    def _floor(self) -> float:
        """Return the clock of the oldest row that a capture in flight may still read."""
        waiting = self._written_until()
        return min(
            (c.read_from if c.started else max(c.read_from, waiting) for c in self._alive()), default=float("inf")
        )

    def _drain(self) -> None:
        with self._changed:
            self._wait(lambda: not self._alive())

    def _wait(self, done: Any) -> float:
        started = time.perf_counter()
        while not done():
            if not self._changed.wait(1.0) and time.perf_counter() - started > _PATIENCE_SECONDS:
                self._give_up()
        waited = time.perf_counter() - started
        self.waited_seconds += waited
        return waited

    def _give_up(self) -> None:
        """Stop waiting for captures that nobody writes: one of them may have been lost before it was queued."""
        if any(capture.started for capture in self._alive()):
            return
        for capture in self._alive():
            capture.abandoned = True
        logger.error("A capture of the replay buffer was never written; training goes on without it")

    def _release(self, capture: ReplayCapture) -> None:
        with self._changed:
            self._in_flight = [ref for ref in self._in_flight if ref() is not None and ref() is not capture]
            self._changed.notify_all()

    def _write(self, capture: ReplayCapture, folder: RunFolder) -> list[Chunk]:
        atomic.own_folder(folder.replay)
        needed = [chunk for chunk in self._chunks if chunk.end > capture.first]
        lost = take_over(needed, self._folder, folder)
        with self._changed:
            self._folder, self._adopted = folder.replay, True
            spans = self._plan(capture, needed, lost)
        written: list[Chunk] = []
        for index, span in enumerate(spans):
            chunk = span.chunk
            if chunk is None:
                chunk = write_rows(capture.rows_of(span), span, folder, secrets.token_hex(4))
            written.append(chunk)
            with self._changed:
                # Chunks of later rows stay known if the next one cannot be written.
                later = [c for c in self._chunks if c.start >= chunk.end] if not lost else []
                self._chunks = [*written, *later]
                capture.read_from = _first_unwritten(spans[index + 1 :])
                self._changed.notify_all()
        return written

    def _plan(self, capture: ReplayCapture, needed: list[Chunk], lost: set[str]) -> list[Span]:
        if capture.abandoned:
            raise OSError("the replay buffer's rows were overwritten before they were written")
        # The training thread may be within the `add` after its last call of `protect`.
        intact = self._clock + 2 - self._size
        present = [Span(max(c.start, capture.first), c.end, None) if c.name in lost else Span(c.start, c.end, c)
                   for c in needed]  # fmt: skip
        if any(span.chunk is None and span.start < max(0, intact) for span in present):
            self._chunks = []
            raise FileNotFoundError(f"chunks of the replay buffer are gone: {', '.join(sorted(lost))}")
        ring = Ring(self._size, self._max_rows, self._clock - self._size // 2)
        spans = plan(present, capture.first, capture.clock, ring)
        capture.read_from, capture.started = _first_unwritten(spans), True
        return spans


def _first_unwritten(spans: list[Span]) -> float:
    return min((span.start for span in spans if span.chunk is None), default=float("inf"))
