"""Answers that are sent only where they have changed."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from journals import add_point, save, start_run
from web_runs import FIRST, SECOND, write_runs
from web_server import ServedApp

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.pins import pin_checkpoint
from sb3_mlflow_ckpt.runs.folder import FolderRuns
from sb3_mlflow_ckpt.web.conditional import Bodies, matches

RUNS = "/api/training-runs"
PATHS = [
    RUNS, f"{RUNS}?limit=1", f"{RUNS}/{FIRST}", f"{RUNS}/{FIRST}/metrics", f"{RUNS}/{SECOND}/metrics?stitched=true",
    f"{RUNS}/{FIRST}/lineage", f"{RUNS}/{FIRST}/checkpoints", f"{RUNS}/{FIRST}/checkpoints/50",
    f"/api/compare?run={FIRST}&run={SECOND}", "/api/openapi.json",
]  # fmt: skip


class Counting(FolderRuns):
    """Counts what is read whole."""

    def __init__(self, checkpoint_dir: Path) -> None:
        super().__init__(checkpoint_dir)
        self.reads: list[str] = []

    def get(self, run_id: str) -> dict[str, Any]:
        self.reads.append("get")
        return super().get(run_id)

    def checkpoints(self, run_id: str, **bounds: Any) -> list[dict[str, Any]]:
        self.reads.append("checkpoints")
        return super().checkpoints(run_id, **bounds)

    def curve(self, run_id: str, points: int | None = None) -> list[dict[str, Any]]:
        self.reads.append("curve")
        return super().curve(run_id, points)


@pytest.mark.parametrize("path", PATHS)
def test_what_has_not_changed_is_not_sent_again(server: ServedApp, path: str) -> None:
    first = server.ask(path, headers={"Accept-Encoding": "gzip"})
    tag = first.headers["etag"]
    assert (first.status, first.headers["cache-control"]) == (200, "no-cache")
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', "*"):
        for method in ("GET", "HEAD"):
            again = server.ask(path, method, headers={"If-None-Match": known})
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
            assert (again.headers["cache-control"], again.headers["vary"]) == ("no-cache", "Accept-Encoding")
            assert "content-security-policy" in again.headers
    assert server.ask(path, headers={"If-None-Match": '"other"'}).status == 200
    # Weak: it stands for the document, compressed or not.
    assert server.ask(path).headers["etag"] == tag and tag.startswith("W/")


def test_a_run_that_has_not_changed_is_not_read(serve, tmp_path: Path) -> None:
    write_runs(tmp_path / "checkpoints")
    store = Counting(tmp_path / "checkpoints")
    app = serve(store)
    for path in (
        f"{RUNS}/{FIRST}",
        f"{RUNS}/{FIRST}/metrics",
        f"{RUNS}/{SECOND}/metrics?stitched=1",
        f"{RUNS}/{FIRST}/checkpoints",
    ):
        tag = app.ask(path).headers["etag"]
        assert store.reads
        store.reads.clear()
        assert app.ask(path, headers={"If-None-Match": tag}).status == 304
        # A second tab has no tag yet: the body is kept.
        assert app.ask(path).status == 200
        assert store.reads == []


def test_every_change_of_a_run_makes_another_tag(serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", FIRST)
    app = serve()
    changes = [
        lambda: save(journal, 50),
        lambda: pin_checkpoint(journal.folder.model(50)),
        lambda: add_point(journal, 10, ep_rew_mean=1.0),
        lambda: journal.update(heartbeat_at="2026-01-01T00:00:00.000Z"),
        lambda: journal.update(status="completed"),
    ]
    bodies = [app.ask(f"{RUNS}/{FIRST}")]
    for change in changes:
        change()
        answer = app.ask(f"{RUNS}/{FIRST}", headers={"If-None-Match": bodies[-1].headers["etag"]})
        assert answer.status == 200
        bodies.append(answer)
    journal.close()
    assert bodies[1].json["checkpoint_paths"][0]["pinned"] is False
    assert bodies[2].json["checkpoint_paths"][0]["pinned"] is True
    assert bodies[-1].json["status"] == "completed"
    points = app.ask(f"{RUNS}/{FIRST}/metrics").json["segments"][0]["points"]
    assert [point["num_timesteps"] for point in points] == [10]


def test_a_run_that_dies_makes_another_tag_although_nobody_writes(serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", FIRST)
    journal.update(heartbeat_at="2020-01-01T00:00:00.000Z")
    journal.close()
    app = serve()
    alive = app.ask(f"{RUNS}/{FIRST}")
    record = RunFolder(tmp_path / "checkpoints", "ppo_agent", FIRST).record
    os.utime(record, (0, 0))
    dead = app.ask(f"{RUNS}/{FIRST}", headers={"If-None-Match": alive.headers["etag"]})
    assert (alive.json["status"], dead.status, dead.json["status"]) == ("running", 200, "lost")


def test_a_change_of_an_ancestor_makes_another_tag_of_the_stitched_curve(serve, tmp_path: Path) -> None:
    journals = write_runs(tmp_path / "checkpoints")
    app = serve()
    path = f"{RUNS}/{SECOND}/metrics?stitched=true"
    tag = app.ask(path).headers["etag"]
    metrics = journals[0].folder.metrics
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:20]))
    assert app.ask(path, headers={"If-None-Match": tag}).status == 200


def test_two_servers_of_one_store_share_no_tags_of_versions(serve, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", FIRST, mlflow={"experiment_id": "1", "run_id": "2"}).close()
    one, other = serve(), serve(mlflow_ui_url="https://mlflow.example/")
    tag = one.ask(f"{RUNS}/{FIRST}").headers["etag"]
    answer = other.ask(f"{RUNS}/{FIRST}", headers={"If-None-Match": tag})
    assert answer.json["urls"]["mlflow"] == "https://mlflow.example/#/experiments/1/runs/2"


def test_bodies_are_kept_within_bounds_and_the_oldest_goes_first() -> None:
    bodies, made = Bodies(most_bytes=100), []

    def make(name: str) -> bytes:
        made.append(name)
        return name.encode() * 40

    for name in ("a", "b", "a", "c", "a", "b"):
        assert bodies.get(name, lambda name=name: make(name)) == name.encode() * 40
    assert made == ["a", "b", "c", "b"]
    assert bodies.get("huge", lambda: b"x" * 1000) == b"x" * 1000
    assert bodies.get("huge", lambda: b"y") == b"y"


def test_a_compressed_body_is_compressed_once() -> None:
    bodies, body = Bodies(), b"0123456789" * 1000
    packed = bodies.compressed("tag", body)
    assert bodies.compressed("tag", body) is packed and zlib.decompress(packed, 31) == body


@pytest.mark.parametrize(
    ("header", "known"),
    [('W/"a"', True), ('"a"', True), ('"b" , W/"a"', True), ("*", True), ('"b"', False), ("a", False), ("", False)],
)
def test_tags_are_compared_weakly(header: str, known: bool) -> None:
    assert matches(header, 'W/"a"') is known
