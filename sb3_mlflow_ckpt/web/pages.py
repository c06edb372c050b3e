"""Owns the routes of the pages. What a store does blocks, so they run in threads; nothing can be changed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from sb3_mlflow_ckpt.errors import InvalidQueryError, RunNotFoundError
from sb3_mlflow_ckpt.layout import LARGEST_EPISODE, RunFolder
from sb3_mlflow_ckpt.resume_commands import shell_word
from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.lineage import Segment, lineage, stitched_curve
from sb3_mlflow_ckpt.runs.reader import Document, Glance, RunReader
from sb3_mlflow_ckpt.runs.summaries import DEFAULT_PAGE, DEFAULT_SORT, select
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.checkpoint_files import Check, Checks, run_folder
from sb3_mlflow_ckpt.web.checkpoint_views import PROGRAMS, SOURCES, checkpoint_list, wanted_check
from sb3_mlflow_ckpt.web.comparison_views import Comparison, comparison
from sb3_mlflow_ckpt.web.conditional import respond
from sb3_mlflow_ckpt.web.problems import not_found
from sb3_mlflow_ckpt.web.rendering import LastGood, page
from sb3_mlflow_ckpt.web.run_views import RunPage, run_page
from sb3_mlflow_ckpt.web.views import ListQuery, RunList, run_list

CURVE_POINTS = 500
CHECKPOINTS = 50
LEAST_COMPARED, MOST_COMPARED = 2, 8
_READ_AT_ONCE = 2
_MEDIA_TYPES = {
    "history.css": "text/css; charset=utf-8",
    "history.js": "text/javascript; charset=utf-8",
    "favicon.svg": "image/svg+xml",
}
_STATIC = {name: files("sb3_mlflow_ckpt.web").joinpath("static", name).read_bytes() for name in _MEDIA_TYPES}
_TRAIN = "python -m sb3_mlflow_ckpt.trainer --algo PPO --env-id CartPole-v1 --total-timesteps 50000"

router = APIRouter(include_in_schema=False)


class Examiner:
    """Reads checkpoints whole for pages, few at a time: other requests must find threads, and the disk time.

    Args:
        checks: Where it is remembered.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._busy = threading.Lock()
        self._at_once = threading.BoundedSemaphore(_READ_AT_ONCE)

    def examine(self, folder: RunFolder, episode: int) -> None:
        """Read a checkpoint before the answer, unless too many are being read."""
        if self._at_once.acquire(blocking=False):
            try:
                self._checks.check(folder, episode)
            finally:
                self._at_once.release()

    def ask(self, folder: RunFolder, episode: int) -> None:
        """Have a checkpoint read behind the answer, unless another one is being read: who looks again asks again."""
        if self._busy.acquire(blocking=False):
            threading.Thread(target=self._examine, args=(folder, episode), daemon=True).start()

    def _examine(self, folder: RunFolder, episode: int) -> None:
        try:
            self._checks.check(folder, episode)
        finally:
            self._busy.release()


@router.get("/")
def show_root(request: Request) -> Response:
    """Lead to the list."""
    root = request.app.state.settings.root_path
    return Response(status_code=307, headers={"Location": f"{root}/training", "Cache-Control": "no-store"})


@router.get("/favicon.ico")
def show_favicon(request: Request) -> Response:
    """Return the icon for browsers that ask for it unasked."""
    return show_static(request, "favicon.svg")


@router.get("/static/{name}")
def show_static(request: Request, name: str) -> Response:
    """Return a file of the pages."""
    if name not in _STATIC:
        raise not_found("There is no such file")
    return respond(request, _STATIC[name], _MEDIA_TYPES[name])


@router.get("/training")
def show_runs(
    request: Request,
    q: str = "",
    status: Annotated[list[str], Query()] = [],  # noqa: B006
    algo: str = "",
    env: str = "",
    agent: str = "",
    sweep: str = "",
    sort: str = DEFAULT_SORT,
    cursor: str = "",
) -> Response:
    """Show the list of runs."""
    named = {name.strip() for item in status for name in item.split(",") if name.strip()}
    statuses = tuple(name for name in STATUSES if name in named) + tuple(sorted(named - set(STATUSES)))
    query = ListQuery(q, statuses, algo, env, agent, sweep, sort or DEFAULT_SORT, cursor)
    query.asked()
    store = _store(request)

    def make() -> RunList:
        found = select(store.summaries(), query.asked(), DEFAULT_PAGE, cursor or None)
        return run_list(found, store.glances([run["run_id"] for run in found.items]), query)

    view, outage = _last_good(request).view(_address(request), make)
    where, folder = str(store), str(request.app.state.settings.checkpoint_dir)
    in_folder = where == folder
    train = f"{_TRAIN} --checkpoint-dir {shell_word(folder)}" if in_folder else _TRAIN
    return page(
        request,
        "runs.html",
        view=view,
        outage=outage,
        train=train,
        where=formats.text(where),
        in_folder=in_folder,
    )


@router.get("/training/compare")
def show_comparison(request: Request, run: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006
    """Show some runs side by side."""
    named = list(dict.fromkeys(run))
    if not LEAST_COMPARED <= len(named) <= MOST_COMPARED:
        return page(request, "compare_choice.html", count=len(named), unknown=(), outage=None)
    store = _store(request)

    def make() -> Comparison | list[str]:
        records, unknown = _records(store, named)
        return unknown or _comparison(store, records)

    view, outage = _last_good(request).view(_address(request), make)
    if not isinstance(view, Comparison):
        shown = tuple(map(formats.text, view))
        return page(request, "compare_choice.html", status=404, count=len(named), unknown=shown, outage=outage)
    return page(request, "compare.html", view=view, outage=outage)


def _records(store: RunReader, run_ids: Sequence[str]) -> tuple[list[Document], list[str]]:
    """Return the records of runs, each once, and the ids that are of none."""
    records: dict[str, Document] = {}
    unknown = []
    for run_id in run_ids:
        try:
            record = store.record(run_id)
            records.setdefault(str(record["run_id"]), record)
        except RunNotFoundError:
            unknown.append(run_id)
    return list(records.values()), unknown


def _comparison(store: RunReader, records: list[Document]) -> Comparison:
    ids = [str(record["run_id"]) for record in records]
    glances = store.glances(ids)
    curves = [store.curve(run_id, CURVE_POINTS) for run_id in ids]
    return comparison(records, curves, [glances.get(run_id, Glance()) for run_id in ids])


@router.get("/training/{run_id}")
def show_run(request: Request, run_id: str, before: int | None = None, check: int | None = None) -> Response:
    """Show a run; `before` pages through its checkpoints, `check` has one read whole first."""
    if before is not None and not 0 <= before <= LARGEST_EPISODE:
        raise InvalidQueryError("before", f"an episode is a number from 0 to {LARGEST_EPISODE}")

    def make() -> RunPage:
        return _run_page(request, run_id, before, check)

    view, outage = _last_good(request).view(_address(request), make)
    return page(request, "run.html", view=view, outage=outage, programs=PROGRAMS, sources=SOURCES)


def _run_page(request: Request, run_id: str, before: int | None, check: int | None) -> RunPage:
    store, state = _store(request), request.app.state
    record = store.record(run_id)
    items = store.checkpoints(run_id, before=before, limit=CHECKPOINTS + 1)
    older, items = (items[1]["episode"] if len(items) > CHECKPOINTS else None), items[-CHECKPOINTS:]
    newest = items if before is None else store.checkpoints(run_id, limit=CHECKPOINTS)
    folder = run_folder(state.settings.checkpoint_dir, record)
    if folder is not None and check is not None and any(item["episode"] == check for item in items):
        _examiner(request).examine(folder, check)
    checks = _known(state.checks, folder, [*items, *newest])
    wanted = wanted_check(newest, checks)
    if folder is not None and wanted is not None:
        _examiner(request).ask(folder, wanted)
    own_id = str(record["run_id"])
    total = store.glances([own_id]).get(own_id, Glance()).checkpoints
    listed = checkpoint_list(record, items, checks, total=max(total, len(items)), older=older, newest=newest)
    try:
        line = lineage(store.summaries(), run_id)
        segments = stitched_curve(store, line, CURVE_POINTS)
    except RunNotFoundError:
        # A store lists its runs a moment after it has them.
        line, segments = None, (Segment(own_id, store.curve(run_id, CURVE_POINTS), None),)
    return run_page(record, listed, items, segments, line, state.settings.mlflow_ui_url)


def _known(checks: Checks, folder: RunFolder | None, items: Sequence[Document]) -> dict[int, Check]:
    found: dict[int, Check] = {}
    for item in items:
        if item.get("on_disk") is not True or folder is None:
            found[item["episode"]] = Check("absent")
            continue
        known = checks.known(folder, item["episode"])
        if known is not None:
            found[item["episode"]] = known
    return found


def _store(request: Request) -> RunReader:
    store: RunReader = request.app.state.store
    return store


def _last_good(request: Request) -> LastGood:
    kept: LastGood = request.app.state.last_good
    return kept


def _examiner(request: Request) -> Examiner:
    found: Examiner = request.app.state.examiner
    return found


def _address(request: Request) -> str:
    scope: Any = request.scope
    return f"{scope['path']}?{scope['query_string'].decode('latin-1')}"
