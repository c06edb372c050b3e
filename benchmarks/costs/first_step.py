"""Owns the wrapper of an environment that ends the process with its first step: what is timed is the way there."""

from __future__ import annotations

import os
from typing import Any


def ends_process(env: Any) -> Any:
    """Return the environment, whose first step is the last thing that its process does."""
    env.step = lambda action: os._exit(0)
    return env
