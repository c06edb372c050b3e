"""Owns real faults: builds `injector.c`, and arms it in this process or for another one."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("injector.c")
PRELOAD = "LD_PRELOAD"


@dataclass(frozen=True)
class Fault:
    """What happens at a call that changes the disk or talks to a server.

    Attributes:
        action: `before` or `after` (SIGKILL), `tear` (half of a write, then SIGKILL), `short` (half of a write),
            `fail` (with `error`), `fail-on` (and so does every later one); empty for none.
        at: The number of the call, from 1.
        name: Only calls of this name are counted, such as `rename:zip`; empty for all.
        error: An `errno`.
    """

    action: str = ""
    at: int = 0
    name: str = ""
    error: int = 0

    def __str__(self) -> str:
        what = f"{self.action} {errno.errorcode[self.error]}" if self.error else self.action
        return f"{what} at call {self.at}" + (f" of {self.name}" if self.name else "")


def library() -> Path:
    """Return the compiled injector: with the C compiler of the machine, else with the one of the package ziglang."""
    source = _SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"sb3_mlflow_ckpt-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"{hashlib.sha256(source).hexdigest()[:16]}.so"
    if not built.exists():
        compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
        fresh = built.with_suffix(f".{os.getpid()}")
        words = [*compiler, "-shared", "-fPIC", "-O1", "-o", str(fresh), str(_SOURCE), "-ldl", "-lpthread"]
        subprocess.run(words, check=True)
        fresh.replace(built)
    return built


def preloaded() -> bool:
    """Return whether this process can be armed."""
    return hasattr(ctypes.CDLL(None), "faults_arm")


def arm(root: Path, fault: Fault, *, ports: str = "", trace: Path | None = None, links: bool = True) -> None:
    """Count this process's calls from now on, and let the fault happen.

    Args:
        root: Only files below this folder count.
        fault: What happens.
        ports: Connections that count as well, as `mlflow=5000,mongo=27017`.
        trace: Where each call's name is written, a line each.
        links: Whether the file system has hard links.
    """
    loaded = ctypes.CDLL(None)
    texts = (str(root.resolve()), ports, str(trace or ""), fault.name)
    loaded.faults_forbid_links(0 if links else 1)
    loaded.faults_arm(
        *(text.encode() for text in texts), ctypes.c_long(fault.at), fault.action.encode(), fault.error
    )


def came() -> bool:
    """Return whether the fault that this process is armed with has come; SIGKILL leaves nobody to ask."""
    return bool(ctypes.CDLL(None).faults_came())


def disarm() -> None:
    """Let everything happen as it does."""
    ctypes.CDLL(None).faults_arm(b"", b"", b"", b"", ctypes.c_long(0), b"", 0)
    ctypes.CDLL(None).faults_forbid_links(0)
