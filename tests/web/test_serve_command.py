"""The command `serve`, as users start and stop it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from journals import save, start_run
from ports import free_port
from processes import environment, wait_for
from servers import SilentServer
from web_runs import FIRST
from web_server import ServeCommand, ask

from sb3_mlflow_ckpt.cli import main

TOKEN = "a-token-that-nobody-guesses"
Start = Callable[..., ServeCommand]
FREE = ("--port", 0, "--ui-port", 0)


def refused(*flags: object, code: int = 2) -> str:
    """Return the one line with which the command refuses to start."""
    done = CliRunner().invoke(main, ["serve", *map(str, flags)], env=environment())
    assert (done.exit_code, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    return line


def test_every_address_is_answered_on_both_ports(serve_command: Start, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", FIRST).close()
    ports = serve_command("--checkpoint-dir", tmp_path / "checkpoints", *FREE).ports()
    assert ports[0] != ports[1]
    answers = [ask(port, f"/api/training-runs/{FIRST}") for port in ports]
    assert answers[0].body == answers[1].body and answers[0].status == 200


def test_one_port_for_both_is_one_socket(serve_command: Start) -> None:
    port = free_port()
    assert serve_command("--port", port, "--ui-port", port).ports() == (port, port)


@pytest.mark.parametrize("flag", ["--port", "--ui-port"])
def test_a_port_in_use_is_one_line_that_names_it_and_the_flag(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(*FREE, flag, port)
    assert str(port) in line and f"{flag} 0" in line and "in use" in line


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_at_once_whoever_is_connected(serve_command: Start, tmp_path: Path, signum: int) -> None:
    journal = start_run(tmp_path / "checkpoints", FIRST)
    save(journal, 50, os.urandom(1 << 20) * 64)
    journal.close()
    command = serve_command("--checkpoint-dir", tmp_path / "checkpoints", *FREE)
    port, _ = command.ports()
    idle = http.client.HTTPConnection("localhost", port)
    idle.request("GET", "/healthz")
    assert idle.getresponse().read() == b'{"status":"ok"}'
    # A download that nobody takes, and a request that is never complete.
    slow = http.client.HTTPConnection("localhost", port)
    slow.request("GET", f"/api/training-runs/{FIRST}/checkpoints/50/download")
    assert slow.getresponse().read(1)
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        command.process.send_signal(signum)
        assert command.process.wait(20) == 0
    assert "Traceback" not in command.output
    for connection in (idle, slow):
        connection.close()


def test_a_signal_ends_it_although_a_database_keeps_it_waiting(serve_command: Start, silent_server: SilentServer) -> None:
    uri = f"mongodb://127.0.0.1:{silent_server.port}/?directConnection=true"
    command = serve_command("--mongo-uri", uri, *FREE)
    port, _ = command.ports()
    with socket.create_connection(("127.0.0.1", port)) as asking:
        asking.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_for(lambda: silent_server.accepted, "the question to the database", command.process)
        command.process.terminate()
        assert command.process.wait(20) == 0


def test_a_database_that_does_not_answer_is_told_and_served_as_503(serve_command: Start) -> None:
    closed = free_port()
    uri = f"mongodb://me:s3cretword@127.0.0.1:{closed}/?directConnection=true"
    command = serve_command("--mongo-uri", uri, *FREE)
    port, _ = command.ports()
    for path in ("/api/training-runs", f"/api/training-runs/{FIRST}", "/healthz"):
        answer = ask(port, path)
        assert (answer.status, answer.headers["retry-after"], answer.json["store"]) == (503, "5", "MongoDB")
        assert f"127.0.0.1:{closed}" in answer.json["detail"] and "s3cretword" not in answer.body.decode()
    wait_for(lambda: "Warning: MongoDB" in command.output, "the warning", command.process)
    assert "s3cretword" not in command.output
    assert len(re.findall("Warning", command.output)) == 1


def test_an_address_that_can_never_answer_is_an_error() -> None:
    assert "MongoDB" in refused("--mongo-uri", "nonsense://x", *FREE, code=1)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_others_are_let_in_only_with_a_token_and_a_name(host: str) -> None:
    line = refused("--host", host, *FREE)
    assert "--token auto" in line and "--allowed-host" in line and host in line
    assert "--allowed-host" in refused("--host", host, "--token", "auto", *FREE)
    assert "--token auto" in refused("--host", host, "--allowed-host", "x.example", *FREE)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--token", "short"), "--token auto"), (("--token", "ä" * 20), "--token auto"),
        (("--allowed-host", "http://x"), "--allowed-host"), (("--allowed-host", "x:80"), "--allowed-host"),
        (("--port", 70000), "--port"), (("--port", "x"), "--port"), (("--root-path", "history"), "--root-path"),
        (("--root-path", "//x"), "--root-path"), (("--mlflow-ui-url", "mlflow.example"), "--mlflow-ui-url"),
        (("--mlflow-ui-url", "javascript:alert(1)"), "--mlflow-ui-url"), (("--trusted-proxy", "*"), "--trusted-proxy"),
        (("--trusted-proxy", "proxy.example"), "--trusted-proxy"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line(flags: tuple[object, ...], word: str) -> None:
    assert word in refused(*FREE, *flags)


def test_a_host_that_is_not_this_machines_is_named() -> None:
    line = refused("--host", "192.0.2.1", "--token", "auto", "--allowed-host", "x", *FREE)
    assert "192.0.2.1" in line and "this machine" in line


def test_an_open_server_answers_to_its_name_with_the_token_that_it_made(serve_command: Start) -> None:
    command = serve_command("--host", "0.0.0.0", "--token", "auto", "--allowed-host", "history.example", *FREE)
    port, ui_port = command.ports()
    (token,) = re.findall(r"\?token=(\S+)", command.output)
    assert f"http://history.example:{ui_port}/training?token={token}" in command.output
    assert ask(port, "/healthz", host="history.example").status == 401
    bearer = {"Authorization": f"Bearer {token}"}
    assert ask(port, "/healthz", host="history.example", headers=bearer).status == 200
    assert ask(port, "/healthz", host="evil.example", headers=bearer).status == 421


@pytest.mark.parametrize("given", ["flag", "flag=", "variable"])
def test_the_token_is_in_no_output_and_in_no_process_title(serve_command: Start, given: str) -> None:
    flags = {"flag": ("--token", TOKEN), "flag=": (f"--token={TOKEN}",), "variable": ()}[given]
    extra = {"SB3_MLFLOW_CKPT_TOKEN": TOKEN} if given == "variable" else {}
    command = serve_command(*flags, *FREE, **extra)
    port, _ = command.ports()
    assert ask(port, f"/api/training-runs?token={TOKEN}").status == 303
    assert ask(port, f"/api/nothing?token={TOKEN}x").status == 401
    assert ask(port, "/healthz", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert TOKEN.encode() not in Path(f"/proc/{command.process.pid}/cmdline").read_bytes()
    command.process.terminate()
    assert command.process.wait(20) == 0
    assert TOKEN not in command.output


def test_a_proxy_is_believed_only_where_it_is_trusted(serve_command: Start) -> None:
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.9"}
    for flags, secure in (((), False), (("--trusted-proxy", "127.0.0.1"), True), (("--trusted-proxy", "192.0.2.0/24"), False)):
        command = serve_command("--token", TOKEN, "--root-path", "/history", *flags, *FREE, FORWARDED_ALLOW_IPS="*")
        port, _ = command.ports()
        assert "/history/training" in command.output
        answer = ask(port, f"/history/training?token={TOKEN}", headers=forwarded)
        assert ("Secure" in answer.headers["set-cookie"]) is secure
        command.stop()


def test_starting_imports_nothing_of_the_training(tmp_path: Path) -> None:
    code = (
        "import sys, json\n"
        "from sb3_mlflow_ckpt.web import serving\n"
        "serving.serve = lambda *given: None\n"
        "from sb3_mlflow_ckpt.cli import main\n"
        "try:\n    main(json.loads(sys.argv[1]))\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print(*sys.modules)\n"
    )
    for words in ('["serve", "--help"]', '["serve", "--port", "0", "--ui-port", "0"]'):
        done = subprocess.run(
            [sys.executable, "-c", code, words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        loaded = set(done.stdout.splitlines()[-1].split())
        assert not {"torch", "mlflow", "stable_baselines3", "sb3_contrib", "pymongo", "numpy"} & loaded


def test_help_names_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sb3_mlflow_ckpt", "serve", "--help"], env=environment(), capture_output=True, text=True, check=True
    )
    for flag in ("--checkpoint-dir", "--mongo-uri", "--mongo-db", "--host", "--port", "--ui-port", "--token", "--allowed-host",
                 "--mlflow-ui-url", "--root-path", "--trusted-proxy", "--open"):  # fmt: skip
        assert flag in done.stdout
