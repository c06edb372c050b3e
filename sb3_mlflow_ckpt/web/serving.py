"""Owns the server's process: its sockets, its end, and nothing of what it answers."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from sb3_mlflow_ckpt.errors import ConfigError
from sb3_mlflow_ckpt.leaving import leave
from sb3_mlflow_ckpt.signal_watch import watch

_GRACE_SECONDS = 1
# A thread that waits for a database or a disk keeps nobody waiting any longer.
_END_SECONDS = 2.0
_BACKLOG = 512


def listen(host: str, port: int, flag: str) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: A name or an address of this machine.
        port: The port; 0 for one that is free.
        flag: How the port was given, for the error.

    Raises:
        ConfigError: The port is taken or not allowed, or the host is none of this machine.
    """
    key = flag.removeprefix("--").replace("-", "_")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("host", f"{host!r} is no name or address of this machine", "--host") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # What ended a moment ago still holds the port otherwise. (Elsewhere it would let two servers share one.)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(key, host, port, flag, error) from error
    return listener


def _refused(key: str, host: str, port: int, flag: str, error: OSError) -> ConfigError:
    another = f"Choose another one with {flag}, or a free one with {flag} 0"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(key, f"the port {port} is in use by another program", hint=another)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(key, f"the port {port} needs rights that you do not have", hint=another)
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError("host", f"{host!r} is no address of this machine", "--host")
    return ConfigError(key, f"{host}:{port} cannot be used ({error.strerror or error})", hint=another)


def port_of(listener: socket.socket) -> int:
    """Return the port at which a socket listens."""
    return int(listener.getsockname()[1])


class _Server(uvicorn.Server):
    """A server that leaves signals to the process's own watch."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Ender:
    """Ends the server on the first signal, and the process where something keeps the server from ending.

    Args:
        server: The server.
    """

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server
        self._told = threading.Lock()

    def heard(self, signum: int) -> None:
        """Let the server end; a second signal hurries nothing, since it takes a second at most."""
        if self._told.acquire(blocking=False):
            self._server.should_exit = True
            # What is broken off now is no fault.
            logging.getLogger("uvicorn.error").disabled = True
            timer = threading.Timer(_END_SECONDS, leave, (0,))
            timer.daemon = True
            timer.start()

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """Do nothing: it is done."""


def make_server(app: ASGIApp, trusted_proxies: Sequence[str] = ()) -> uvicorn.Server:
    """Return a server of an application. It logs errors and no addresses, which may hold a token.

    Args:
        app: The application.
        trusted_proxies: Addresses and networks whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        lifespan="off",
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_graceful_shutdown=_GRACE_SECONDS,
        # The strict one, and the same wherever it is installed.
        http="h11",
        ws="none",
    )
    return _Server(config)


def serve(
    server: uvicorn.Server, listeners: Sequence[socket.socket], announce: Callable[[], None] = lambda: None
) -> None:
    """Serve until a signal comes.

    Args:
        server: The server.
        listeners: Where; every address is answered on each.
        announce: Is called when a signal ends the server in order, before it answers.
    """
    ender = _Ender(server)
    watch.add(ender)
    try:
        announce()
        server.run(sockets=[*listeners])
    finally:
        watch.discard(ender)
