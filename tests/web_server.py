"""Owns servers of the Training History that tests ask: in a thread of the test, or as the command that users type."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from processes import environment, wait_for

from sb3_mlflow_ckpt.runs.reader import RunReader
from sb3_mlflow_ckpt.web.app import create_app
from sb3_mlflow_ckpt.web.serving import listen, make_server, port_of
from sb3_mlflow_ckpt.web.settings import WebSettings


class Answer(NamedTuple):
    """What a server said."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int, target: str, method: str = "GET", *, headers: Mapping[str, str] | None = None, host: str | None = None
) -> Answer:
    """Ask for exactly this target: no client normalises it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    # Any bytes at all are what a hostile client sends, too.
    connection._validate_path = lambda url: None  # type: ignore[attr-defined, method-assign]
    connection._encode_request = lambda line: line.encode("latin-1")  # type: ignore[attr-defined, method-assign]
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        if host != "":
            connection.putheader("Host", host or f"localhost:{port}")
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


class ServedApp:
    """An application on a free port of the loopback, served by uvicorn in a thread.

    Args:
        store: The runs.
        settings: How they are served.
    """

    def __init__(self, store: RunReader, settings: WebSettings) -> None:
        self.app = create_app(store, settings)
        listener = listen("127.0.0.1", 0, "--port")
        self.port = port_of(listener)
        self._server = make_server(self.app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def ask(self, target: str, method: str = "GET", **settings: Any) -> Answer:
        return ask(self.port, target, method, **settings)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


class ServeCommand:
    """The command `serve` in a process of its own, with what it printed.

    Args:
        folder: Where it is started and its output kept.
        flags: Its flags.
        extra: Variables of its environment.
    """

    def __init__(self, folder: Path, *flags: object, **extra: str) -> None:
        self._log = folder / "serve.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sb3_mlflow_ckpt", "serve", *map(str, flags)],
                cwd=folder, env=environment(**extra), stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ports(self) -> tuple[int, int]:
        """Wait until it listens, and return the ports of the API and of the pages."""
        wait_for(lambda: "REST API" in self.output, "the server's start", self.process)
        found = re.findall(r"://[^/\s]+:(\d+)/", self.output)
        return int(found[1]), int(found[0])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(300)
