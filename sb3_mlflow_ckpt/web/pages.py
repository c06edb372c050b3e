"""Owns the routes of the pages. They are drawn by the server, so that they show everything without a script."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from sb3_mlflow_ckpt.errors import InvalidQueryError, MirrorUnavailableError
from sb3_mlflow_ckpt.runs.lineage import lineage, stitched_curve
from sb3_mlflow_ckpt.runs.reader import Glance, RunReader
from sb3_mlflow_ckpt.runs.summaries import DEFAULT_PAGE, DEFAULT_SORT, RunQuery, select
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.api_page import api_view
from sb3_mlflow_ckpt.web.background_checks import BackgroundChecks
from sb3_mlflow_ckpt.web.checkpoint_files import Check, run_folder
from sb3_mlflow_ckpt.web.conditional import respond
from sb3_mlflow_ckpt.web.documents import mlflow_url
from sb3_mlflow_ckpt.web.last_good import LastGood, Outage
from sb3_mlflow_ckpt.web.problems import Problem, not_found
from sb3_mlflow_ckpt.web.run_view import FORMS, RunParts, comparison_view, run_view
from sb3_mlflow_ckpt.web.views import Links, list_view

HTML = "text/html; charset=utf-8"
CHECKPOINTS_ON_PAGE = 50
MOST_COMPARED = 8
_POINTS = 500
# What is checked without being asked for: more than people look at would keep a network's disk busy for nothing.
_CHECKED_ON_VIEW = 10
_STATIC = {
    "history.css": "text/css; charset=utf-8",
    "history.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_View = TypeVar("_View")

router = APIRouter(include_in_schema=False)
RunId = Annotated[str, Path()]


@cache
def _static(name: str) -> bytes:
    return resources.files("sb3_mlflow_ckpt.web").joinpath("static", name).read_bytes()


@cache
def _version() -> str:
    """Return what is another whenever a file of the pages is: their addresses hold it."""
    return hashlib.sha256(b"".join(_static(name) for name in sorted(_STATIC))).hexdigest()[:12]


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("sb3_mlflow_ckpt.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(formats=formats, forms=FORMS)
    return environment


def _page(
    request: Request, template: str, *, outage: Outage | None = None, status: int = 200, **shown: Any
) -> Response:
    """Return a page. Nothing in it depends on the time at which it is drawn: its tag tells whether it has changed."""
    settings, store = request.app.state.settings, request.app.state.store
    body = _templates().get_template(template).render(
        links=Links(settings.root_path), version=_version(), store=formats.text(store), outage=outage, **shown
    )  # fmt: skip
    return respond(request, body.encode("utf-8", "backslashreplace"), HTML, status=status)


def _links(request: Request) -> Links:
    return Links(request.app.state.settings.root_path)


def _shown(request: Request, make: Callable[[], _View]) -> tuple[_View, Outage | None]:
    """Return what a page shows; while the store does not answer, what it showed last."""
    kept: LastGood = request.app.state.last_good
    address = f"{request.scope['path']}?{request.scope['query_string'].decode('latin-1')}"
    try:
        view = make()
    except MirrorUnavailableError as error:
        found = kept.get(address)
        if found is None:
            raise
        return found[1], Outage(formats.text(error), formats.moment(found[0]))
    kept.keep(address, view)
    return view, None


@router.get("/")
def root(request: Request) -> Response:
    """Lead to the list."""
    return Response(status_code=307, headers={"Location": _links(request).list()})


@router.get("/static/{name}")
def static(request: Request, name: str) -> Response:
    """Return a file of the pages."""
    if name not in _STATIC:
        raise not_found("There is no such file")
    return respond(request, _static(name), _STATIC[name])


@router.get("/training")
def list_page(
    request: Request,
    q: str = "",
    status: Annotated[list[str], Query()] = [],  # noqa: B006
    algo: str = "",
    env: str = "",
    agent: str = "",
    sort: str = DEFAULT_SORT,
    cursor: str = "",
) -> Response:
    """Show the list of runs."""
    store: RunReader = request.app.state.store
    query = RunQuery(
        status=tuple(name for item in status for name in item.split(",") if name),
        algo=algo or None,
        env_id=env or None,
        agent_id=agent or None,
        text=q,
        sort=sort,
    )

    def make() -> Any:
        page = select(store.summaries(), query, DEFAULT_PAGE, cursor or None)
        glances = store.glances([run["run_id"] for run in page.items])
        return list_view(page, glances, query, _links(request))

    view, outage = _shown(request, make)
    return _page(request, "runs.html", outage=outage, view=view)


@router.get("/training/compare")
def compare_page(request: Request, run: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006
    """Show runs side by side."""
    store: RunReader = request.app.state.store
    chosen = [*dict.fromkeys(run)]
    if not 2 <= len(chosen) <= MOST_COMPARED:
        raise InvalidQueryError("run", f"2 to {MOST_COMPARED} runs can be compared; {len(chosen)} were chosen")

    def make() -> Any:
        records = [store.record(run_id) for run_id in chosen]
        store.summaries()
        glances = store.glances([record["run_id"] for record in records])
        curves = [store.curve(record["run_id"], _POINTS) for record in records]
        return comparison_view(records, glances, curves, _links(request))

    view, outage = _shown(request, make)
    return _page(request, "compare.html", outage=outage, view=view)


@router.get("/training/{run_id}")
def run_page(request: Request, run_id: RunId, before: Annotated[int | None, Query(ge=0)] = None) -> Response:
    """Show a run."""
    store, settings = request.app.state.store, request.app.state.settings

    def make() -> Any:
        parts = _parts(store, run_id, before)
        return run_view(parts, _checker(request, parts), _links(request), mlflow_url(parts.run, settings.mlflow_ui_url))

    view, outage = _shown(request, make)
    return _page(request, "run.html", outage=outage, view=view)


def _parts(store: RunReader, run_id: str, before: int | None) -> RunParts:
    run = store.record(run_id)
    line = lineage(store.summaries(), run["run_id"])
    items = store.checkpoints(run["run_id"], before=before, limit=CHECKPOINTS_ON_PAGE + 1)
    return RunParts(
        run=run,
        glance=store.glances([run["run_id"]]).get(run["run_id"], Glance()),
        items=items[-CHECKPOINTS_ON_PAGE:],
        before=before,
        older=len(items) > CHECKPOINTS_ON_PAGE,
        segments=stitched_curve(store, line, _POINTS),
        line=line,
    )


def _checker(request: Request, parts: RunParts) -> Callable[[Any], Check | None]:
    """Return what tells what is known of a checkpoint's file; the newest ones are looked at meanwhile."""
    folder = run_folder(request.app.state.settings.checkpoint_dir, parts.run)
    if folder is None:
        return lambda item: Check("absent", "Its file is not on this machine")
    here = [item["episode"] for item in parts.items if item.get("on_disk")]
    checks: BackgroundChecks = request.app.state.background_checks
    checks.want(folder, [*reversed(here)][:_CHECKED_ON_VIEW])
    return lambda item: request.app.state.checks.known(folder, item["episode"])


@router.get("/api")
def api_page(request: Request) -> Response:
    """Show what the API offers."""
    return _page(request, "api.html", view=api_view(request.app.openapi()))


def problem_page(request: Request, problem: Problem) -> Response | None:
    """Return the page that tells of a problem."""
    suggestions: Sequence[tuple[str, str]] = [("All runs", _links(request).list())]
    return _page(request, "problem.html", problem=problem, suggestions=suggestions, status=problem.status)


def add_pages(app: Any) -> None:
    """Give an application the pages."""
    app.state.last_good = LastGood()
    app.state.background_checks = BackgroundChecks(app.state.checks)
    app.state.problem_page = problem_page
    app.include_router(router)
