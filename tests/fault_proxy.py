"""Owns the proxy that tests put before a real server: it forwards, and goes wrong in the ways that networks and servers do.

Run as a program it stands in a process of its own, for benchmarks: `python fault_proxy.py PORT` takes modes on its input.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator

from ports import free_port

MODES = ("pass", "refuse", "hang", "hang-answer", "http-500", "http-503", "slow", "cut", "reset")
"""pass: forwards. refuse: nobody listens, and what is open ends. hang: takes everything, answers nothing.
hang-answer: the answer stops in its middle. http-500, http-503: answers so itself. slow: a few bytes at a time, late.
cut: an upload ends after `cut_after` bytes. reset: connections are reset as soon as they speak."""
_CHUNK = 1 << 16
_TICK = 0.02


class FaultProxy:
    """A TCP proxy on the loopback whose mode may be changed while connections run.

    Args:
        port: Where the real server listens on the loopback.

    Attributes:
        cut_after: Bytes of an upload that the mode `cut` lets through.
        bytes_per_second: What the mode `slow` lets through on each connection.
        latency: Seconds that the mode `slow` adds to each piece.
        faults: How often it went wrong as told.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._mode = "pass"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        self.cut_after = 1000
        self.bytes_per_second = 4000
        self.latency = 0.05
        self.faults = 0
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        return self._mode

    def set(self, mode: str) -> None:
        """Change the mode, for the connections that run as well."""
        assert mode in MODES, mode
        with self._lock:
            self._mode = mode
            if mode in ("refuse", "reset"):
                for connection in [*self._open]:
                    self._drop(connection, reset=mode == "reset")
            # Who was left hanging does not come back by itself, as after a server's restart.
            if mode == "refuse" and self._listener.fileno() >= 0:
                self._stop_listening()
            elif mode != "refuse" and self._listener.fileno() < 0:
                self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
                threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End it; the same again does nothing."""
        self._closed.set()
        with self._lock:
            for connection in [*self._open]:
                self._drop(connection, reset=False)
            if self._listener.fileno() >= 0:
                self._stop_listening()

    def _stop_listening(self) -> None:
        # Closing alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        listener = self._listener
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._held(client):
            if self._mode in ("http-500", "http-503"):
                self._answer_itself(client)
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:
                return
            server.settimeout(None)
            with self._held(server):
                back = threading.Thread(target=self._pump, args=(server, client, "down"), daemon=True)
                back.start()
                self._pump(client, server, "up")
                back.join()

    @contextlib.contextmanager
    def _held(self, connection: socket.socket) -> Iterator[None]:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        uploaded: int | None = None
        answered = 0
        try:
            while data := source.recv(_CHUNK):
                mode = self._mode
                if mode == "reset":
                    self._fail(source, sink, reset=True)
                    return
                if mode in ("http-500", "http-503") and way == "up":
                    self.faults += 1
                    self._answer(source, mode)
                    self._fail(source, sink, count=False)
                    return
                if mode == "hang":
                    self._hang(mode)
                    if self._closed.is_set() or mode != self._mode:
                        # What was swallowed is gone: the connection is of no use any more.
                        self._fail(source, sink, count=False)
                        return
                if mode == "hang-answer" and way == "down":
                    answered += len(data)
                    sink.sendall(data[: len(data) // 2])
                    self._hang(mode)
                    self._fail(source, sink, count=False)
                    return
                if mode == "cut" and way == "up":
                    if data.startswith(b"PUT "):
                        uploaded = 0
                    if uploaded is not None:
                        uploaded += len(data)
                        if uploaded > self.cut_after:
                            sink.sendall(data[: max(0, len(data) - (uploaded - self.cut_after))])
                            self._fail(source, sink)
                            return
                if mode == "slow":
                    self._trickle(sink, data)
                else:
                    sink.sendall(data)
        except OSError:
            pass
        # The other direction may have more to say, unless this one ended for good.
        for connection in (source, sink):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _hang(self, mode: str) -> None:
        self.faults += 1
        while self._mode == mode and not self._closed.wait(_TICK):
            pass

    def _trickle(self, sink: socket.socket, data: bytes) -> None:
        piece = max(1, int(self.bytes_per_second * self.latency))
        for start in range(0, len(data), piece):
            if self._mode != "slow":
                sink.sendall(data[start:])
                return
            time.sleep(self.latency)
            sink.sendall(data[start : start + piece])

    def _answer_itself(self, client: socket.socket) -> None:
        data = client.recv(_CHUNK)
        if data:
            self.faults += 1
            self._answer(client, self._mode)
            # Closing at once would reset the connection, and the answer with it, while the request still comes.
            client.settimeout(0.2)
            with contextlib.suppress(OSError):
                while client.recv(_CHUNK):
                    pass

    def _answer(self, client: socket.socket, mode: str) -> None:
        status = mode.partition("-")[2] if mode.startswith("http-") else "500"
        body = b"something went wrong"
        head = f"HTTP/1.1 {status} Fault\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close"
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + b"\r\n\r\n" + body)

    def _fail(self, *connections: socket.socket, reset: bool = False, count: bool = True) -> None:
        self.faults += count
        with self._lock:
            for connection in connections:
                self._drop(connection, reset)

    def _drop(self, connection: socket.socket, reset: bool) -> None:
        with contextlib.suppress(OSError):
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # The thread that reads it closes it, and so resets it.
                connection.shutdown(socket.SHUT_RD)
            else:
                connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Stand before a port; each line of the input is a mode, and is answered by the number of faults so far."""
    proxy = FaultProxy(int(sys.argv[1]))
    print(proxy.port, flush=True)
    for line in sys.stdin:
        proxy.set(line.strip())
        print(proxy.faults, flush=True)
    proxy.close()


if __name__ == "__main__":
    main()
