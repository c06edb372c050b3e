"""Owns putting the rows of a replay buffer back from chunks, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from sb3_mlflow_ckpt.layout import chunk_range
from sb3_mlflow_ckpt.state.replay.chunks import ChunkRows, compare_columns, describe, read_chunk
from sb3_mlflow_ckpt.state.replay.columns import Array, columns, keeps_infos, uncaptured_reason
from sb3_mlflow_ckpt.state.replay.plan import Chunk

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


def buffer_state(buffer: Any, clock: int) -> dict[str, Any]:
    """Return what a checkpoint says of a buffer beside its rows, as plain JSON."""
    state: dict[str, Any] = {
        "class": type(buffer).__name__,
        "buffer_size": int(buffer.buffer_size),
        "n_envs": int(buffer.n_envs),
        "optimize_memory_usage": bool(buffer.optimize_memory_usage),
        "columns": {name: describe(column) for name, column in columns(buffer).items()},
        "pos": int(buffer.pos),
        "full": bool(buffer.full),
        "clock": clock,
    }
    if hasattr(buffer, "_current_ep_start"):
        state["current_ep_start"] = buffer._current_ep_start.tolist()
    return state


def chunks_document(chunks: list[Chunk]) -> list[dict[str, Any]]:
    """Return the chunks of a checkpoint as plain JSON."""
    return [asdict(chunk) for chunk in chunks]


def saved_chunks(state: Mapping[str, Any]) -> list[Chunk]:
    """Return the chunks that a saved state names.

    Raises:
        ValueError: They are not the rows of its ring without a gap, or a name is no chunk's.
    """
    size, clock = int(state["buffer_size"]), int(state["clock"])
    chunks = [Chunk(**item) for item in state["chunks"]]
    at = max(0, clock - size)
    for chunk in chunks:
        if chunk_range(chunk.name) != (chunk.start, chunk.end):
            raise ValueError(f"The saved replay buffer names a chunk {chunk.name!r}, which cannot be one of its own")
        if not chunk.start <= at < chunk.end or chunk.start // size != (chunk.end - 1) // size:
            raise ValueError(f"The saved replay buffer's chunks do not hold the rows from {at} on")
        at = chunk.end
    if at != clock or clock % size != state["pos"] or bool(state["full"]) != (clock >= size):
        raise ValueError("The saved replay buffer's chunks do not end at its position")
    return chunks


def restore_replay(model: BaseAlgorithm, state: Mapping[str, Any], open_chunk: Callable[[str], IO[bytes]]) -> list[str]:
    """Put the saved rows into `model.replay_buffer`; it is unchanged in size, and empty where this fails.

    Args:
        model: The model, with its environment.
        state: What the checkpoint's state holds under `replay`.
        open_chunk: Opens a chunk by its file name.

    Returns:
        What of the buffer could not be kept; nothing where every valid row is what it was.

    Raises:
        ValueError: The buffer is of another size, number of environments or space; the message names both.
        CheckpointCorruptError: A chunk cannot be read.
        OSError: A chunk cannot be opened.
    """
    buffer = cast("Any", model).replay_buffer
    _check_fits(buffer, state)
    try:
        chunks = saved_chunks(state)
        starts = np.array(state.get("current_ep_start", ()), dtype=np.int64)
    except (KeyError, TypeError) as error:
        raise ValueError(f"The saved replay buffer is not described ({error})") from error
    if hasattr(buffer, "_current_ep_start") and starts.shape != buffer._current_ep_start.shape:
        raise ValueError("The saved replay buffer does not say where its episodes began")
    buffer.pos, buffer.full = 0, False
    size, clock, own = int(buffer.buffer_size), int(state["clock"]), columns(buffer)
    for chunk in chunks:
        with open_chunk(chunk.name) as file:
            following = _put(file, buffer, own, chunk, max(0, clock - size))
    if buffer.optimize_memory_usage and chunks:
        for name, row in following.items():
            own[name][clock % size] = row
    if hasattr(buffer, "_current_ep_start"):
        buffer._current_ep_start[...] = starts
        buffer.ep_length[...] = 0
        derive_lengths(buffer.ep_length, buffer.ep_start, buffer.dones, max(0, clock - size), clock)
    buffer.pos, buffer.full = int(state["pos"]), bool(state["full"])
    return sorted({chunk.reason for chunk in chunks if chunk.reason})


def derive_lengths(lengths: Array, starts: Array, dones: Array, first: int, clock: int) -> None:
    """Fill the episode lengths of a HerReplayBuffer's valid rows.

    Its own rule: an episode's rows get its length when it ends, and lose it when the first of them is overwritten.
    """
    size = len(lengths)
    rows = np.arange(first, clock)
    for env in range(lengths.shape[1]):
        for end in rows[dones[rows % size, env] != 0] + 1:
            length = int((end - starts[(end - 1) % size, env]) % size)
            if end - length >= first:
                lengths[np.arange(end - length, end) % size, env] = length


def _check_fits(buffer: Any, state: Mapping[str, Any]) -> None:
    reason = uncaptured_reason(buffer)
    if reason:
        raise ValueError(f"The replay buffer cannot be restored: {reason}")
    here = buffer_state(buffer, 0)
    differences = [
        f"saved {key} {state.get(key)!r}, this buffer's {here[key]!r}"
        for key in ("buffer_size", "n_envs", "optimize_memory_usage")
        if state.get(key) != here[key]
    ]
    saved = state.get("columns")
    differences += compare_columns(saved if isinstance(saved, Mapping) else {}, here["columns"])
    if differences:
        raise ValueError(f"The saved replay buffer does not fit: {'; '.join(differences)}")


def _put(file: IO[bytes], buffer: Any, own: dict[str, Array], chunk: Chunk, first: int) -> dict[str, Array]:
    """Fill the rows of one chunk; return the observations after its last row."""
    size, whole, infos = int(buffer.buffer_size), chunk.start >= first, keeps_infos(buffer)
    low, high = chunk.start % size, (chunk.end - 1) % size + 1
    rows = {name: column[low:high] for name, column in own.items()}
    # Rows that were overwritten since stand in the chunk as well, and their places hold newer ones.
    target = rows if whole else {name: np.empty_like(array) for name, array in rows.items()}
    following, saved_infos = read_chunk(file, ChunkRows(chunk.start, target), chunk.name, infos=infos)
    skipped = max(0, first - chunk.start)
    if not whole:
        for name, array in rows.items():
            array[skipped:] = target[name][skipped:]
    if infos:
        for row in range(skipped, chunk.end - chunk.start):
            kept = saved_infos[row] if saved_infos is not None else [{} for _ in range(buffer.n_envs)]
            buffer.infos[low + row] = kept
    return following
