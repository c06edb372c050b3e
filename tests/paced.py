"""A simulator whose speed a test decides: a training that is in the middle for as long as that takes."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any


class Pace:
    """How long each step of an environment takes, in all processes."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._file = folder / "pace"
        self.set(seconds)

    @property
    def wrapper(self) -> dict[str, Any]:
        """The item of `env_wrappers`."""
        return {"paced:paced": {"pace": str(self._file)}}

    def set(self, seconds: float) -> None:
        """Let each step take so long from now on; infinity holds them all."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(seconds))
        fresh.replace(self._file)


def paced(env: Any, pace: str) -> Any:
    """Return an environment whose steps take as long as the file `pace` says."""
    take_step = env.step

    def step(action: Any) -> Any:
        while (seconds := float(Path(pace).read_text())) == math.inf:
            time.sleep(0.01)
        time.sleep(seconds)
        return take_step(action)

    env.step = step
    return env
