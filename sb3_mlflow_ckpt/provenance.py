"""Owns what is recorded about the machine and the code that ran: versions, host, command, git commit."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from sb3_mlflow_ckpt.redaction import redact, redact_arguments

_PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "numpy", "mlflow", "sb3-mlflow-ckpt")


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a checkpoint means."""
    return dict(_versions())


def version_differences(recorded: Mapping[str, str]) -> str:
    """Return the versions that differ from the ones recorded, side by side, or an empty text."""
    here = versions()
    rows = [
        f"{name} {version} (checkpoint), {here.get(name, 'none')} (here)"
        for name, version in recorded.items()
        if name not in ("mlflow", "sb3-mlflow-ckpt") and here.get(name) != version
    ]
    return f"Versions differ: {'; '.join(rows)}" if rows else ""


def environment() -> dict[str, Any]:
    """Return `host`, `pid`, `command` (without credentials), `git` and `versions` of this process."""
    return {
        "host": hostname(),
        "pid": os.getpid(),
        "command": redact(shlex.join([sys.executable, *redact_arguments(sys.orig_argv[1:])])),
        "git": git_state(),
        "versions": versions(),
    }


def hostname() -> str:
    """Return how records name this machine."""
    return socket.gethostname()


def git_state() -> dict[str, Any] | None:
    """Return `{commit, dirty}` of the working folder, or None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    completed = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    return completed.stdout.strip()
