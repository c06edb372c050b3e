"""Owns a proxy before an HTTP server that holds back the answers which a test names, or wants to see a token."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class HoldingProxy:
    """Passes requests on; a held one is carried out by the server, and its answer waits until it is released.

    Args:
        uri: The server's address.
        held: What is held back: a pattern of `METHOD path`.
        before: Whether it waits before the server is asked.

    Attributes:
        token: What a request must bring; None where it is not asked for.
    """

    def __init__(self, uri: str, held: str = "$^", *, before: bool = False) -> None:
        self.token: str | None = None
        self.reached, self.released = threading.Event(), threading.Event()
        self._target = urlsplit(uri).netloc
        self._held = re.compile(held)
        self._before = before
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                proxy._pass_on(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Release what is held and refuse connections from now on."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            handler.send_error(401)
            return
        held = self._held.search(f"{handler.command} {handler.path}") is not None
        if held and self._before:
            self.reached.set()
            self.released.wait()
        connection = http.client.HTTPConnection(self._target)
        headers = {key: value for key, value in handler.headers.items() if key.lower() not in {"host", *_HOP_BY_HOP}}
        connection.request(handler.command, handler.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if held and not self._before:
            self.reached.set()
            self.released.wait()
        try:
            handler.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in _HOP_BY_HOP:
                    handler.send_header(key, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # Whoever asked has gone.


@contextmanager
def holding(uri: str, held: str = "$^", *, before: bool = False) -> Iterator[HoldingProxy]:
    """Open a proxy for a block."""
    proxy = HoldingProxy(uri, held, before=before)
    try:
        yield proxy
    finally:
        proxy.close()
