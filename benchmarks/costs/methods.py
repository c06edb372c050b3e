"""Owns the names of the ways to save that are compared."""

from __future__ import annotations

from costs.ours import (
    Ours,
    OursMLflow,
    OursMLflowServer,
    OursMLflowServerThread,
    OursMLflowThread,
    OursWritingProcess,
)
from costs.peers import Lightning, Orbax, TorchDistributed
from costs.saving import Copy, Method, Save, SaveMLflow, SaveMLflowServer

METHODS: dict[str, tuple[str, type[Method]]] = {
    "copy": ("memory copy of the state", Copy),
    "sb3": ("SB3 `save`", Save),
    "sb3-mlflow": ("SB3 `save` + `log_artifact`, local store", SaveMLflow),
    "sb3-server": ("SB3 `save` + `log_artifact`, server", SaveMLflowServer),
    "lightning": ("Lightning AsyncCheckpointIO", Lightning),
    "torch": ("torch.distributed.checkpoint async_save", TorchDistributed),
    "orbax": ("Orbax async", Orbax),
    "ours": ("EpisodeCheckpointCallback", Ours),
    "ours-process": ("a prototype of it: a process writes the files", OursWritingProcess),
    "ours-mlflow": ("EpisodeCheckpointCallback + MLflow, local store", OursMLflow),
    "ours-server": ("EpisodeCheckpointCallback + MLflow, server", OursMLflowServer),
    "ours-mlflow-thread": ("the same in a thread, local store", OursMLflowThread),
    "ours-server-thread": ("the same in a thread, server", OursMLflowServerThread),
}
