"""Owns who is answered at all: by which name, with which token, with which method; and what every answer's headers say.

It stands before everything else, so that no route can forget it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from fastapi import Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sb3_mlflow_ckpt.web.problems import Problem, own_path, problem_of, respond_to_problem
from sb3_mlflow_ckpt.web.settings import WebSettings

logger = logging.getLogger(__name__)

METHODS = ("GET", "HEAD")
HEAD_KEY = "sb3_mlflow_ckpt.head"
"""What a scope holds where a HEAD request is answered as a GET one whose body is not sent."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_RAW_HEADERS = [(name.encode(), value.encode()) for name, value in HEADERS.items()]


class Doorkeeper:
    """Refuses what must not be answered, and lets the rest through.

    Args:
        app: What is behind it.
        settings: Who may ask.
    """

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        scope["root_path"] = self._settings.root_path
        is_head = scope["method"] == "HEAD"
        sender = _Sender(send, with_body=not is_head)
        try:
            refusal = self._refusal(scope)
            if is_head:
                scope = {**scope, "method": "GET", HEAD_KEY: True}
            await (refusal or self._app)(scope, receive, sender)
        except Exception as error:
            # Logged without the request: its address may hold the token.
            logger.exception("A request could not be answered")
            if not sender.started:
                await respond_to_problem(Request(scope), problem_of(error))(scope, receive, sender)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not let through."""
        request = Request(scope)
        problem = self._host_problem(request)
        if problem is None and scope["method"] not in METHODS:
            allow = {"Allow": ", ".join(METHODS)}
            problem = Problem(405, "Nothing can be changed here: ask with GET or HEAD", "read-only", allow)
        if problem is not None:
            return respond_to_problem(request, problem)
        return self._token_refusal(request) or _without_slash(request)

    def _host_problem(self, request: Request) -> Problem | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1:
            return Problem(400, "A request must have one Host header", "wrong-host")
        if not self._settings.admits_host(hosts[0]):
            # Another site's name that was made to lead here: its scripts must read nothing.
            detail = "This server does not answer to that name; it is told its names with --allowed-host"
            return Problem(421, detail, "wrong-host")
        return None

    def _token_refusal(self, request: Request) -> Response | None:
        token = self._settings.token
        if token is None:
            return None
        query = request.query_params.getlist("token")
        if any(_same(given, token) for given in query):
            return self._admission(request, token)
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(bearer.strip(), token):
            return None
        if _same(request.cookies.get(cookie_name(token), ""), cookie_value(token)):
            return None
        detail = (
            "A token is needed: open the address with ?token=... once, or send the header 'Authorization: Bearer ...'. "
            "The server was started with it, or printed it at its start"
        )
        challenge = {"WWW-Authenticate": 'Bearer realm="sb3-mlflow-ckpt"'}
        return respond_to_problem(request, Problem(401, detail, "token-needed", challenge))

    def _admission(self, request: Request, token: str) -> Response:
        """Return the redirect to the same address without the token, which goes into a cookie."""
        rest = [item for item in parse_qsl(_query(request), keep_blank_values=True) if item[0] != "token"]
        response = _redirect(request, 303, own_path(request.scope), urlencode(rest))
        response.set_cookie(
            cookie_name(token),
            cookie_value(token),
            path=request.scope.get("root_path") or "/",
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )
        return response


class _Sender:
    """Puts the headers on an answer, and holds back the body where none was asked for."""

    def __init__(self, send: Send, *, with_body: bool) -> None:
        self.started = False
        self._send = send
        self._with_body = with_body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": _with_headers(message.get("headers", ()))}
        elif message["type"] == "http.response.body" and not self._with_body:
            message = {**message, "body": b""}
        await self._send(message)


def _with_headers(given: Any) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in given}
    return [*given, *((name, value) for name, value in _RAW_HEADERS if name not in names)]


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode("utf-8", "surrogatepass"))


def cookie_name(token: str) -> str:
    """Return a cookie's name: servers on one machine share cookies, and each has its own token."""
    return f"sb3_mlflow_ckpt_{_digest(token, b'name')[:8]}"


def cookie_value(token: str) -> str:
    """Return what the cookie of those who know a token holds: not the token itself."""
    return _digest(token, b"value")


def _digest(token: str, purpose: bytes) -> str:
    return hmac.new(token.encode("utf-8", "surrogatepass"), purpose, hashlib.sha256).hexdigest()


def _without_slash(request: Request) -> Response | None:
    path = own_path(request.scope)
    if path == request.scope["root_path"]:
        # The place itself, without the slash behind which everything lies.
        return _redirect(request, 308, "/", _query(request))
    raw = request.scope.get("raw_path") or b"/"
    if len(path) < 2 or not path.endswith("/") or not raw.endswith(b"/"):
        return None
    return _redirect(request, 308, path, _query(request))


def _query(request: Request) -> str:
    return str(request.scope["query_string"].decode("latin-1"))


def _redirect(request: Request, status: int, path: str, query: str) -> Response:
    """Return a redirect within this server: two slashes at the beginning would lead to another one."""
    root = request.scope.get("root_path", "")
    address = quote(f"{root}/{path.strip('/')}") + (f"?{query}" if query else "")
    headers = {"Location": address, "Cache-Control": "no-store"}
    return Response(status_code=status, headers=headers)
