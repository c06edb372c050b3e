"""Who is answered, and what no answer tells."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from journals import start_run
from web_runs import FIRST
from web_server import ServedApp

from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.web.security import cookie_name

RUNS = "/api/training-runs"
TOKEN = "a-token-that-nobody-guesses"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Failing(FolderRuns):
    """A store that has a fault."""

    def summaries(self) -> list[dict[str, Any]]:
        raise RuntimeError("a secret of the inside")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "localhost:1", "[::1]:8000", "127.0.0.1:5173"]
)
def test_the_names_of_the_own_machine_are_answered_with_any_port(server: ServedApp, host: str) -> None:
    assert server.ask(RUNS, host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil.example",
        "evil.example#localhost", "[::1", "::1", "0.0.0.0", "localhost:x", "localhost:", "127.1", "192.168.0.1", "localhost.",
    ],
)  # fmt: skip
def test_another_sites_name_that_leads_here_reads_nothing(server: ServedApp, host: str) -> None:
    for path in (RUNS, "/healthz", "/training", "/", "/api/openapi.json"):
        answer = server.ask(path, host=host)
        assert answer.status == 421
        assert FIRST not in answer.body.decode() and "evil" not in answer.body.decode()
        if path != "/" and path != "/training":
            assert answer.json["type"] == "urn:sb3-mlflow-ckpt:wrong-host"


def test_a_request_without_a_host_or_with_two_is_refused(server: ServedApp) -> None:
    assert server.ask(RUNS, host="").status == 400
    assert server.ask(RUNS, headers={"Host": "localhost"}).status == 400


def test_a_name_that_was_allowed_is_answered(serve) -> None:
    app = serve(allowed_hosts=("History.example",))
    assert app.ask(RUNS, host="history.example:80").status == 200
    assert app.ask(RUNS, host="other.example").status == 421


def test_every_answer_bears_the_headers_and_none_of_them_opens_it_to_other_sites(serve, tmp_path: Path) -> None:
    app = serve(Failing(tmp_path))
    answers = {
        200: app.ask("/healthz"), 304: app.ask("/api/openapi.json", headers={"If-None-Match": "*"}), 308: app.ask("/x/"),
        404: app.ask("/x"), 405: app.ask(RUNS, "POST"), 421: app.ask("/", host="x"), 422: app.ask("/api/compare"),
        500: app.ask(RUNS, headers={"Origin": "http://evil.example"}),
        401: serve(token=TOKEN).ask("/"),
    }  # fmt: skip
    for status, answer in answers.items():
        assert answer.status == status
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "server" not in answer.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", [RUNS, f"{RUNS}/{FIRST}", f"{RUNS}/{FIRST}/checkpoints/50/download", "/healthz", "/x"])
def test_nothing_but_reading_is_allowed(server: ServedApp, method: str, path: str) -> None:
    answer = server.ask(path, method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert path == "/x" or answer.json["status"] == 405


def test_an_answer_to_a_fault_tells_nothing_of_the_inside(
    serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = serve(Failing(tmp_path))
    answer = app.ask(RUNS)
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert not any(
        word in answer.body.decode() for word in ("secret", "Traceback", "RuntimeError", ".py", str(tmp_path))
    )
    # The log does.
    assert "a secret of the inside" in caplog.text


def test_a_page_of_a_problem_that_fails_itself_leaves_the_problem(serve) -> None:
    app = serve()

    def page(request: object, problem: object) -> None:
        raise RuntimeError("a secret of the inside")

    app.app.state.problem_page = page
    answer = app.ask("/nothing")
    assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "secret" not in answer.body.decode()


def test_without_the_token_nothing_is_told(serve, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", FIRST).close()
    app = serve(token=TOKEN)
    cookie = cookie_name(TOKEN)
    wrong: list[tuple[str, dict[str, str]]] = [
        ("", {}), ("?token=", {}), ("?token=x", {}), (f"?token={TOKEN}x", {}), (f"?TOKEN={TOKEN}", {}),
        ("", {"Authorization": f"Basic {TOKEN}"}), ("", {"Authorization": "Bearer"}), ("", {"Authorization": "Bearer x"}),
        ("", {"Authorization": TOKEN}), ("", {"Cookie": f"{cookie}=x"}), ("", {"Cookie": f"{cookie}={TOKEN}"}),
        ("", {"Authorization": "Bearer \xff\xfe"}),
    ]  # fmt: skip
    for path in (RUNS, f"{RUNS}/{FIRST}", "/healthz", "/api/openapi.json", "/training", "/nothing", "/"):
        for question, headers in wrong:
            answer = app.ask(path + question, headers=headers)
            assert answer.status == 401, (path, question, headers)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert TOKEN not in answer.body.decode()
            assert "set-cookie" not in answer.headers


def test_the_token_is_given_as_bearer(serve) -> None:
    app = serve(token=TOKEN)
    assert app.ask(RUNS, headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert app.ask(RUNS, headers={"authorization": f"bearer  {TOKEN} "}).status == 200


def test_the_token_in_an_address_becomes_a_cookie_and_leaves_the_address(serve) -> None:
    app = serve(token=TOKEN)
    answer = app.ask(f"{RUNS}?limit=1&token={TOKEN}&q=a%26b+c")
    assert (answer.status, answer.headers["location"]) == (303, f"{RUNS}?limit=1&q=a%26b+c")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; ")) and "Secure" not in cookie
    assert TOKEN not in cookie
    assert app.ask(answer.headers["location"], headers={"Cookie": cookie.partition(";")[0]}).status == 200
    # Two servers on one machine share cookies, and each looks for its own.
    other = serve(token="another-token-altogether")
    assert other.ask(RUNS, headers={"Cookie": cookie.partition(";")[0]}).status == 401


def test_a_proxys_place_is_where_the_cookie_belongs_and_where_addresses_begin(serve, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", FIRST).close()
    app = serve(token=TOKEN, root_path="/history/")
    answer = app.ask(f"/history/training?token={TOKEN}")
    assert answer.headers["location"] == "/history/training"
    assert "Path=/history" in answer.headers["set-cookie"]
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    # With and without a proxy that takes its own place away.
    for path in (f"/history{RUNS}/{FIRST}", f"{RUNS}/{FIRST}"):
        assert app.ask(path, headers=bearer).json["urls"]["self"] == f"/history{RUNS}/{FIRST}"
    assert app.ask("/history", headers=bearer).headers["location"] == "/history/"
    assert app.ask(f"/history{RUNS}/", headers=bearer).headers["location"] == f"/history{RUNS}"


@pytest.mark.parametrize(
    "path", ["//evil.example/", "/%2Fevil.example/", "/\\evil.example/", "/%5Cevil.example/", "///evil.example//"]
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_no_redirect_leads_to_another_site(serve, path: str, token: str | None) -> None:
    answer = serve(token=token).ask(path + (f"?token={token}" if token else ""))
    location = answer.headers.get("location", "/")
    assert location.startswith("/") and not location.startswith(("//", "/\\"))


HOSTILE_SEGMENTS = [
    "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "..%5c..", "%00", f"{FIRST}%00", "%2e", ".", "~", "con", "%ff%fe", "%ed%b0%80",
    "{$gt:1}", "%0d%0aX-Evil:1", "%252e%252e", "\xff", "*", "'", '"', "<script>", "%", "%zz", "x" * 3000, "%E2%80%AE", "0",
    "-1", "NaN", "1e400", "9" * 5000, "%F0%9F%92%A3", "a%2Fb", "ep000050.zip", "run.json",
]  # fmt: skip


@pytest.mark.parametrize("segment", HOSTILE_SEGMENTS, ids=[str(n) for n in range(len(HOSTILE_SEGMENTS))])
def test_an_id_that_names_no_run_is_not_there(server: ServedApp, segment: str) -> None:
    for path in (
        f"{RUNS}/{segment}", f"{RUNS}/{segment}/metrics", f"{RUNS}/{segment}/lineage", f"{RUNS}/{FIRST}/checkpoints/{segment}",
        f"{RUNS}/{segment}/checkpoints/50/download", f"{RUNS}/{FIRST}/checkpoints/{segment}/download",
    ):  # fmt: skip
        answer = server.ask(path)
        assert answer.status in (400, 404), path[:200]
        assert "X-Evil" not in answer.headers
        assert b"root:" not in answer.body and b"Traceback" not in answer.body


def test_hundreds_of_hostile_requests_are_never_a_fault(server: ServedApp) -> None:
    random_numbers = random.Random(7)
    keys = [
        "limit",
        "cursor",
        "status",
        "algo",
        "env",
        "agent",
        "q",
        "sort",
        "points",
        "stitched",
        "before",
        "run",
        "x",
        "",
    ]
    values = [
        *HOSTILE_SEGMENTS, "", "true", "1", "-started_at", "running,lost", "W10", "bnVsbA", "WzEsMiwzXQ",
        "WyItc3RhcnRlZF9hdCIsTmFOLCJ4Il0", "WyItc3RhcnRlZF9hdCIsIjEiLCIiXQ", "WyItc3RhcnRlZF9hdCIsMWU5OTk5LCJ4Il0", "[" * 9000,
    ]  # fmt: skip
    paths = [
        RUNS, f"{RUNS}/{FIRST}", f"{RUNS}/{FIRST}/metrics", f"{RUNS}/{FIRST}/lineage", f"{RUNS}/{FIRST}/checkpoints",
        f"{RUNS}/{FIRST}/checkpoints/50", f"{RUNS}/{FIRST}/checkpoints/50/download", "/api/compare", "/healthz", "/api",
    ]  # fmt: skip
    headers = [
        "If-None-Match",
        "Range",
        "If-Range",
        "Accept-Encoding",
        "Authorization",
        "Cookie",
        "Accept",
        "X-Forwarded-For",
    ]
    header_values = [
        "",
        "*",
        '"',
        "W/",
        "bytes=--1",
        "bytes=1-2-3",
        "gzip;q=x",
        "\xff\xfe",
        "a" * 5000,
        ",,,;;;",
        "Bearer",
        "=;=;",
    ]
    statuses = set()
    for _ in range(300):
        path = random_numbers.choice(paths)
        if random_numbers.random() < 0.3:
            parts = path.split("/")
            parts[random_numbers.randrange(1, len(parts))] = random_numbers.choice(HOSTILE_SEGMENTS)
            path = "/".join(parts)
        question = "&".join(
            f"{random_numbers.choice(keys)}={random_numbers.choice(values)}" for _ in range(random_numbers.randrange(4))
        )
        sent = {random_numbers.choice(headers): random_numbers.choice(header_values)}
        answer = server.ask(f"{path}?{question}"[:60_000], headers=sent)
        assert answer.status < 500, (path, question, sent, answer.body)
        statuses.add(answer.status)
    assert {200, 404, 422} <= statuses


@pytest.mark.parametrize(
    "raw",
    [
        b"GET http://evil.example/api/training-runs HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /api/training-runs HTTP/1.0\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /api/training-runs HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /?" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["absolute", "old", "bytes", "nul", "two hosts", "websocket", "tls", "connect", "long"],
)  # fmt: skip
def test_what_no_client_sends_is_no_fault_either(server: ServedApp, raw: bytes) -> None:
    answer = b""
    # The server may have had enough before all is sent.
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection, suppress(ConnectionError, OSError):
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    assert not answer.startswith(b"HTTP/1.1 5")
    if raw.startswith(b"GET /api/training-runs HTTP/1.0"):
        assert b" 400 " in answer and b"urn:sb3-mlflow-ckpt:wrong-host" in answer and POLICY.encode() in answer
    assert server.ask(RUNS).status == 200
