"""Owns what of a checkpoint's tensors, arrays and counters is believed: the right types, within their bytes."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th

from sb3_mlflow_ckpt.errors import CheckpointCorruptError
from sb3_mlflow_ckpt.state.container import open_container

_INTEGERS = frozenset({"num_timesteps", "_total_timesteps", "_episode_num", "_n_updates", "_n_calls", "old_count"})
_NUMBERS = frozenset({"_current_progress_remaining", "exploration_rate"})
_INFO_BUFFERS = frozenset({"ep_info_buffer", "ep_success_buffer"})
_MOST_INFOS = 10**6
_MOST_NODES = 10**6
_DEPTH = 16
_ARRAY_KINDS = frozenset("biuf")


def load_tensors(content: bytes, device: th.device | str, name: str, *, trusted: bool = False) -> Any:
    """Return what `torch.save` wrote: tensors and plain containers, each within the bytes that are there.

    Args:
        content: The member.
        device: Where the tensors go.
        name: Its name, for the error.
        trusted: Whether sizes are believed.

    Raises:
        ValueError: It is something else.
    """
    if not trusted:
        # torch's older format has no directory: it allocates what the file claims before it reads.
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError(f"its member {name} is not in the format of torch.save")
        with open_container(io.BytesIO(content), name):
            pass
    try:
        value = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # weights_only raises UnpicklingError for a name that it does not know, and anything for made-up content.
        raise ValueError(f"its member {name} cannot be read: {reason(error)}") from error
    if not trusted:
        _check(value, name)
    return _moved(value, device)


def read_arrays(content: bytes, where: object) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of an npz whose headers claim no more than is there.

    Raises:
        ValueError: A member is no plain array.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with open_container(io.BytesIO(content), where) as container:
        for name in container.names:
            member = io.BytesIO(container.read(name))
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"its array {name} is of an unknown version")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            rest = len(member.getbuffer()) - member.tell()
            if dtype.kind not in _ARRAY_KINDS or math.prod(shape) * dtype.itemsize != rest:
                raise ValueError(f"its array {name} claims {dtype} of shape {shape}, which is not what is there")
            member.seek(0)
            arrays[name.removesuffix(".npy")] = np.load(member, allow_pickle=False)
    return arrays


def variables(value: Any, where: object) -> dict[str, Any]:
    """Return the tensors beside the state dicts (`log_ent_coef`); None stands for one that is not used."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(v is None or isinstance(v, th.Tensor) for v in value.values()):
        raise CheckpointCorruptError(where, "its pytorch_variables.pth holds something other than tensors")
    return {str(key): item for key, item in value.items()}


def state(value: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the state with nothing but known counters of the right type: their names become attributes of a model.

    Raises:
        CheckpointCorruptError: One is not what it has to be.
    """
    known = counters(value.get("counters", {}), where)
    buffers = value.get("info_buffers", {})
    if not isinstance(buffers, Mapping):
        raise CheckpointCorruptError(where, "its info_buffers are no mapping")
    infos = {}
    for name in _INFO_BUFFERS & set(buffers):
        items = buffers[name]
        if not isinstance(items, list) or len(items) > _MOST_INFOS or not all(_is_info(name, item) for item in items):
            raise CheckpointCorruptError(where, f"its {name} does not hold what is known of episodes")
        infos[name] = items
    return {**value, "counters": known, "info_buffers": infos}


def counters(value: Any, where: object) -> dict[str, Any]:
    """Return the counters that a model has, checked; others are left out."""
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(where, "its counters are no mapping")
    known = {}
    for name in (_INTEGERS | _NUMBERS) & set(value):
        item = value[name]
        whole = isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63
        if not (whole or (name in _NUMBERS and isinstance(item, float) and math.isfinite(item))):
            raise CheckpointCorruptError(where, f"its counter {name} is {str(item)[:40]!r}")
        known[name] = item
    return known


def reason(error: BaseException) -> str:
    """Return the first sentence of an error, in one line."""
    return " ".join((str(error).strip() or type(error).__name__).split())[:200]


def _is_info(name: str, item: Any) -> bool:
    if name == "ep_success_buffer":
        return isinstance(item, (bool, int, float))
    numbers = isinstance(item, Mapping) and all(isinstance(item.get(key), (int, float)) for key in ("r", "l"))
    return numbers and len(item) <= 100


def _check(value: Any, name: str) -> None:
    """Raise a ValueError for anything but plain tensors, each with its elements in memory, and plain containers."""
    seen: set[int] = set()
    level = [value]
    for _ in range(_DEPTH):
        below: list[Any] = []
        for item in level:
            if id(item) in seen:
                continue
            if isinstance(item, th.Tensor):
                _check_tensor(item, name)
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
                seen.add(id(item))
            elif isinstance(item, (list, tuple)):
                below += item
                seen.add(id(item))
            elif item is not None and not isinstance(item, (bool, int, float, str)):
                raise ValueError(f"its member {name} holds a {type(item).__name__}")
            if len(below) > _MOST_NODES:
                raise ValueError(f"its member {name} holds too much")
        level = below
        if not level:
            return
    raise ValueError(f"its member {name} is nested too deeply")


def _check_tensor(tensor: th.Tensor, name: str) -> None:
    plain = tensor.layout is th.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    # A stride of 0 makes a tensor of any size out of one number: whoever copies it fills the memory.
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"its member {name} holds a tensor whose elements are not there")


def _moved(value: Any, device: th.device | str) -> Any:
    if th.device(device).type == "cpu":
        return value
    if isinstance(value, th.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return type(value)((key, _moved(item, device)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value
