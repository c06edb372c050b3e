"""Owns a command that does not outlive who started it: no trainer writes on beside its replacement.

A guard, in a session of its own, runs the command and holds the read end of a pipe. When the process at its other end
is gone, however it went, the guard kills its whole process group. If the guard is killed, the system kills the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SHELL = ("bash", "-c")


class SharedFate:
    """A shell command that dies with this process, with all that it has started.

    Args:
        command: What `bash -c` is given.
        cwd: Where it runs.
        env: Its environment.
    """

    def __init__(self, command: str, cwd: str | None, env: Mapping[str, str]) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "sb3_mlflow_ckpt.scale.fate_sharing"],
            stdin=subprocess.PIPE,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        # Not among its words, which everybody can read.
        self._guard.stdin.write(json.dumps(command).encode() + b"\n")
        self._guard.stdin.flush()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code as a shell reports it: 128 + the signal's number for one that died of a signal.

        Raises:
            subprocess.TimeoutExpired: It is still running.
        """
        code = self._guard.wait(timeout)
        return 128 - code if code < 0 else code

    def stop(self, grace_seconds: float) -> None:
        """Send SIGTERM to the command and all that it started; return when it has ended, or was killed."""
        if self._guard.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(grace_seconds)
        self.kill()

    def kill(self) -> None:
        """Kill whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()


def _die_with(parent: int) -> None:
    """Have the system kill this process when its parent dies; undo what Ray blocks."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _kill_at_end_of_file(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> int:
    """Run the command that stdin names, until it ends or stdin does; return its exit code as a shell reports it."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        # The whole group hears it, and the command decides. A handler, since what is ignored is so in the command, too.
        signal.signal(signum, lambda *_: None)
    line = sys.stdin.buffer.readline()
    if not line:
        return 128 + signal.SIGKILL
    guard = os.getpid()
    words = [*_SHELL, json.loads(line)]
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=lambda: _die_with(guard))
    threading.Thread(target=_kill_at_end_of_file, args=(sys.stdin.fileno(),), daemon=True).start()
    code = child.wait()
    return 128 - code if code < 0 else code


def path_of_this_python(env: Mapping[str, str]) -> str:
    """Return a PATH on which `python` is the one that runs this."""
    return f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"


if __name__ == "__main__":
    sys.exit(main())
