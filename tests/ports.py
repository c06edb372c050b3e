"""Owns the ports of servers that tests start, stop and start again at the same address."""

from __future__ import annotations

import fcntl
import random
import socket
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_GIVEN = 32_768
# Ray's workers listen below.
_FIRST = 20_000
# Held as long as this process lives: a port is somebody's also while his server is stopped, or does not listen yet.
_taken: list[ExitStack] = []


def free_port() -> int:
    """Return a port at which nobody listens, and which the system gives to nobody's connection.

    From its own range, a server that comes back may find it taken: by a client that was given it meanwhile, even by
    one that asks for that very server, and then talks with itself.
    """
    first_given = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else _FIRST_GIVEN
    # Not from the seed that a test may have set: several are at it side by side.
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(_FIRST, first_given)
        # An error of each is somebody else's port: of another process, another user, or of no test at all.
        with suppress(OSError), ExitStack() as stack:
            lock = stack.enter_context(Path(tempfile.gettempdir(), f"sb3_mlflow_ckpt-tests-port-{port}").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.create_server(("127.0.0.1", port)):
                _taken.append(stack.pop_all())
                return port
