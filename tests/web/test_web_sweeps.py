"""A sweep is one group: in the API, on the pages, and the same over every store."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from journals import add_point, save, start_run

from sb3_mlflow_ckpt.journal import RunJournal
from sb3_mlflow_ckpt.mirrors.mongo import MongoMirror
from sb3_mlflow_ckpt.runs.mongo import MongoRuns

RUNS = "/api/training-runs"
HOSTILE = "<script>alert(1)</script> & ☃"


def trial(checkpoint_dir: Path, sweep: Any, number: int, **facts: Any) -> RunJournal:
    field = {"id": sweep, "trial": f"{number:05d}", "generation": 0, **facts}
    journal = start_run(checkpoint_dir, f"{number:032d}", sweep=field, status="completed", name=f"trial {number}",
                        progress={"num_timesteps": 100, "total_timesteps": 100, "best_mean_reward": 10.0 * number})  # fmt: skip
    save(journal, 10)
    add_point(journal, 100, ep_rew_mean=10.0 * number)
    journal.close()
    return journal


@pytest.fixture
def written(tmp_path: Path) -> list[RunJournal]:
    folder = tmp_path / "checkpoints"
    alone = start_run(folder, "f" * 32)
    alone.close()
    return [alone, *(trial(folder, "pbt-1", number, generation=number - 1) for number in (1, 2, 3)),
            trial(folder, HOSTILE, 4)]  # fmt: skip


def test_the_api_lists_a_sweeps_trials_and_says_of_each_which_it_is(serve: Any, written: list[RunJournal]) -> None:
    app = serve()
    found = app.ask(f"{RUNS}?sweep=pbt-1&sort=-best_mean_reward").json
    assert [run["sweep"] for run in found["items"]] == [
        {"id": "pbt-1", "trial": f"{number:05d}", "generation": number - 1} for number in (3, 2, 1)
    ]
    assert found["choices"]["sweep"] == sorted([HOSTILE, "pbt-1"])
    every = app.ask(RUNS).json["items"]
    assert len(every) == 5
    assert [run["sweep"] for run in every if run["run_id"] == "f" * 32] == [None]
    assert app.ask(f"{RUNS}?sweep=nothing").json["items"] == []


def test_pages_show_a_sweep_as_one_group(serve: Any, written: list[RunJournal]) -> None:
    app = serve()
    group = app.ask("/training?sweep=pbt-1&sort=-best_mean_reward").body.decode()
    assert "<h1>Sweep <bdi>pbt-1</bdi></h1>" in group
    assert [group.index(f"trial {n}</bdi>") for n in (3, 2, 1)] == sorted(group.index(f"trial {n}</bdi>") for n in (1, 2, 3))
    assert "trial 00003, generation 2 of" in group
    assert 'value="pbt-1" selected' in group
    every = app.ask("/training").body.decode()
    assert '/training?sweep=pbt-1&amp;sort=-best_mean_reward"' in every
    one = app.ask(f"/training/{2:032d}").body.decode()
    assert "trial 00002, generation 1 of the sweep" in one
    assert '/training?sweep=pbt-1&amp;sort=-best_mean_reward"' in one


def test_a_sweep_of_any_name_is_shown_as_text(serve: Any, written: list[RunJournal]) -> None:
    app = serve()
    group = app.ask(f"/training?sweep={quote(HOSTILE)}").body.decode()
    assert "<script>alert(1)" not in group
    assert f"<h1>Sweep <bdi>{html.escape(HOSTILE, quote=False)}</bdi></h1>" in group
    assert "trial 4</bdi>" in group
    assert "trial 3</bdi>" not in group


def test_a_store_without_sweeps_offers_no_filter_of_them(serve: Any, tmp_path: Path) -> None:
    start_run(tmp_path / "checkpoints", "f" * 32).close()
    assert 'name="sweep"' not in serve().ask("/training").body.decode()


@pytest.mark.parametrize("value", [{}, {"id": 3}, {"id": ["x"], "trial": {}, "generation": "many"}, {"id": None}], ids=str)
def test_a_field_that_somebody_edited_is_no_fault(serve: Any, tmp_path: Path, value: dict[str, Any]) -> None:
    start_run(tmp_path / "checkpoints", "f" * 32, sweep=value).close()
    app = serve()
    for path in (RUNS, f"{RUNS}/{'f' * 32}", "/training", f"/training/{'f' * 32}", "/training?sweep=x"):
        assert app.ask(path).status == 200, path


def test_a_database_says_the_same(serve: Any, written: list[RunJournal], mongo_uri: str, mongo_database: str) -> None:
    mirror = MongoMirror(mongo_uri, mongo_database)
    for journal in written:
        mirror.replicate(RunJournal(journal.folder))
    mirror.close()
    store = MongoRuns(mongo_uri, mongo_database)
    path = f"{RUNS}?sweep=pbt-1&status=completed"
    assert serve().ask(path).json["items"] == serve(store).ask(path).json["items"]
    store.close()
