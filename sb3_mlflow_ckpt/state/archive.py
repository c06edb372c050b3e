"""Owns the zip: SB3's own members, so that plain `PPO.load` reads it, and ours beside them.

| member | content |
|---|---|
| `data`, `policy.pth`, `policy.optimizer.pth`, `pytorch_variables.pth`, ... | as SB3's `save` writes them |
| `sb3_mlflow_ckpt/state.json` | what is in the metadata file, but for the hashes; counters |
| `sb3_mlflow_ckpt/vec_normalize.npz` | statistics of VecNormalize |
| `sb3_mlflow_ckpt/exact.json`, `exact.bin` | what makes a resume exact: a document, and the arrays that it counts |

Nothing is compressed: deflating weights costs far more time than it saves bytes.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import stable_baselines3
from stable_baselines3.common.utils import get_system_info

from sb3_mlflow_ckpt import tree
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, IncompatibleCheckpointError
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.state.embedded import READ_ERRORS, STATE_MEMBER, dump_state, read_state
from sb3_mlflow_ckpt.state.model import ModelCapture, dump_tensors, load_tensors

NORMALIZATION_MEMBER = "sb3_mlflow_ckpt/vec_normalize.npz"
EXACT_MEMBER = "sb3_mlflow_ckpt/exact.json"
EXACT_ARRAYS_MEMBER = "sb3_mlflow_ckpt/exact.bin"
_VARIABLES_MEMBER = "pytorch_variables.pth"


def write_archive(file: BinaryIO, capture: ModelCapture, metadata: CheckpointMetadata) -> None:
    """Write a checkpoint's zip.

    Args:
        file: An open, empty, seekable file.
        capture: The model.
        metadata: The checkpoint's metadata without `files`.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data", capture.data)
        archive.writestr(_VARIABLES_MEMBER, dump_tensors(capture.variables))
        for name, state_dict in capture.state_dicts.items():
            archive.writestr(f"{name}.pth", dump_tensors(state_dict))
        archive.writestr("_stable_baselines3_version", stable_baselines3.__version__)
        archive.writestr("system_info.txt", _system_info())
        archive.writestr(STATE_MEMBER, dump_state(metadata, capture.state))
        if capture.arrays:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **capture.arrays)
            archive.writestr(NORMALIZATION_MEMBER, buffer.getvalue())
        if capture.exact is not None:
            document, arrays = tree.encode(capture.exact)
            archive.writestr(EXACT_MEMBER, json.dumps(document))
            with archive.open(EXACT_ARRAYS_MEMBER, "w", force_zip64=True) as member:
                for piece in tree.pieces(arrays):
                    member.write(piece.data)


def read_exact(path: Path) -> dict[str, Any] | None:
    """Return what `ExactCapture.state` was, or None where the checkpoint holds none.

    Raises:
        CheckpointCorruptError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if EXACT_MEMBER not in archive.namelist():
                return None
            state = tree.decode(json.loads(archive.read(EXACT_MEMBER)), archive.read(EXACT_ARRAYS_MEMBER))
    except (*READ_ERRORS, RecursionError) as error:
        raise CheckpointCorruptError(path, f"its exact state cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointCorruptError(path, "its exact state is not a mapping")
    return state


def read_archive(path: Path, device: Any = "cpu") -> ModelCapture:
    """Return the model in a checkpoint's zip; `data`, which holds pickles, is left out.

    Raises:
        CheckpointCorruptError: The file is no zip, or a member cannot be read.
        IncompatibleCheckpointError: The zip was not written by this package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            state = read_state(archive, path)
            names = set(archive.namelist())
            tensors = {
                name.removesuffix(".pth"): load_tensors(archive.read(name), device)
                for name in sorted(names)
                if name.endswith(".pth") and "/" not in name
            }
            arrays = {}
            if NORMALIZATION_MEMBER in names:
                with np.load(io.BytesIO(archive.read(NORMALIZATION_MEMBER)), allow_pickle=False) as content:
                    arrays = {key: content[key] for key in content.files}
    except (CheckpointCorruptError, IncompatibleCheckpointError):
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({error})") from error
    variables = tensors.pop(_VARIABLES_MEMBER.removesuffix(".pth"), {})
    return ModelCapture(data="", state_dicts=tensors, variables=variables, state=state, arrays=arrays)


@functools.cache
def _system_info() -> str:
    return get_system_info(print_info=False)[1]
