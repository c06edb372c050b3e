"""What the REST API answers, asked over real sockets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest
from journals import start_run
from processes import environment
from web_runs import EDITED, FAILED, FIRST, HOSTILE_NAME, LOST, ORPHAN, READABLE, SECOND, UNREADABLE, write_runs
from web_server import ServedApp

from sb3_mlflow_ckpt.runs.document import STATUSES

RUNS = "/api/training-runs"
DASHED = "11111111-1111-1111-1111-111111111111"

# The document's own words; only the id is one that is there.
SNIPPET = """
import requests

run_id = "550e8400-e29b-41d4-a716-446655440000"
response = requests.get(f"http://localhost:8000/api/training-runs/{run_id}")
run = response.json()

for checkpoint in run.get("checkpoint_paths", []):
    print(f"Episode {checkpoint['episode']}: {checkpoint['path']}")
"""
# It says port 8000, which may be taken on the machine that tests.
AT_OUR_PORT = """
import socket
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, port, *rest, **more: resolve(host, {port} if port == 8000 else port, *rest, **more)
"""


def ids(answer) -> list[str]:
    assert answer.status == 200, answer.body
    return [run["run_id"] for run in answer.json["items"]]


def problem(answer, status: int) -> dict:
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json
    assert document["status"] == status and document["title"] and document["detail"] and document["type"]
    return document


def test_the_snippet_of_the_document_prints_the_checkpoints(server: ServedApp, many_runs: Path) -> None:
    source = AT_OUR_PORT.replace("{port}", str(server.port)) + SNIPPET.replace(
        "550e8400-e29b-41d4-a716-446655440000", DASHED
    )
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment(), capture_output=True, text=True, timeout=300, check=True
    )
    folder = many_runs / "ppo_agent" / FIRST
    assert done.stdout.splitlines() == [
        f"Episode {episode}: {folder}/ep{episode:06d}.zip" for episode in (50, 100, 150, 1_000_000)
    ]


def test_a_run_is_its_record_with_its_checkpoints_and_where_more_is(server: ServedApp) -> None:
    answers = [server.ask(f"{RUNS}/{name}") for name in (FIRST, DASHED, DASHED.upper(), quote(FIRST, safe="").replace("1", "%31"))]
    assert {answer.body for answer in answers} == {answers[0].body}
    run = answers[0].json
    assert (run["run_id"], run["status"], run["config"]["seed"]) == (FIRST, "completed", 2**70)
    assert [item["state"] for item in run["checkpoint_paths"]] == ["mirrored", "mirrored", "pruned", "local"]
    assert [item["pinned"] for item in run["checkpoint_paths"]] == [True, False, False, False]
    for name in ("self", "metrics", "lineage", "checkpoints"):
        assert server.ask(run["urls"][name]).status == 200
    assert run["urls"]["page"] == f"/training/{FIRST}"
    assert run["urls"]["mlflow"] == f"http://mlflow.example:5000/#/experiments/1/runs/{FIRST}"
    assert answers[0].headers["content-type"] == "application/json"
    assert server.ask(f"{RUNS}/{SECOND}").json["urls"]["mlflow"] is None


def test_the_list_shows_every_run_that_can_be_read_the_newest_first(server: ServedApp) -> None:
    answer = server.ask(RUNS)
    # When the edited one started, nobody can tell.
    assert ids(answer) == [ORPHAN, LOST, FAILED, SECOND, FIRST, EDITED]
    listed = answer.json
    assert listed["total"] == len(READABLE) and listed["first"] == 1
    assert (listed["next_cursor"], listed["previous_cursor"]) == (None, None)
    assert set(listed["statuses"]) == set(STATUSES) and sum(listed["statuses"].values()) == len(READABLE)
    first = next(run for run in listed["items"] if run["run_id"] == FIRST)
    assert {key: first["checkpoints"][key] for key in ("count", "resumable", "waiting")} == {
        "count": 4, "resumable": 3, "waiting": 1,
    }  # fmt: skip
    assert first["checkpoints"]["latest"]["episode"] == 50
    # Nothing that grows with the length of a run.
    assert not {"config", "checkpoint_paths"} & first.keys()


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("status=failed", {FAILED}),
        ("status=failed&status=lost", {FAILED, LOST}),
        ("status=failed,lost", {FAILED, LOST}),
        ("status=", set(READABLE)),
        ("algo=sac", {FAILED, LOST}),
        ("env=Pendulum-v1", {FAILED}),
        ("agent=edited%20agent%20%C3%A9", {EDITED}),
        ("q=the+FIRST", {FIRST}),
        (f"q={DASHED}", {FIRST}),
        ("q=%E2%98%83", {FAILED}),
        ("q=nothing+of+the+kind", set()),
        ("status=lost&algo=PPO", set()),
    ],
)
def test_the_list_is_filtered(server: ServedApp, question: str, found: set[str]) -> None:
    assert set(ids(server.ask(f"{RUNS}?{question}"))) == found


@pytest.mark.parametrize("sort", ["-started_at", "started_at", "name", "-num_timesteps", "-mean_reward", "status"])
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_pages_show_each_run_once_in_the_order_of_the_whole_and_lead_back(
    server: ServedApp, sort: str, limit: int
) -> None:
    whole = ids(server.ask(f"{RUNS}?sort={sort}"))
    pages, cursor = [], ""
    while cursor is not None:
        answer = server.ask(f"{RUNS}?sort={sort}&limit={limit}&cursor={cursor}")
        pages.append(answer)
        cursor = answer.json["next_cursor"]
    assert [run_id for page in pages for run_id in ids(page)] == whole
    back = pages[-1].json["previous_cursor"]
    for page in pages[-2::-1]:
        answer = server.ask(f"{RUNS}?sort={sort}&limit={limit}&cursor={back}")
        assert ids(answer) == ids(page)
        back = answer.json["previous_cursor"]
    assert back is None


@pytest.mark.parametrize(
    ("question", "parameter"),
    [
        ("limit=0", "limit"), ("limit=501", "limit"), ("limit=x", "limit"), ("limit=", "limit"), ("sort=x", "sort"),
        ("sort=", "sort"), ("status=done", "status"), ("cursor=x", "cursor"), ("cursor=bnVsbA", "cursor"),
        ("cursor=%00", "cursor"), ("cursor=" + "A" * 5000, "cursor"),
    ],
)  # fmt: skip
def test_a_parameter_that_cannot_be_used_is_named(server: ServedApp, question: str, parameter: str) -> None:
    found = problem(server.ask(f"{RUNS}?{question}"), 422)
    assert [error["parameter"] for error in found["errors"]] == [parameter]


def test_a_cursor_of_another_order_is_refused(server: ServedApp) -> None:
    cursor = server.ask(f"{RUNS}?limit=1").json["next_cursor"]
    assert problem(server.ask(f"{RUNS}?limit=1&sort=name&cursor={cursor}"), 422)["errors"][0]["parameter"] == "cursor"


def test_a_curve_has_at_most_the_points_that_are_wanted_with_the_first_and_the_last(server: ServedApp) -> None:
    for points in (2, 10, 10_000):
        document = server.ask(f"{RUNS}/{DASHED}/metrics?points={points}").json
        assert (document["run_id"], document["stitched"]) == (FIRST, False)
        (segment,) = document["segments"]
        steps = [point["num_timesteps"] for point in segment["points"]]
        assert (segment["run_id"], segment["until_timestep"]) == (FIRST, None)
        assert steps == sorted(steps) and steps[-1] == 1990 and len(steps) <= points
    assert len(steps) == 199 and segment["points"][0]["train/loss"] is None


def test_a_stitched_curve_goes_through_the_ancestors(server: ServedApp) -> None:
    document = server.ask(f"{RUNS}/{SECOND}/metrics?stitched=true").json
    assert document["stitched"] is True
    assert [(part["run_id"], part["until_timestep"]) for part in document["segments"]] == [(FIRST, 1000), (SECOND, None)]
    steps = [point["num_timesteps"] for part in document["segments"] for point in part["points"]]
    assert steps == [*range(10, 1001, 10), *range(1010, 1500, 10)]


def test_the_lineage_names_ancestors_children_and_what_is_missing(server: ServedApp) -> None:
    parent, child, orphan = (server.ask(f"{RUNS}/{run_id}/lineage").json for run_id in (FIRST, SECOND, ORPHAN))
    assert [run["run_id"] for run in parent["children"]] == [SECOND] and parent["ancestors"] == []
    assert [run["run_id"] for run in child["ancestors"]] == [FIRST] and child["root_run_id"] == FIRST
    assert [run["run_id"] for run in child["family"]] == [FIRST, SECOND]
    assert orphan["ancestors"] == [{"run_id": "9" * 32, "missing": True, "episode": 100}]


def test_checkpoints_come_in_pages_from_the_highest_episode_down(server: ServedApp) -> None:
    page = server.ask(f"{RUNS}/{FIRST}/checkpoints?limit=3").json
    assert ([item["episode"] for item in page["items"]], page["next_before"]) == ([100, 150, 1_000_000], 100)
    page = server.ask(f"{RUNS}/{FIRST}/checkpoints?limit=3&before={page['next_before']}").json
    assert ([item["episode"] for item in page["items"]], page["next_before"]) == ([50], None)
    page = server.ask(f"{RUNS}/{FIRST}/checkpoints?before=0").json
    assert page == {"items": [], "next_before": None}


def test_runs_are_compared_in_the_order_of_the_question(server: ServedApp) -> None:
    document = server.ask(f"/api/compare?run={SECOND}&run={DASHED}").json
    assert [run["run_id"] for run in document["runs"]] == [SECOND, FIRST]
    assert {row["key"]: row["values"] for row in document["differences"]} == {
        "seed": {SECOND: 1, FIRST: 2**70},
        "learning_rate": {SECOND: 1e-4, FIRST: 3e-4},
        # The other run has none: that is not null.
        "hyperparameters.n_steps": {FIRST: 32},
    }


@pytest.mark.parametrize("question", ["", f"run={FIRST}", f"run={FIRST}&run={DASHED}", "&".join(["run=x"] * 9)])
def test_one_run_nine_runs_and_the_same_run_cannot_be_compared(server: ServedApp, question: str) -> None:
    assert problem(server.ask(f"/api/compare?{question}"), 422)["errors"][0]["parameter"] == "run"


@pytest.mark.parametrize(
    "path",
    [
        "/api/nothing", f"{RUNS}/{'8' * 32}", f"{RUNS}/{UNREADABLE}", f"{RUNS}/{'8' * 32}/metrics",
        f"{RUNS}/{'8' * 32}/metrics?stitched=1", f"{RUNS}/{'8' * 32}/lineage", f"{RUNS}/{'8' * 32}/checkpoints",
        f"{RUNS}/{FIRST}/checkpoints/51", f"{RUNS}/{FIRST}/checkpoints/x", f"{RUNS}/{FIRST}/checkpoints/-1",
        f"{RUNS}/{FIRST}/checkpoints/51/download", f"{RUNS}/{FIRST}/checkpoints/{10**30}",
        f"/api/compare?run={FIRST}&run=x", f"{RUNS}/{'x' * 2000}",
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_problem_404(server: ServedApp, path: str) -> None:
    problem(server.ask(path), 404)


def test_a_slash_at_the_end_leads_to_the_address_without(server: ServedApp) -> None:
    answer = server.ask(f"{RUNS}/?limit=1")
    assert (answer.status, answer.headers["location"]) == (308, f"{RUNS}?limit=1")


@pytest.mark.parametrize("path", [RUNS, f"{RUNS}/{FIRST}", f"{RUNS}/{FIRST}/metrics", "/healthz", "/api/openapi.json", "/nix"])
def test_head_says_what_get_says_without_the_body(server: ServedApp, path: str) -> None:
    got, head = server.ask(path), server.ask(path, "HEAD")
    got_headers, head_headers = ({k: v for k, v in answer.headers.items() if k != "date"} for answer in (got, head))
    assert (head.status, head_headers, head.body) == (got.status, got_headers, b"")
    assert int(head.headers["content-length"]) == len(got.body) > 0


def test_an_edited_record_is_shown_as_far_as_it_can_be_read(server: ServedApp) -> None:
    for path in ("", "/metrics", "/metrics?stitched=true", "/lineage", "/checkpoints", "/checkpoints/7"):
        assert server.ask(f"{RUNS}/{EDITED}{path}").status == 200
    run = server.ask(f"{RUNS}/{EDITED}").json
    assert (run["name"], run["attempt"], run["urls"]["mlflow"]) == (5, 10**299, None)
    assert server.ask(f"/api/compare?run={EDITED}&run={FIRST}").status == 200
    assert server.ask(f"{RUNS}/{FAILED}").json["name"] == HOSTILE_NAME


def test_any_kind_in_any_field_of_a_record_is_no_fault(serve, tmp_path: Path) -> None:
    journal = next(j for j in write_runs(tmp_path / "checkpoints") if j.folder.run_id == SECOND)
    app, record = serve(), journal.folder.record
    whole = json.loads(record.read_bytes())
    paths = [
        RUNS, f"{RUNS}/{SECOND}", f"{RUNS}/{SECOND}/metrics?stitched=true", f"{RUNS}/{FIRST}/lineage", "/training",
        f"/training/{SECOND}",
    ]  # fmt: skip
    for key in whole.keys() - {"run_id"}:
        for value in (None, 10**299, "\udc80", [1], {"run_id": [1]}, {"type": 5, "num_timesteps": "x", "exact": "x"}):
            edited = record.with_suffix(".edited")
            edited.write_text(json.dumps({**whole, key: value}))
            edited.replace(record)
            faults = [path for path in paths if app.ask(path).status >= 500]
            assert faults == [], (key, value)


def test_an_empty_store_is_an_empty_list(serve) -> None:
    app = serve()
    listed = app.ask(RUNS).json
    assert (listed["items"], listed["total"], listed["first"], listed["next_cursor"]) == ([], 0, 0, None)
    assert app.ask("/healthz").json == {"status": "ok"}


def test_a_folder_that_vanishes_is_a_run_that_is_not_there(serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", FIRST)
    journal.close()
    app = serve()
    assert ids(app.ask(RUNS)) == [FIRST]
    shutil.rmtree(journal.folder.path)
    assert ids(app.ask(RUNS)) == []
    problem(app.ask(f"{RUNS}/{FIRST}"), 404)


def test_a_run_that_begins_is_in_the_list(serve, tmp_path: Path) -> None:
    app = serve()
    assert ids(app.ask(RUNS)) == []
    start_run(tmp_path / "checkpoints", FIRST).close()
    assert ids(app.ask(RUNS)) == [FIRST]


def test_a_large_answer_is_compressed_where_that_is_understood(server: ServedApp) -> None:
    plain = server.ask(RUNS)
    packed = server.ask(RUNS, headers={"Accept-Encoding": "br;q=1.0, gzip;q=0.8"})
    assert packed.headers["content-encoding"] == "gzip" and len(packed.body) == int(packed.headers["content-length"])
    assert zlib.decompress(packed.body, 31) == plain.body
    assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding"
    assert "content-encoding" not in server.ask(RUNS, headers={"Accept-Encoding": "gzip;q=0"}).headers
    json.loads(plain.body)
