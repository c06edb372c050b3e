"""Pages while the database is down: what was there last, with its age, or a page that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from journals import add_point, start_run
from processes import wait_for
from servers import MongoServer
from web_pages import Element, read_page
from web_server import ServedApp

from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.runs.mongo import MongoRuns
from sb3_mlflow_ckpt.web.rendering import LastGood

RUN = "a" * 32
BROWSER = {"Accept": "text/html"}


def banner(document: Element) -> str:
    return document.one("div", id="banners").text


@pytest.fixture
def database(mongo_server: Callable[[], MongoServer], tmp_path: Path) -> MongoServer:
    """A server that holds a run."""
    server = mongo_server()
    journal = start_run(tmp_path / "elsewhere", RUN, name="kept", status="completed")
    add_point(journal, 10, ep_rew_mean=1.0)
    mirror = MongoMirror(server.uri, "pages")
    mirror.replicate(journal)
    mirror.close()
    journal.close()
    return server


def test_a_database_that_stops_leaves_what_was_seen_and_comes_back(
    database: MongoServer, serve: Callable[..., ServedApp]
) -> None:
    app = serve(MongoRuns(database.uri, "pages"))
    seen = ("/training", f"/training/{RUN}")
    for address in seen:
        answer = app.ask(address, headers=BROWSER)
        assert answer.status == 200 and banner(read_page(answer.body)) == ""
    database.stop()
    for address in seen:
        answer = app.ask(address, headers=BROWSER)
        document = read_page(answer.body)
        assert answer.status == 200 and "kept" in document.one("main").text
        assert "MongoDB does not answer" in banner(document)
        assert document.one("div", id="banners").one("time").attributes["data-age"] == "ago"
        again = app.ask(address, headers={**BROWSER, "If-None-Match": answer.headers["etag"]})
        assert again.status == 304
    never_seen = app.ask("/training?q=kept", headers=BROWSER)
    assert (never_seen.status, never_seen.headers["retry-after"]) == (503, "5")
    assert "MongoDB does not answer" in read_page(never_seen.body).one("h1").text
    assert app.ask("/api", headers=BROWSER).status == app.ask("/static/history.css").status == 200
    database.start()
    wait_for(lambda: banner(read_page(app.ask("/training", headers=BROWSER).body)) == "", "the database's return")


def test_what_pages_showed_last_is_bounded() -> None:
    kept = LastGood()
    for number in range(1000):
        assert kept.view(f"/{number}", lambda: "shown") == ("shown", None)
    assert len(kept._kept) < 100
