"""Owns the one place where a checkpoint's own pickles are opened for their settings: that can run any code.

Called only where the user said that the file is trusted.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import load_from_zip_file

from sb3_mlflow_ckpt.errors import CheckpointLoadError


def unpickled_arguments(path: Path, where: object, names: Collection[str]) -> dict[str, Any]:
    """Return the constructor's arguments of these names that are in a trusted checkpoint.

    Args:
        path: The zip.
        where: Its path or URI, for an error.
        names: The arguments; `policy` is returned as `module:Class`.

    Raises:
        CheckpointLoadError: It cannot be unpickled.
    """
    try:
        data = load_from_zip_file(path, device="cpu")[0] or {}
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:400]
        raise CheckpointLoadError(where, f"what is pickled in it cannot be read: {reason}") from error
    found = {name: data[name] for name in names if name in data}
    policy = data.get("policy_class")
    if "policy" in names and isinstance(policy, type):
        found["policy"] = f"{policy.__module__}:{policy.__qualname__}"
    return found
