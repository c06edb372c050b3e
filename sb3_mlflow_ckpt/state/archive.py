"""Owns the zip: SB3's own members, so that plain `PPO.load` reads it, and ours beside them.

| member | content |
|---|---|
| `data`, `policy.pth`, `policy.optimizer.pth`, `pytorch_variables.pth`, ... | as SB3's `save` writes them |
| `sb3_mlflow_ckpt/state.json` | what is in the metadata file, but for the hashes; counters |
| `sb3_mlflow_ckpt/spaces.json`, `spaces.bin` | the observation and action space, bounds and all |
| `sb3_mlflow_ckpt/vec_normalize.npz` | statistics of VecNormalize |
| `sb3_mlflow_ckpt/exact.json`, `exact.bin` | what makes a resume exact: a document, and the arrays that it counts |

Nothing is compressed: deflating weights costs far more time than it saves bytes.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import stable_baselines3
from stable_baselines3.common.utils import get_system_info

from sb3_mlflow_ckpt import atomic, tree
from sb3_mlflow_ckpt.errors import CheckpointCorruptError, CheckpointLoadError
from sb3_mlflow_ckpt.metadata import CheckpointMetadata
from sb3_mlflow_ckpt.spaces import decode_space
from sb3_mlflow_ckpt.state import checked
from sb3_mlflow_ckpt.state.container import READ_ERRORS, Container, open_container
from sb3_mlflow_ckpt.state.embedded import STATE_MEMBER, dump_state, read_state
from sb3_mlflow_ckpt.state.model import VARIABLES, ModelCapture, plain

NORMALIZATION_MEMBER = "sb3_mlflow_ckpt/vec_normalize.npz"
EXACT_MEMBER = "sb3_mlflow_ckpt/exact.json"
EXACT_ARRAYS_MEMBER = "sb3_mlflow_ckpt/exact.bin"
_SMALL = 1 << 20
SPACES_MEMBER = "sb3_mlflow_ckpt/spaces.json"
_SPACES_ARRAYS_MEMBER = "sb3_mlflow_ckpt/spaces.bin"


def write_archive(file: atomic.HashedFile, capture: ModelCapture, metadata: CheckpointMetadata) -> None:
    """Write a checkpoint's zip.

    Args:
        file: An empty file.
        capture: The model.
        metadata: The checkpoint's metadata without `files`.
    """
    # It is never sought in, so that it can be hashed on the way.
    with zipfile.ZipFile(cast("IO[bytes]", file), "w", zipfile.ZIP_STORED) as archive:
        if capture.data is not None:
            archive.writestr("data", capture.data())
        for name in (VARIABLES, *capture.state_dicts):
            with archive.open(f"{name}.pth", "w", force_zip64=True) as member:
                for piece in capture.files[name]():
                    member.write(piece)
        archive.writestr("_stable_baselines3_version", stable_baselines3.__version__)
        archive.writestr("system_info.txt", _system_info())
        archive.writestr(STATE_MEMBER, dump_state(metadata, _text({**capture.state, "built": dict(capture.built)})))
        if capture.spaces_text is not None:
            archive.writestr(SPACES_MEMBER, capture.spaces_text.document)
            archive.writestr(_SPACES_ARRAYS_MEMBER, capture.spaces_text.arrays)
        if capture.arrays:
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **capture.arrays)
            archive.writestr(NORMALIZATION_MEMBER, buffer.getvalue())
        if capture.exact is not None:
            document, arrays = tree.encode(capture.exact)
            archive.writestr(EXACT_MEMBER, json.dumps(document))
            with archive.open(EXACT_ARRAYS_MEMBER, "w", force_zip64=True) as member:
                pieces = (piece.data for piece in tree.pieces(arrays))
                # Each write has its price; a buffer of images is not copied to save it.
                small = sum(array.nbytes for array in arrays) < _SMALL
                for piece in [memoryview(b"".join(pieces))] if small else pieces:
                    for part in atomic.slices(piece):
                        member.write(part)


def _text(state: dict[str, Any]) -> str:
    try:
        return json.dumps(state, default=plain, ensure_ascii=False)
    except TypeError:
        return json.dumps(plain(state), ensure_ascii=False)  # A key is no text.


def read_exact(path: Path) -> dict[str, Any] | None:
    """Return what `ExactCapture.state` was, or None where the checkpoint holds none.

    Raises:
        CheckpointCorruptError: It cannot be read.
    """
    try:
        with open_container(path) as archive:
            if EXACT_MEMBER not in archive:
                return None
            state = tree.decode(archive.read_json(EXACT_MEMBER), archive.read(EXACT_ARRAYS_MEMBER))
    except CheckpointCorruptError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its exact state cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointCorruptError(path, "its exact state is not a mapping")
    return state


def read_archive(path: Path, device: Any = "cpu", *, sha256: str | None = None, trusted: bool = False) -> ModelCapture:
    """Return the model in a checkpoint's zip; `data`, which holds pickles, is left out.

    Args:
        path: The zip.
        device: Where its tensors go.
        sha256: What its content must still be: it may have been exchanged since it was verified.
        trusted: Whether sizes are believed.

    Raises:
        CheckpointCorruptError: The file is no zip, or a member cannot be read.
        IncompatibleCheckpointError: The zip was not written by this package.
    """
    try:
        # One open file for all: what is hashed is what is read, whatever comes to lie at the path.
        with open(path, "rb") as file:
            check_content(file, path, sha256)
            with open_container(file, path, trusted=trusted) as container:
                state = read_state(container)
                tensors = read_tensors(container, device, trusted=trusted)
                arrays = {}
                if NORMALIZATION_MEMBER in container:
                    arrays = checked.read_arrays(container.read(NORMALIZATION_MEMBER), container.where)
                spaces = _read_spaces(container)
    except CheckpointLoadError:
        raise
    except READ_ERRORS as error:
        raise CheckpointCorruptError(path, f"its zip cannot be read ({checked.reason(error)})") from error
    variables = tensors.pop(VARIABLES, {})
    built = state.pop("built", None)
    return ModelCapture(
        data=None,
        state_dicts=tensors,
        variables=checked.variables(variables, path),
        state=checked.state(state, path),
        arrays=arrays,
        spaces=spaces,
        built=built if isinstance(built, dict) else {},
    )


def check_content(file: BinaryIO, path: Path, sha256: str | None) -> None:
    """Raise a CheckpointCorruptError if an open file is not what was verified."""
    if sha256 is not None and atomic.digest(file) != sha256:
        raise CheckpointCorruptError(path, "its SHA-256 differs from its metadata's: the content was altered")
    file.seek(0)


def read_tensors(container: Container, device: Any, *, trusted: bool = False) -> dict[str, Any]:
    """Return what the `.pth` members at the top of a zip hold, by name without the ending."""
    return {
        name.removesuffix(".pth"): checked.load_tensors(container.read(name), device, name, trusted=trusted)
        for name in sorted(container.names)
        if name.endswith(".pth") and "/" not in name
    }


def _read_spaces(container: Container) -> Mapping[str, Any] | None:
    if SPACES_MEMBER not in container:
        return None
    arrays = container.read(_SPACES_ARRAYS_MEMBER)
    encoded = tree.decode(container.read_json(SPACES_MEMBER), arrays)
    if not isinstance(encoded, dict):
        raise ValueError(f"{SPACES_MEMBER} is not a JSON object")
    return {kind: decode_space(encoded.get(kind)) for kind in ("observation", "action")}


@functools.cache
def _system_info() -> str:
    return get_system_info(print_info=False)[1]
