"""The pages as a served application sends them, read strictly: every state, and values of strangers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import pytest
from journals import add_point, commit, save, start_run
from processes import wait_for
from web_pages import Element, read_page
from web_runs import EDITED, FAILED, FIRST, LOST, ORPHAN, READABLE, SECOND, UNREADABLE
from web_server import ServedApp

from sb3_mlflow_ckpt.layout import RunFolder
from sb3_mlflow_ckpt.runs.folder import FolderRuns

Serve = Callable[..., ServedApp]
CONFIG = {"algo": "PPO", "env_id": "CartPole-v1", "total_timesteps": 100_000, "mlflow": False}
RUN = "a" * 32
ADDRESSES = (
    "/training",
    "/training?status=failed&status=lost&sort=name&q=a",
    "/training?q=nothing+has+this",
    "/training/compare",
    f"/training/compare?run={FIRST}&run={SECOND}&run={EDITED}",
    f"/training/compare?run={FIRST}",
    f"/training/compare?run={FIRST}&run={'0' * 32}",
    "/training/compare?" + "&".join(f"run={n}" for n in range(9)),
    f"/training/{'0' * 32}",
    f"/training/{UNREADABLE}",
    f"/training/{FIRST}?before=100",
    f"/training/{FIRST}?check=50",
    "/training?sort=x",
    "/training?cursor=x",
    "/nothing",
    "/api",
    *(f"/training/{run_id}" for run_id in READABLE),
)
BROWSER = {"Accept": "text/html"}


def page(app: ServedApp, address: str, status: int = 200) -> Element:
    answer = app.ask(address, headers=BROWSER)
    assert answer.status == status, (address, answer.status, answer.body[:500])
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return read_page(answer.body)


def verified(serve: Serve, folder: Path, **fields: object) -> ServedApp:
    """Serve a run with a checkpoint whose command can be offered."""
    journal = start_run(folder, RUN, config=CONFIG, **fields)
    save(journal, 50)
    journal.close()
    return serve()


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_every_page_is_well_formed_and_has_its_landmarks(server: ServedApp, address: str) -> None:
    answer = server.ask(address, headers=BROWSER)
    assert answer.status in (200, 404, 422)
    document = read_page(answer.body)
    assert document.one("html").attributes["lang"] == "en"
    assert document.one("head").one("title").text.endswith("· Training History")
    assert len(document.all("h1")) == 1 and document.one("h1").text
    for landmark in ("header", "main"):
        assert document.all(landmark)
    ids = {element.attributes.get("id") for element in document.all()}
    assert document.one("a", cls="skip").attributes["href"].removeprefix("#") in ids
    for head in (head for table in document.all("table") for head in table.all("th")):
        assert head.attributes["scope"] in ("col", "row")
    for element in document.all():
        for attribute in ("aria-labelledby", "for", "form"):
            assert element.attributes.get(attribute, next(iter(ids))) in ids
        if element.name in ("button", "a", "select"):
            assert element.text or element.attributes.get("aria-label"), element.attributes


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_every_link_leads_somewhere(server: ServedApp, address: str) -> None:
    document = read_page(server.ask(address, headers=BROWSER).body)
    found = [(element, name) for element in document.all() for name in ("href", "src") if name in element.attributes]
    targets = {urljoin(address, element.attributes[name]).partition("#")[0] for element, name in found} - {address}
    assert targets
    for target in targets:
        if urlsplit(target).netloc:
            assert urlsplit(target).netloc == "mlflow.example:5000"
            continue
        answer = server.ask(target)
        # A parent may be gone, and a checkpoint that somebody damaged is not handed out.
        gone = "9" * 32 in target or "/download" in target
        assert answer.status in ((200, 404, 409) if gone else (200,)), (target, answer.status)


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_a_page_that_has_not_changed_is_sent_once(server: ServedApp, address: str) -> None:
    answers = [server.ask(address, headers=BROWSER)]

    def at_rest() -> bool:
        """Checkpoints are looked into behind the first answers."""
        answers.append(server.ask(address, headers=BROWSER))
        return answers[-1].body == answers[-2].body and b"not checked yet" not in answers[-1].body

    wait_for(at_rest, "a page at rest")
    first = answers[-1]
    if first.status != 200:
        assert first.headers["cache-control"] == "no-store"
        return
    again = server.ask(address, headers={**BROWSER, "If-None-Match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


def test_the_root_leads_to_the_list(server: ServedApp) -> None:
    answer = server.ask("/")
    assert (answer.status, answer.headers["location"]) == (307, "/training")


def test_the_list_has_a_row_for_each_run_with_its_status_in_words(server: ServedApp) -> None:
    document = page(server, "/training")
    rows = {row.attributes["id"]: row for row in document.one("tbody").all("tr")}
    assert set(rows) == {f"run-{run_id}" for run_id in READABLE}
    assert "failed" in rows[f"run-{FAILED}"].text
    assert "lost No heartbeat" in rows[f"run-{LOST}"].text
    assert "resumed from ep 100 of 11111111" in rows[f"run-{SECOND}"].text
    first = rows[f"run-{FIRST}"]
    assert "the first" in first.text and "663.3" in first.text and first.all("svg", cls="sparkline")
    assert first.one("progress").attributes["value"] == "99"
    assert "4 saved 1 waiting" in first.text
    times = first.all("time")
    assert times and all(re.fullmatch(r"2026-01-01 00:\d\d UTC", time.text) for time in times)


def test_filters_keep_their_state_in_the_address(server: ServedApp) -> None:
    document = page(server, "/training?status=failed&q=script&algo=SAC&sort=name")
    assert [row.attributes["id"] for row in document.one("tbody").all("tr")] == [f"run-{FAILED}"]
    assert document.one("input", name_="q").attributes["value"] == "script"
    assert document.one("option", value="SAC").attributes.get("selected") == ""
    assert document.one("input", name_="status").attributes["value"] == "failed"
    (chip,) = [item for item in document.all("a", cls="chip") if item.attributes.get("aria-current")]
    assert chip.text == "failed 1" and "status" not in chip.attributes["href"]
    (sorted_by,) = [head for head in document.all("th") if "aria-sort" in head.attributes]
    assert (sorted_by.text, sorted_by.attributes["aria-sort"]) == ("Run", "ascending")
    assert sorted_by.one("a").attributes["data-sort"] == "name"


def test_pages_of_the_list_follow_each_other(serve: Serve, tmp_path: Path) -> None:
    for number in range(53):
        start_run(tmp_path / "checkpoints", f"{number:032x}", name=f"n{number}", status="completed").close()
    app = serve()
    first = page(app, "/training?sort=name")
    assert "1\N{EN DASH}50 of 53" in first.text
    (following,) = first.all("a", rel="next")
    second = page(app, following.attributes["href"])
    assert "51\N{EN DASH}53 of 53" in second.text and not second.all("a", rel="next")
    seen = [row.attributes["id"] for part in (first, second) for row in part.one("tbody").all("tr")]
    assert len(seen) == len(set(seen)) == 53
    (back,) = second.all("a", rel="prev")
    assert "1\N{EN DASH}50 of 53" in page(app, back.attributes["href"]).text


def test_an_empty_store_says_what_to_type(serve: Serve, tmp_path: Path) -> None:
    document = page(serve(), "/training")
    (button,) = document.all("button", cls="copy")
    command = button.attributes["data-copy"]
    assert command.startswith("python -m sb3_mlflow_ckpt.trainer ") and str(tmp_path / "checkpoints") in command
    assert command in [item.text for item in document.all("code")]


def test_a_search_without_a_result_can_be_undone(server: ServedApp) -> None:
    document = page(server, "/training?q=nothing+has+this&status=lost")
    assert "No run matches" in document.text
    assert any(link.attributes["href"] == "/training" and "Clear" in link.text for link in document.all("a"))


def test_the_list_chooses_runs_to_compare_without_a_script(server: ServedApp) -> None:
    document = page(server, "/training")
    form = document.one("form", id="compare")
    assert (form.attributes["method"], form.attributes["action"]) == ("get", "/training/compare")
    boxes = document.all("input", type="checkbox")
    assert {box.attributes["value"] for box in boxes} == set(READABLE)
    assert all(box.attributes["form"] == "compare" and box.attributes["name"] == "run" for box in boxes)
    assert document.one("button", type="submit", form="compare").text == "Compare"


def test_a_run_shows_what_is_known_of_it(server: ServedApp) -> None:
    document = page(server, f"/training/{FIRST}")
    assert document.one("h1").text == "the first"
    assert FIRST in document.one("header", id="head").text
    link = next(item for item in document.all("a") if "MLflow" in item.text)
    assert link.attributes["href"] == f"http://mlflow.example:5000/#/experiments/1/runs/{FIRST}"
    (heading,) = [item for item in document.all("h2") if item.text == "Checkpoints"]
    assert heading
    parts = [item.attributes["id"] for item in document.all("tbody") if item.attributes.get("id", "").startswith("ep-")]
    assert parts == ["ep-1000000", "ep-150", "ep-100", "ep-50"]
    pruned = document.one("tbody", id="ep-150")
    assert "pruned" in pruned.text and not pruned.all("button") and not pruned.all("code")
    assert "pinned" in document.one("tbody", id="ep-50").text
    assert document.all("svg", cls="chart") and "1,990" in document.one("tbody", id="curve-rows").text
    assert "n_steps" in document.text and str(2**70)[:5] in document.text


def test_a_run_shows_its_kin_and_what_it_changed(server: ServedApp) -> None:
    document = page(server, f"/training/{SECOND}")
    names = [item.text for item in document.one("ol", cls="lineage").all("li")]
    assert len(names) == 2 and "the first" in names[0] and "from ep 100" in names[1]
    assert "learning_rate 0.0003 → 0.0001" in document.text
    assert "the first" not in page(server, f"/training/{LOST}").text
    assert "not in this store" in page(server, f"/training/{ORPHAN}").one("ol", cls="lineage").text
    assert SECOND in "".join(
        link.attributes["href"] for link in page(server, f"/training/{FIRST}").one("ol", cls="lineage").all("a")
    )


def test_a_failed_run_shows_its_error(server: ServedApp) -> None:
    error = page(server, f"/training/{FAILED}").one("section", id="error")
    assert "ValueError" in error.text and "no </pre>" in error.text
    assert error.one("pre").text == "Traceback: <b>"


def test_values_of_strangers_are_text(server: ServedApp) -> None:
    shown = "<script>alert(1)</script> \\u202e\\x1b[31m \\udc80 ☃"
    assert page(server, f"/training/{FAILED}").one("h1").text == shown
    assert page(server, "/training").one("tr", id=f"run-{FAILED}").one("a", cls="name").text == shown
    mark = '"><img src=x onerror=alert(1)>\u202e'
    document = page(server, f"/training?q={quote(mark)}&algo={quote(mark)}")
    assert document.one("input", name_="q").attributes["value"] == mark
    assert not document.all("img")


def test_a_checkpoint_is_looked_into_behind_the_page(serve: Serve, tmp_path: Path) -> None:
    app = verified(serve, tmp_path / "checkpoints")
    said: list[str] = []

    def damaged() -> bool:
        said.append(page(app, f"/training/{RUN}").one("tbody", id="ep-50").text)
        return "damaged" in said[-1]

    # What the journals' helper writes is no zip.
    wait_for(damaged, "what came of the look")
    assert "not checked yet" in said[0]
    document = page(app, f"/training/{RUN}")
    assert not document.all("button", cls="primary") and not document.one("tbody", id="ep-50").all("div", cls="command")


def test_a_check_that_is_asked_for_is_there_at_once(serve: Serve, tmp_path: Path) -> None:
    app = verified(serve, tmp_path / "checkpoints")
    assert "damaged" in page(app, f"/training/{RUN}?check=50").one("tbody", id="ep-50").text
    assert "50" in page(app, f"/training/{RUN}?check=7").text


def test_commands_are_there_in_four_forms_of_which_a_toggle_shows_one(serve: Serve, tmp_path: Path) -> None:
    document = page(verified(serve, tmp_path / "checkpoints"), f"/training/{RUN}")
    row = document.one("tbody", id="ep-50")
    forms = {
        (item.attributes["data-program"], item.attributes["data-source"]) for item in row.all("div", cls="command")
    }
    assert forms == {(program, source) for program in ("trainer", "mlflow") for source in ("path", "uri")}
    for command in row.all("div", cls="command"):
        assert command.one("button").attributes["data-copy"] == command.one("code").text
    radios = {item.attributes["id"]: "checked" in item.attributes for item in document.all("input", type="radio")}
    assert radios == {"program-trainer": True, "program-mlflow": False, "source-path": True, "source-uri": False}
    primary = [item for item in document.all("div", cls="command") if "data-primary" in item.attributes]
    assert len(primary) == 4 and "Copy resume command" in primary[0].text


def test_older_checkpoints_are_on_pages_of_their_own(serve: Serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", RUN, config=CONFIG)
    for episode in range(1, 61):
        save(journal, episode)
    journal.close()
    app, address, seen = serve(), f"/training/{RUN}", []
    for _ in range(2):
        document = page(app, address)
        seen += [item.attributes["id"] for item in document.all("tbody") if item.attributes["id"].startswith("ep-")]
        older = [link for link in document.all("a") if link.text == "Older checkpoints"]
        address = older[0].attributes["href"].partition("#")[0] if older else ""
    assert address == "" and seen == [f"ep-{episode}" for episode in range(60, 0, -1)]


def test_a_young_run_says_what_will_come(serve: Serve, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", RUN).close()
    document = page(serve(), f"/training/{RUN}")
    assert "No checkpoint yet" in document.text and "No episode has ended yet" in document.text
    assert "heartbeat" in document.one("header", id="head").text
    assert any("data-active" in item.attributes for item in document.all())


def test_the_tag_changes_with_the_run(serve: Serve, tmp_path: Path) -> None:
    journal = start_run(tmp_path / "checkpoints", RUN)
    app = serve()
    for address in ("/training", f"/training/{RUN}"):
        before = app.ask(address, headers=BROWSER).headers["etag"]
        add_point(journal, 10 + len(address), ep_rew_mean=float(len(address)))
        journal.update(progress={"num_timesteps": 10 + len(address), "total_timesteps": 1000})
        answer = app.ask(address, headers={**BROWSER, "If-None-Match": before})
        assert answer.status == 200 and answer.headers["etag"] != before
    journal.close()


def test_runs_are_compared_side_by_side(server: ServedApp) -> None:
    document = page(server, f"/training/compare?run={SECOND}&run={FIRST}&run={SECOND}")
    assert document.one("h1").text == "2 runs compared"
    heads = document.one("table", id="sides").one("thead").all("th")
    assert ["22222222" in heads[0].text, "the first" in heads[1].text] == [True, True]
    rows = {row.one("th").text: row for row in document.all("tr", cls="differs")}
    assert set(rows) == {"hyperparameters.n_steps", "learning_rate", "seed"}
    assert [cell.text for cell in rows["hyperparameters.n_steps"].all("td")] == ["not set", "32"]
    legend = document.one("ol", cls="chart-legend").all("a")
    assert [urljoin("/training/compare", link.attributes["href"]) for link in legend] == [
        f"/training/{SECOND}", f"/training/{FIRST}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "status", "said"),
    [
        ([], 200, "No run was chosen"),
        ([FIRST], 200, "it takes two"),
        ([str(n) for n in range(9)], 200, "9 runs were chosen: at most 8"),
        ([FIRST, "<b>"], 404, "not in the store: <b>"),
    ],
    ids=["none", "one", "nine", "unknown"],
)
def test_a_comparison_that_cannot_be_made_says_why(server: ServedApp, runs: list[str], status: int, said: str) -> None:
    address = "/training/compare?" + "&".join(f"run={quote(run)}" for run in runs)
    assert said in page(server, address, status).one("main").text


def test_an_unknown_run_has_a_page_that_says_so(server: ServedApp) -> None:
    assert "There is no such run" in page(server, f"/training/{'0' * 32}", 404).text
    assert "Nothing is here" in page(server, "/training/a/b", 404).text
    assert "This address cannot be used" in page(server, "/training?status=fine", 422).text
    assert server.ask("/api/training-runs/0").headers["content-type"] == "application/problem+json"


def test_the_api_page_explains_every_route(server: ServedApp) -> None:
    document = page(server, "/api")
    described = json.loads(server.ask("/api/openapi.json").body)
    shown = [section.one("p", cls="address").all("code")[0].text for section in document.all("section", cls="route")]
    assert shown == list(described["paths"])
    for section in document.all("section", cls="route"):
        assert section.one("button").attributes["data-copy"].startswith("curl ")
    listing = document.one("section", id="list_runs")
    assert {row.one("th").text for row in listing.all("table")[0].one("tbody").all("tr")} >= {"limit", "cursor", "q"}


def test_pages_live_under_a_proxys_path(serve: Serve, tmp_path: Path) -> None:
    app = verified(serve, tmp_path / "checkpoints", root_run_id=RUN)
    del app
    proxied = serve(FolderRuns(tmp_path / "checkpoints"), root_path="/history")
    for address in ("/training", f"/training/{RUN}", "/api"):
        document = page(proxied, address)
        for element in document.all():
            for name in ("href", "src", "action"):
                target = element.attributes.get(name, "")
                assert not target.startswith("/") or target.startswith("/history/"), target


def test_static_files_have_their_types_and_no_others_are_handed_out(server: ServedApp) -> None:
    for name, kind in (
        ("history.css", "text/css"),
        ("history.js", "text/javascript"),
        ("favicon.svg", "image/svg+xml"),
    ):
        answer = server.ask(f"/static/{name}")
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind) and answer.headers["etag"]
    for name in ("..%2fapp.py", "../app.py", "app.py", "%2e%2e/app.py"):
        assert server.ask(f"/static/{name}").status == 404


def test_records_that_somebody_edited_are_shown_as_far_as_they_are_understood(serve: Serve, tmp_path: Path) -> None:
    values: list[object] = [None, True, 1, -1e308, "x\u202e", [], [1], {}, {"a": [{}]}, "2026-01-01T00:00:00.000Z"]
    folder = RunFolder(tmp_path / "checkpoints", "ppo_agent", RUN)
    start_run(tmp_path / "checkpoints", RUN).close()
    commit(folder, 7)
    whole = json.loads(folder.record.read_bytes())
    app = serve()
    for value in values:
        edited = {key: value for key in whole if key not in ("run_id", "agent_id", "schema_version")}
        records = [{**whole, **edited}, *({**whole, key: value} for key in edited)]
        records += [{**whole, part: dict.fromkeys(keys, value)} for part, keys in _PARTS.items()]
        for record in records:
            folder.record.write_text(json.dumps(record))
            for address in ("/training", f"/training/{RUN}"):
                answer = app.ask(address, headers=BROWSER)
                # A record that the reader itself refuses is as good as absent.
                assert answer.status in (200, 404), (address, value, answer.status)


_PARTS = {
    "progress": ("num_timesteps", "total_timesteps", "episode", "steps_per_second", "mean_reward", "best_mean_reward"),
    "parent": ("run_id", "checkpoint", "episode"),
    "resume": ("exact", "reason"),
    "error": ("type", "message", "traceback"),
    "mlflow": ("tracking_uri", "experiment_id", "run_id"),
    "git": ("commit", "dirty"),
    "overrides": ("a", "b"),
    "config": ("seed", "env_id", "hyperparameters", "algo", "total_timesteps", "checkpoint_dir"),
}


def test_the_trials_of_a_sweep_are_listed_as_one_group_by_a_link(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for number, sweep in enumerate(({"id": "one"}, {"id": "one"}, {"id": "two & more"}, None)):
        start_run(folder, f"{number}" * 32, config=CONFIG, sweep=sweep).close()
    app = serve()
    addresses = {link.attributes.get("href", "") for link in page(app, "/training").all("a")}
    assert {address for address in addresses if "?sweep=" in address and "sort=" not in address} == {
        "/training?sweep=one",
        "/training?sweep=two+%26+more",
    }
    rows = page(app, "/training?sweep=one").one("tbody").all("tr")
    assert {row.attributes["id"] for row in rows} == {f"run-{'0' * 32}", f"run-{'1' * 32}"}
    assert "two & more" in page(app, f"/training/{'2' * 32}").text
    listed = app.ask("/api/training-runs?sweep=two+%26+more").json["items"]
    assert [(item["run_id"], item["sweep_id"]) for item in listed] == [("2" * 32, "two & more")]
