"""Files that would leave a marker if anything in them ran."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

from sb3_mlflow_ckpt import atomic
from sb3_mlflow_ckpt.layout import metadata_path


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self._marker}'",)


def rewrite(path: Path, changes: dict[str, bytes | None], *, commit: bool = True) -> Path:
    """Replace members of a zip (None removes one), and make its metadata fit again: hashes prove no authorship."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    file = metadata_path(path)
    if commit and file.exists():
        document = json.loads(file.read_text())
        document["files"] = [{"name": path.name, "bytes": path.stat().st_size, "sha256": atomic.sha256(path)}]
        file.write_text(json.dumps(document))
    return path


def read_member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def with_malicious_data(path: Path, marker: Path) -> Path:
    """Put a payload beside each of what SB3 would unpickle."""
    data = json.loads(read_member(path, "data"))
    pickled = base64.b64encode(pickle.dumps(Payload(marker))).decode()
    data["made_up"] = {":type:": "<class 'dict'>", ":serialized:": pickled}
    return rewrite(path, {"data": json.dumps(data).encode()})


def with_config(path: Path, **settings: Any) -> Path:
    """Change a checkpoint's configuration, and how it says that its model was built."""
    state = json.loads(read_member(path, "sb3_mlflow_ckpt/state.json"))
    for key, value in settings.items():
        state["metadata"]["config"][key] = value
        if key == "hyperparameters":
            state["built"][key] = {**state["built"][key], **value}
        elif key in state["built"]:
            state["built"][key] = value
        if key == "algo":
            state["metadata"][key] = value
    document = json.loads(metadata_path(path).read_text())
    document["config"] |= settings
    document["algo"] = state["metadata"]["algo"]
    metadata_path(path).write_text(json.dumps(document))
    return rewrite(path, {"sb3_mlflow_ckpt/state.json": json.dumps(state).encode()})


def pickled_npz(marker: Path) -> bytes:
    """Return an npz with an array of objects."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, returns=np.array([Payload(marker)], dtype=object))
    return buffer.getvalue()
