"""Owns the fault injector: compiled when it is first needed, preloaded, armed in the process that is to fail."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("injector.c")
KILL_BEFORE, KILL_AFTER, TEAR, FAIL, SHORT = 1, 2, 3, 4, 5
_SPELLED = {
    KILL_BEFORE: "killed before", KILL_AFTER: "killed after", TEAR: "killed half way through", SHORT: "cut short at",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What befalls a process at the `nth` time that it meets a point; at any point where `point` is empty."""

    action: int
    nth: int = 1
    point: str = ""
    error: int = 0
    forever: bool = False

    @property
    def kills(self) -> bool:
        return self.action in (KILL_BEFORE, KILL_AFTER, TEAR)

    def __str__(self) -> str:
        what = _SPELLED.get(self.action) or f"{errno.errorcode[self.error]}{' from then on' * self.forever} at"
        return f"{what} the {self.nth}. {self.point or 'call'}"


@dataclass(frozen=True)
class Met:
    """A call that a traced process made: its point, what was injected there, and the file."""

    point: str
    action: int
    error: int
    path: str


def library() -> Path:
    """Return the compiled injector, compiling it if this source was not compiled before."""
    name = f"injector-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / f"sb3-mlflow-ckpt-tests-{os.getuid()}" / name
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [*_compiler(), "-shared", "-fPIC", "-O2", "-o", str(fresh), str(_SOURCE), "-ldl", "-lpthread"], check=True
        )
        os.replace(fresh, path)
    return path


def _compiler() -> list[str]:
    if shutil.which("cc"):
        return ["cc"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RuntimeError("No C compiler: install one, or the extra [test]")


def arm(folder: Path, trace: Path, faults: Sequence[Fault] = (), ports: dict[int, str] | None = None) -> None:
    """Watch this process's calls below a folder and to ports; what it meets goes to `trace`."""
    injector = ctypes.CDLL(None)
    injector.injector_watch(str(folder).encode(), os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    for number, role in (ports or {}).items():
        injector.injector_port(number, role.encode())
    for fault in faults:
        injector.injector_rule(
            fault.point.encode(), ctypes.c_long(fault.nth), fault.action, fault.error, int(fault.forever)
        )


def environment_of(folder: Path, trace: Path, fault: Fault | None = None) -> dict[str, str]:
    """Return the variables that arm a program which is started with them."""
    variables = {"LD_PRELOAD": str(library()), "INJECTOR_ROOT": str(folder), "INJECTOR_TRACE": str(trace)}
    if fault is not None:
        rule = (fault.action, fault.error, int(fault.forever), fault.nth, fault.point)
        variables["INJECTOR_RULE"] = ",".join(map(str, rule))
    return variables


def read_trace(trace: Path) -> list[Met]:
    """Return what a process met, in order."""
    if not trace.exists():
        return []
    rows = (line.split("\t", 3) for line in trace.read_text(errors="replace").splitlines())
    return [Met(row[0], int(row[1]), int(row[2]), row[3]) for row in rows if len(row) == 4]
