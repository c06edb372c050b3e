"""Owns the coding of a stretch of observations as streams of frames, so that what overlaps is stored once.

Observations repeat themselves: the next observation of a transition is the observation of the one after it, and a
stack of frames shares all but its newest frame with the stack before. Each environment becomes one stream of frames,
and each observation a window on it that is the same as the one before, moved by one frame, or begun anew. Equality is
of bytes: NaN equals itself, 0.0 differs from -0.0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SAME, MOVED, FULL = 0, 1, 2

_BLOCK_BYTES = 4 * 2**20
_SMALL_BLOCK = 2**18
_SAMPLES = 32


class Stack(NamedTuple):
    """How an observation is stacked: `depth` frames of `size` slices along its first or last axis."""

    last: bool
    size: int
    depth: int


NO_STACK = Stack(last=False, size=0, depth=1)


class Stream(NamedTuple):
    """Observations in coded form.

    Attributes:
        stack: How one is cut into frames.
        kinds: For each observation and environment SAME, MOVED or FULL.
        frames: The frames, environment after environment.
    """

    stack: Stack
    kinds: NDArray[np.uint8]
    frames: Array


def encode_pairs(before: Array, after: Array) -> Stream:
    """Code observations and next observations (rows, environments, ...); both are read where they lie."""
    stack = find_stack(before, after)
    kinds = np.full((2 * len(before), before.shape[1]), FULL, dtype=np.uint8)
    kinds[1::2][moved_rows(before, after, stack)] = MOVED
    if len(before) > 1:
        kinds[2::2][equal_rows(before[1:], after[:-1])] = SAME
    return Stream(stack, kinds, _gather(kinds, stack, {0: before, 1: after}))


def encode_sequence(observations: Array) -> Stream:
    """Code observations (rows, environments, ...) of which each follows the one before."""
    before, after = observations[:-1], observations[1:]
    stack = find_stack(before, after)
    kinds = np.full(observations.shape[:2], FULL, dtype=np.uint8)
    kinds[1:][moved_rows(before, after, stack)] = MOVED
    return Stream(stack, kinds, _gather(kinds, stack, {0: observations}))


def decode_pairs(stream: Stream, before: Array, after: Array) -> None:
    """Fill the arrays that `encode_pairs` was given.

    Raises:
        ValueError: The stream does not fit them, or is not whole.
    """
    windows = _windows(stream, 2 * len(before), before)
    _scatter(stream, windows[1::2], after)
    # Most are the next observation of the row before, as a whole: one copy in place of one for each frame.
    before[1:] = after[:-1]
    for env in range(before.shape[1]):
        rows = np.flatnonzero(stream.kinds[0::2, env] != SAME)
        for slot in range(stream.stack.depth):
            split(before, stream.stack)[rows, env, slot] = stream.frames[windows[0::2, env][rows] + slot]


def decode_sequence(stream: Stream, observations: Array) -> None:
    """Fill the array that `encode_sequence` was given.

    Raises:
        ValueError: The stream does not fit it, or is not whole.
    """
    _scatter(stream, _windows(stream, len(observations), observations), observations)


def split(array: Array, stack: Stack) -> Array:
    """Return a view (rows, environments, depth, ...) of observations (rows, environments, ...) by their frames."""
    if stack.depth == 1:
        return array[:, :, np.newaxis]
    shape = array.shape
    if stack.last:
        # Cutting one axis in two never copies, whatever the strides.
        return np.moveaxis(array.reshape(*shape[:-1], stack.depth, stack.size), -2, 2)
    return array.reshape(*shape[:2], stack.depth, stack.size, *shape[3:])


def find_stack(before: Array, after: Array) -> Stack:
    """Return how observations are stacked, told from a sample of them; NO_STACK where they are not."""
    shape = before.shape[2:]
    if not shape or not before.size or before.dtype.itemsize not in (1, 2, 4, 8):
        return NO_STACK
    chosen = np.unique(np.linspace(0, before.shape[0] * before.shape[1] - 1, _SAMPLES).astype(np.int64))
    rows, envs = np.divmod(chosen, before.shape[1])
    old, new = before[rows, envs][:, np.newaxis], after[rows, envs][:, np.newaxis]
    # An observation that does not change tells nothing: every shift fits it.
    telling = ~equal_rows(old, new)[:, 0]
    old, new = old[telling], new[telling]
    best, most = NO_STACK, len(old) // 2
    for last in (False, True)[: 1 + (len(shape) > 1)]:
        length = shape[-1] if last else shape[0]
        for size in (size for size in range(1, length // 2 + 1) if length % size == 0):
            stack = Stack(last, size, length // size)
            fitting = int(moved_rows(old, new, stack).sum())
            if fitting > most:
                best, most = stack, fitting
    return best


def equal_rows(one: Array, other: Array) -> NDArray[np.bool_]:
    """Return for each row and environment whether the bytes of two arrays are equal."""
    result = np.empty(one.shape[:2], dtype=np.bool_)
    for block in _blocks(one):
        result[block] = (_words(one[block]) == _words(other[block])).all(axis=-1)
    return result


def moved_rows(before: Array, after: Array, stack: Stack) -> NDArray[np.bool_]:
    """Return for each row and environment whether `after` is the stack `before` with one newer frame."""
    result = np.zeros(before.shape[:2], dtype=np.bool_)
    if stack.depth == 1:
        return result
    slice_bytes, word = stack.size * before.dtype.itemsize, _word(stack, before)
    for block in _blocks(before):
        old, new = before[block], after[block]
        if word is not None:
            old, new = (array.view(word)[..., 0] for array in (old, new))
            kept = word.type((1 << 8 * (word.itemsize - slice_bytes)) - 1)
            same = old >> word.type(8 * slice_bytes) == new & kept
        else:
            bits = f"u{before.dtype.itemsize}"
            same = split(old.view(bits), stack)[:, :, 1:] == split(new.view(bits), stack)[:, :, :-1]
        result[block] = same.reshape(*same.shape[:2], -1).all(axis=-1)
    return result


def _blocks(array: Array) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    return (slice(start, start + step) for start in range(0, len(array), step))


def _words(array: Array) -> Array:
    """Return the bytes of each row and environment as the widest integers that they divide into."""
    flat = np.ascontiguousarray(array).reshape(*array.shape[:2], -1)
    if not flat.size:
        return flat
    width = next(width for width in (8, 4, 2, 1) if flat.shape[-1] * flat.dtype.itemsize % width == 0)
    return flat.view(f"u{width}")


def _added(kinds: NDArray[np.uint8], depth: int) -> NDArray[np.int64]:
    """Return how many frames each observation adds to its stream."""
    return np.array([0, 1, depth], dtype=np.int64)[kinds]


def _gather(kinds: NDArray[np.uint8], stack: Stack, arrays: dict[int, Array]) -> Array:
    """Return the frames of the streams; the array `first` holds every `len(arrays)`-th observation from `first` on."""
    added = _added(kinds, stack.depth)
    ends = added.cumsum(axis=0)
    totals = ends[-1] if len(ends) else np.zeros(kinds.shape[1], dtype=np.int64)
    views = {first: split(array, stack) for first, array in arrays.items()}
    frames = np.empty((int(totals.sum()), *views[0].shape[3:]), dtype=views[0].dtype)
    offset = 0
    for env, total in enumerate(totals):
        own = frames[offset : offset + int(total)]
        for first, view in views.items():
            kind, end = kinds[first :: len(views), env], ends[first :: len(views), env]
            rows = np.flatnonzero(kind == FULL)
            for slot in range(stack.depth):
                own[end[rows] - stack.depth + slot] = view[rows, env, slot]
            rows = np.flatnonzero(kind == MOVED)
            own[end[rows] - 1] = view[rows, env, stack.depth - 1]
        offset += int(total)
    return frames


def _windows(stream: Stream, count: int, target: Array) -> NDArray[np.int64]:
    """Return where in `frames` the window of each observation begins, after checking that all lie within."""
    stack, kinds, frames = stream
    shape = target.shape[2:]
    if stack.depth != 1:
        axis = -1 if stack.last else 0
        if not shape or min(stack.size, stack.depth) < 1 or stack.size * stack.depth != shape[axis]:
            raise ValueError(f"its stack of {stack.depth} frames of {stack.size} does not fit {shape}")
    elif stack != NO_STACK:
        raise ValueError("its stack is not described")
    if kinds.dtype != np.uint8 or kinds.shape != (count, target.shape[1]) or (kinds.size and kinds.max() > FULL):
        raise ValueError("it does not say what its frames are of")
    if not (kinds[:1] == FULL).all():
        raise ValueError("its first observations are not whole")
    frame_shape = split(target[:0], stack).shape[3:]
    if frames.dtype != target.dtype or frames.shape[1:] != frame_shape:
        raise ValueError(f"its frames are {frames.dtype} {frames.shape[1:]} in place of {target.dtype} {frame_shape}")
    ends = _added(kinds, stack.depth).cumsum(axis=0)
    totals = ends[-1] if len(ends) else np.zeros(target.shape[1], dtype=np.int64)
    if int(totals.sum()) != len(frames):
        raise ValueError(f"it holds {len(frames)} frames in place of {int(totals.sum())}")
    windows: NDArray[np.int64] = ends - stack.depth + (totals.cumsum() - totals)
    return windows


def _scatter(stream: Stream, windows: NDArray[np.int64], target: Array) -> None:
    stack, word = stream.stack, _word(stream.stack, target)
    view = split(target, stack)
    step = max(1, _SMALL_BLOCK // max(1, math.prod(view.shape[3:]) * view.dtype.itemsize))
    for env in range(target.shape[1]):
        for start in range(0, len(view), step):
            rows = slice(start, start + step)
            if word is not None:
                _scatter_words(stream, windows[rows, env], target[rows, env], word)
                continue
            for slot in range(stack.depth):
                view[rows, env, slot] = stream.frames[windows[rows, env] + slot]


def _scatter_words(stream: Stream, windows: NDArray[np.int64], target: Array, word: np.dtype[Any]) -> None:
    size = stream.stack.size * target.dtype.itemsize
    words = target.view(word)[..., 0]
    words[...] = 0
    for slot in range(stream.stack.depth):
        words |= stream.frames[windows + slot].view(f"u{size}")[..., 0].astype(word) << word.type(8 * size * slot)


def _word(stack: Stack, array: Array) -> np.dtype[Any] | None:
    """Return the integer that holds one stack along the last axis, or None: byte by byte is ten times slower."""
    size = stack.size * array.dtype.itemsize
    if not stack.last or sys.byteorder != "little" or size not in (1, 2, 4) or size * stack.depth not in (2, 4, 8):
        return None
    return np.dtype(f"u{size * stack.depth}")
