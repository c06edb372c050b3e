"""Owns a way that the product does not go: a process of its own writes the files, and the training's renders them.

What is measured is what that could save at best: the process knows neither a full disk nor a folder that was taken
over. What needs the training's process stays there: pickles, what is read from the replay buffer, the ledger.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from sb3_mlflow_ckpt import atomic


class WritingProcess:
    """Commits checkpoints, in place of `commit.commit_checkpoint`."""

    def __init__(self) -> None:
        from sb3_mlflow_ckpt.child_process import ChildProcess

        self._child = ChildProcess([sys.executable, __file__, str(Path(__file__).parents[2])])
        self._memory = os.memfd_create("checkpoint")

    def commit(self, folder: Any, capture: Any) -> Any:
        """Render a checkpoint into memory that both processes see, and have the other write it."""
        from sb3_mlflow_ckpt.metadata import FileEntry
        from sb3_mlflow_ckpt.state.archive import write_archive

        metadata, model, chunks = capture.metadata, capture.model, []
        try:
            if capture.replay is not None:
                chunks = capture.replay.write(folder)
                model.state["replay"] = capture.replay.state
            os.ftruncate(self._memory, 0)
            os.lseek(self._memory, 0, os.SEEK_SET)
            with open(self._memory, "wb", closefd=False) as file:
                write_archive(file, model, metadata)
        finally:
            capture.release()
        path = folder.model(metadata.episode)
        self._child.tell(
            {
                "memory": f"/proc/{os.getpid()}/fd/{self._memory}",
                "path": str(path),
                "metadata_path": str(folder.metadata(metadata.episode)),
                "metadata": {**metadata.to_json(), "files": [entry.model_dump() for entry in chunks]},
            }
        )
        entry = FileEntry.model_validate(self._child.hear())
        return metadata.model_copy(update={"files": [entry, *chunks]})


def _write(order: dict[str, Any]) -> dict[str, Any]:
    path, metadata_path = Path(order["path"]), Path(order["metadata_path"])
    with open(order["memory"], "rb") as memory, atomic.staged(path) as (file, temporary):
        entry = {"name": path.name, "bytes": os.fstat(memory.fileno()).st_size, "sha256": atomic.digest(memory)}
        at = 0
        while at < entry["bytes"]:
            at += os.sendfile(file.fileno(), memory.fileno(), at, entry["bytes"] - at)
    metadata = {**order["metadata"], "files": [entry, *order["metadata"]["files"]]}
    with atomic.staged(metadata_path) as (file, staged):
        file.write(atomic.dump_json(metadata))
    atomic.commit(temporary, path)
    atomic.commit(staged, metadata_path)
    return entry


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_write(json.loads(line))), flush=True)
