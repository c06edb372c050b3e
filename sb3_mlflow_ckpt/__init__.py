"""Checkpoints, resume and run history for Stable-Baselines3, mirrored to MLflow and MongoDB.

Names are resolved lazily: `import sb3_mlflow_ckpt` imports neither torch nor mlflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_mlflow_ckpt.callback import EpisodeCheckpointCallback
    from sb3_mlflow_ckpt.checkpoints import (
        LoadedCheckpoint,
        latest_checkpoint,
        list_checkpoints,
        load_checkpoint,
        pin_checkpoint,
        prune_checkpoints,
        save_checkpoint,
        unpin_checkpoint,
        verify_checkpoint,
    )
    from sb3_mlflow_ckpt.config import TrainingConfig
    from sb3_mlflow_ckpt.env_state import CheckpointableEnv
    from sb3_mlflow_ckpt.mirrors.mlflow import MLflowMirror
    from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
    from sb3_mlflow_ckpt.trainer import train

_HOMES = {
    "CheckpointableEnv": "env_state",
    "EpisodeCheckpointCallback": "callback",
    "LoadedCheckpoint": "checkpoints",
    "MLflowMirror": "mirrors.mlflow",
    "MongoMirror": "mirrors.mongo",
    "TrainingConfig": "config",
    "latest_checkpoint": "checkpoints",
    "list_checkpoints": "checkpoints",
    "load_checkpoint": "checkpoints",
    "pin_checkpoint": "checkpoints",
    "prune_checkpoints": "checkpoints",
    "save_checkpoint": "checkpoints",
    "train": "trainer",
    "unpin_checkpoint": "checkpoints",
    "verify_checkpoint": "checkpoints",
}

__all__ = [
    "CheckpointableEnv",
    "EpisodeCheckpointCallback",
    "LoadedCheckpoint",
    "MLflowMirror",
    "MongoMirror",
    "TrainingConfig",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "pin_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
    "train",
    "unpin_checkpoint",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
