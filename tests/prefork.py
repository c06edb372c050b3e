"""Starts Python programs in processes that have imported the big libraries already: two of a training's three seconds.

A server that has imported them forks; each child takes over the command, folder, environment and files that it was
given, and then runs the program as `python -m` does, to the interpreter's own end. Nothing of the product is imported
before. Whatever the start itself matters to (what is imported when, another PYTHONPATH) starts without it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LIBRARIES = ("numpy", "torch._dynamo", "sb3_contrib", "gymnasium", "mlflow", "pymongo", "yaml", "click", "pydantic")
_SIZE = struct.Struct("!i")


def start(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], output: int, errors: int, new_session: bool = False
) -> Process | subprocess.Popen[str]:
    """Start `python <words>`.

    Args:
        words: `-m` and a module, or `-c` and code, and their arguments.
        cwd: Its working folder.
        env: Its environment.
        output: The descriptor of its output.
        errors: The descriptor of its errors.
        new_session: Whether it leads a session of its own.
    """
    if hasattr(os, "pidfd_open"):
        return Process(_server().start(words, cwd, env, (output, errors), new_session=new_session))
    return subprocess.Popen(
        [sys.executable, *words], cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
        text=True, start_new_session=new_session,
    )  # fmt: skip


def run(words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `python <words>` to its end; what it prints is returned."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = start(words, cwd=cwd, env=env, output=output.fileno(), errors=errors.fileno())
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess([sys.executable, *words], code, output.read(), errors.read())


class Process:
    """What a test needs of `subprocess.Popen`.

    Args:
        connection: To the server, which has sent the process's id and will send its exit code.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = _number(connection)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code; minus a signal's number where one killed it; None while it runs."""
        if self.returncode is None and _readable(self._connection, 0.0):
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        if self.returncode is None:
            if not _readable(self._connection, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        code = _number(self._connection)
        # Until here it is a zombie, as with `Popen`: its id is nobody else's, whoever looks at it or signals it.
        self._connection.shutdown(socket.SHUT_WR)
        self._connection.recv(1)
        self._connection.close()
        self.returncode = code


class _Server:
    """The process that forks: this file, run."""

    def __init__(self) -> None:
        # A socket's path must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="prefork-")
        self._path = str(Path(self._folder.name) / "s")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._path], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self._pid = os.getpid()

    def start(
        self, words: Sequence[str], cwd: Path, env: Mapping[str, str], files: tuple[int, int], *, new_session: bool
    ) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        order = {"words": [*words], "cwd": str(cwd), "env": dict(env), "new_session": new_session}
        content = json.dumps(order).encode()
        socket.send_fds(connection, [_SIZE.pack(len(content))], [*files])
        connection.sendall(content)
        return connection

    def stop(self) -> None:
        if self._pid == os.getpid():
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._folder.cleanup()


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.stop)
    return server


def _readable(connection: socket.socket, timeout: float | None) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(timeout))


def _number(connection: socket.socket) -> int:
    content = connection.recv(_SIZE.size, socket.MSG_WAITALL)
    assert content, "the server that forks has ended"
    return int(_SIZE.unpack(content)[0])


def _serve(path: str) -> tuple[dict[str, Any], list[int]]:
    """Fork for each order, until standard input ends; return, in a child only, what it was ordered to be."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            if key.data is not None:
                pid, connection = key.data
                selector.unregister(key.fileobj)
                if key.fileobj is connection:
                    # Whoever asked for it knows, or is gone.
                    os.waitpid(pid, 0)
                    connection.close()
                    continue
                os.close(key.fd)
                with contextlib.suppress(OSError):
                    connection.send(_SIZE.pack(_exit_code(pid)))
                selector.register(connection, selectors.EVENT_READ, (pid, connection))
                continue
            connection, _ = listener.accept()
            head, files, _, _ = socket.recv_fds(connection, _SIZE.size, 2)
            order = json.loads(connection.recv(_SIZE.unpack(head)[0], socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                for item in [*selector.get_map().values()]:
                    if isinstance(item.fileobj, int):
                        os.close(item.fd)
                    if item.data is not None:
                        item.data[1].close()
                listener.close()
                connection.close()
                selector.close()
                return order, files
            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):
                connection.send(_SIZE.pack(pid))
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))


def _exit_code(pid: int) -> int:
    """Return the exit code of a child that has ended, which stays a zombie; minus a signal's number."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _become(order: Mapping[str, Any], files: Sequence[int]) -> types.ModuleType:
    """Take over what a process of its own would have been started with; return its `__main__`."""
    import numpy as np

    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, file in enumerate((nothing, *files)):
        os.dup2(file, target)
    for file in (nothing, *files):
        os.close(file)
    for number, name in ((1, "stdout"), (2, "stderr")):
        kept = {"encoding": "utf-8", "errors": "strict" if number == 1 else "backslashreplace", "closefd": False}
        stream = open(number, "w", buffering=-1 if number == 1 else 1, **kept)  # noqa: SIM115 # until the process ends
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if order["new_session"]:
        os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None
    np.random.seed()
    words = order["words"]
    sys.orig_argv[:] = [sys.executable, *words]
    sys.argv[:] = ["-m" if words[0] == "-m" else "-c", *words[2:]]
    # In place of this file's folder.
    sys.path[:1] = [str(Path.cwd()) if words[0] == "-m" else "", *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return main


if __name__ == "__main__":
    for library in _LIBRARIES:
        __import__(library)
    # What is collected at a process's end would be copied for that: the libraries are left out.
    gc.collect()
    gc.freeze()
    _order, _files = _serve(sys.argv[1])
    _main = _become(_order, _files)
    if _order["words"][0] == "-m":
        # What `python -m` calls.
        runpy._run_module_as_main(_order["words"][1])
    else:
        exec(compile(_order["words"][1], "<string>", "exec"), vars(_main))
