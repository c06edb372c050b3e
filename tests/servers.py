"""Owns the servers that tests start: each a process of its own, ended by its own pid."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from ports import free_port

_LISTENING = re.compile(r"listening on 127\.0\.0\.1:(\d+)")
_START_SECONDS = 240.0


class MongoServer:
    """A MongoDB-compatible server on the loopback, with its storage in a folder.

    Args:
        folder: Where storage and log lie; kept over restarts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        # Without the journal, a killed server loses writes that it acknowledged.
        return f"mongodb://127.0.0.1:{self._port}/?directConnection=true&journal=true"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @staticmethod
    def program() -> Path | None:
        """Return the server's program beside this Python, or None where it is not installed."""
        program = Path(sys.executable).with_name("secantusd-py")
        return program if program.exists() else None

    def start(self) -> None:
        """Start it, at the port that it had before if there was one, and wait until it listens."""
        program = self.program()
        assert program is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "empty.toml"
        config.touch()
        address = ["--config", str(config), "--host", "127.0.0.1", "--port", str(self._port)]
        storage = ["--storage-path", str(self._folder / "wt"), "--cache-size", "64M"]
        log = self._folder / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [program, *address, *storage], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._port = self._wait_for_port(log)

    def stop(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal and wait until it is gone; the same again does nothing."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signum)
            process.wait(300)

    def _wait_for_port(self, log: Path) -> int:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            found = _LISTENING.search(log.read_text())
            if found:
                return int(found[1])
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"The server did not start:\n{log.read_text()}")


class SilentServer:
    """A server on the loopback that accepts connections and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._accepted: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def accepted(self) -> bool:
        """Whether anybody has connected."""
        return bool(self._accepted)

    def close(self) -> None:
        """Refuse connections from now on; the same again does nothing."""
        if self._socket.fileno() < 0:
            return
        # Closing alone does not wake a thread that waits in accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()
        for connection in self._accepted:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._accepted.append(connection)


def real_mongo_uri() -> str | None:
    """Return the address of the MongoDB that the tests may use, if one was named."""
    return os.environ.get("SB3_MLFLOW_CKPT_TEST_MONGO_URI") or None
