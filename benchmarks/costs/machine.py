"""Owns what the figures depend on: the machine, how fast it copies, writes and hashes, and the versions."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_BYTES = 64 * 2**20
_REPEATS = 5
_PACKAGES = ("torch", "stable-baselines3", "mlflow", "gymnasium", "numpy", "lightning", "orbax-checkpoint")


def describe_machine(folder: Path) -> dict[str, Any]:
    """Return the machine as plain JSON; bandwidths are bytes a second, medians of a few repeats.

    Args:
        folder: On the disk that is measured.
    """
    source, target = np.ones(_BYTES, np.uint8), np.zeros(_BYTES, np.uint8)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "file_system": _file_system(folder),
        "copy": _bandwidth(lambda: np.copyto(target, source)),
        "write": _bandwidth(lambda: _write(folder / "bandwidth", source)),
        "sha256": _bandwidth(lambda: hashlib.sha256(source).digest()),
        "load": os.getloadavg()[0],
        "versions": {"Python": platform.python_version(), **{p: v for p in _PACKAGES if (v := _version(p))}},
    }


def _bandwidth(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return _BYTES / statistics.median(seconds)


def _write(path: Path, content: np.ndarray) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    mounted = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
