"""Owns the routes of the REST API. What a store does blocks, so the routes run in threads; nothing can be changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Path, Query, Request, Response

from sb3_mlflow_ckpt.errors import InvalidQueryError, RunNotFoundError
from sb3_mlflow_ckpt.layout import LARGEST_EPISODE
from sb3_mlflow_ckpt.runs.document import STATUSES
from sb3_mlflow_ckpt.runs.lineage import Segment, lineage, stitched_curve
from sb3_mlflow_ckpt.runs.reader import Document, RunReader
from sb3_mlflow_ckpt.runs.summaries import DEFAULT_PAGE, DEFAULT_SORT, LARGEST_PAGE, SORTS, RunQuery, select
from sb3_mlflow_ckpt.web import documents, schemas
from sb3_mlflow_ckpt.web.bodies import dump
from sb3_mlflow_ckpt.web.checkpoint_files import Check, download, run_folder
from sb3_mlflow_ckpt.web.conditional import JSON, respond, respond_to_version
from sb3_mlflow_ckpt.web.problems import MEDIA_TYPE, RETRY_SECONDS, not_found

MOST_POINTS = 10_000
MOST_COMPARED = 8
# So many checkpoints are read whole at one time: other requests must find threads, and the disk time.
_readings = CapacityLimiter(2)

router = APIRouter()
_F = TypeVar("_F", bound=Callable[..., Any])

RunId = Annotated[str, Path(description="The run's id; a UUID with or without its dashes")]
Episode = Annotated[int, Path(ge=0, le=LARGEST_EPISODE, description="The checkpoint's episode")]
_STATUS_PATTERN = f"^(({'|'.join(STATUSES)})(,({'|'.join(STATUSES)}))*)?$"
_SORT_NAMES = [*SORTS, *(f"-{name}" for name in SORTS)]


def _problem(description: str, **headers: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    found: dict[str, Any] = {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}
    if headers:
        found["headers"] = {
            name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }
    return found


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    304: {"description": "Nothing has changed since the answer whose `ETag` was given in `If-None-Match`"},
    400: _problem("The request has not exactly one `Host` header"),
    401: _problem("The server wants a token", WWW_Authenticate="How it is given"),
    404: _problem("There is no such thing"),
    405: _problem("Another method than GET and HEAD", Allow="GET, HEAD"),
    421: _problem("The server does not answer to this `Host`"),
    422: _problem("A parameter cannot be used"),
    500: _problem("The server failed"),
    503: _problem("The store does not answer", Retry_After=f"Seconds: {RETRY_SECONDS}"),
}


def _get(path: str, model: Any, *, without: tuple[int, ...] = (), **more: Any) -> Callable[[_F], _F]:
    """Declare a route with what it may answer."""
    responses = {status: problem for status, problem in _PROBLEMS.items() if status not in without}
    return router.get(path, response_model=model, responses={**responses, **more.pop("responses", {})}, **more)


def _store(request: Request) -> RunReader:
    store: RunReader = request.app.state.store
    return store


@_get("/api/training-runs", schemas.RunList, without=(404,), operation_id="list_runs", summary="List runs")
def list_runs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="The most to return")] = DEFAULT_PAGE,
    cursor: Annotated[str, Query(description="Where the page begins: `next_cursor` of another")] = "",
    status: Annotated[
        list[str],
        Query(
            description=f"Only these statuses, of {', '.join(STATUSES)}: repeated, or with commas",
            json_schema_extra={"items": {"type": "string", "pattern": _STATUS_PATTERN}},
        ),
    ] = [],  # noqa: B006
    algo: Annotated[str, Query(description="Only this algorithm, in whatever case")] = "",
    env: Annotated[str, Query(description="Only this environment")] = "",
    agent: Annotated[str, Query(description="Only this agent")] = "",
    sweep: Annotated[str, Query(description="Only the trials of this sweep")] = "",
    q: Annotated[str, Query(description="Words that occur in name, id, agent, algorithm, environment or host")] = "",
    sort: Annotated[
        str, Query(description="What to sort by; with `-` the greatest first", json_schema_extra={"enum": _SORT_NAMES})
    ] = DEFAULT_SORT,
) -> Response:
    """Return a page of runs. Pages are stable: runs that come or go shift nothing."""
    query = RunQuery(
        # A form sends the field that nobody filled in, too.
        status=tuple(name for item in status if item for name in item.split(",")),
        algo=algo or None,
        env_id=env or None,
        agent_id=agent or None,
        sweep_id=sweep or None,
        text=q,
        sort=sort,
    )
    store = _store(request)
    page = select(store.summaries(), query, limit, cursor or None)
    glances = store.glances([run["run_id"] for run in page.items])
    return respond(request, dump(documents.run_list(page, glances)))


@_get("/api/training-runs/{run_id}", schemas.Run, without=(422,), operation_id="get_run", summary="Show a run")
def get_run(request: Request, run_id: RunId) -> Response:
    """Return a run's record with all its checkpoints."""
    store, settings = _store(request), request.app.state.settings
    return respond_to_version(
        request, store.version(run_id), lambda: dump(documents.run_document(store.get(run_id), settings))
    )


@_get(
    "/api/training-runs/{run_id}/metrics",
    schemas.Metrics,
    operation_id="get_metrics",
    summary="Show a learning curve",
)
def get_metrics(
    request: Request,
    run_id: RunId,
    points: Annotated[
        int, Query(ge=2, le=MOST_POINTS, description="At most so many points of each run, evenly spread")
    ] = 500,
    stitched: Annotated[bool, Query(description="Whether the curves of its ancestors come before it")] = False,
) -> Response:
    """Return a run's learning curve, alone or behind those of the runs that it came from."""
    store = _store(request)
    if not stitched:
        return respond_to_version(request, store.version(run_id), lambda: dump(_own_curve(store, run_id, points)))
    line = lineage(store.summaries(), run_id)
    chain = [run["run_id"] for run in (*line.ancestors, {"run_id": line.run_id}) if not run.get("missing")]

    def make() -> bytes:
        segments = stitched_curve(store, line, points)
        return dump(documents.metrics_document(line.run_id, segments, stitched=True))

    return respond_to_version(request, _versions(store, chain), make)


def _own_curve(store: RunReader, run_id: str, points: int) -> Document:
    own_id = str(store.record(run_id)["run_id"])
    segment = Segment(own_id, store.curve(run_id, points), None)
    return documents.metrics_document(own_id, [segment], stitched=False)


def _versions(store: RunReader, run_ids: list[str]) -> str:
    """Return the versions of runs, of which all but the last may be gone."""
    found = []
    for run_id in run_ids:
        try:
            found.append(store.version(run_id))
        except RunNotFoundError:
            if run_id == run_ids[-1]:
                raise
            found.append("gone")
    return "\n".join(found)


@_get(
    "/api/training-runs/{run_id}/lineage",
    schemas.RunLineage,
    without=(422,),
    operation_id="get_lineage",
    summary="Show the runs that a run came from, and that came from it",
)
def get_lineage(request: Request, run_id: RunId) -> Response:
    """Return a run's place in its chain of resumes."""
    return respond(request, dump(documents.lineage_document(lineage(_store(request).summaries(), run_id))))


@_get(
    "/api/training-runs/{run_id}/checkpoints",
    schemas.Checkpoints,
    operation_id="list_checkpoints",
    summary="List a run's checkpoints",
)
def list_checkpoints(
    request: Request,
    run_id: RunId,
    before: Annotated[
        int, Query(ge=0, le=LARGEST_EPISODE + 1, description="Only episodes below this one")
    ] = LARGEST_EPISODE + 1,
    limit: Annotated[int, Query(ge=1, le=1000, description="Only so many, the highest")] = 100,
) -> Response:
    """Return a page of a run's checkpoints, ascending by episode, beginning with the highest."""
    store = _store(request)

    def make() -> bytes:
        return dump(documents.checkpoint_page(store.checkpoints(run_id, before=before, limit=limit + 1), limit))

    return respond_to_version(request, store.version(run_id), make)


@_get(
    "/api/training-runs/{run_id}/checkpoints/{episode}",
    schemas.CheckedCheckpoint,
    without=(422,),
    operation_id="get_checkpoint",
    summary="Show a checkpoint, and whether its content is whole",
)
async def get_checkpoint(request: Request, run_id: RunId, episode: Episode) -> Response:
    """Read a checkpoint's files, unless they were read before, and compare them with what was committed."""
    store = _store(request)
    item, folder = await to_thread.run_sync(_find_checkpoint, request, store, run_id, episode)
    if folder is None:
        check = Check("absent", "Its file is not on this machine")
    else:
        check = await to_thread.run_sync(request.app.state.checks.check, folder, episode, limiter=_readings)
    return respond(request, dump({**item, "verification": asdict(check)}))


def _find_checkpoint(request: Request, store: RunReader, run_id: str, episode: int) -> tuple[Document, Any]:
    found = store.checkpoints(run_id, before=episode + 1, limit=1)
    if not found or found[0]["episode"] != episode:
        raise not_found(f"The run {run_id!r} has no checkpoint of episode {episode}")
    return found[0], run_folder(request.app.state.settings.checkpoint_dir, store.record(run_id))


_ZIP = {"application/zip": {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/api/training-runs/{run_id}/checkpoints/{episode}/download",
    response_class=Response,
    responses={
        **{status: problem for status, problem in _PROBLEMS.items() if status != 422},
        200: {"description": "The zip", "content": _ZIP},
        206: {"description": "The part of the zip that `Range` asks for", "content": _ZIP},
        409: _problem("The file is not what was committed"),
        416: _problem("The part that `Range` asks for is not in the zip", Content_Range="The zip's size"),
    },
    operation_id="download_checkpoint",
    summary="Download a checkpoint",
)
def download_checkpoint(request: Request, run_id: RunId, episode: Episode) -> Response:
    """Return a committed checkpoint's zip; its `ETag` is its SHA-256. Chunks of a replay buffer are not in it."""
    folder = run_folder(request.app.state.settings.checkpoint_dir, _store(request).record(run_id))
    return download(request, folder, episode)


@_get(
    "/api/compare",
    schemas.Comparison,
    operation_id="compare_runs",
    summary="Compare runs",
)
def compare_runs(
    request: Request,
    run: Annotated[
        list[str],
        Query(min_length=2, max_length=MOST_COMPARED, description="The runs' ids, the parameter repeated"),
    ],
) -> Response:
    """Return two to eight runs, and in what their configurations differ."""
    store = _store(request)
    records = [store.record(run_id) for run_id in run]
    if len({record["run_id"] for record in records}) < len(records):
        raise InvalidQueryError("run", "a run is named twice")
    return respond(request, dump(documents.comparison_document(records)))


@_get("/healthz", schemas.Health, without=(304, 404, 422), operation_id="get_health", summary="Tell whether it works")
def get_health(request: Request) -> Response:
    """Return whether the store answers."""
    # No run has this id: that the store says so is enough.
    with suppress(RunNotFoundError):
        _store(request).version("0")
    return Response(dump({"status": "ok"}), media_type=JSON, headers={"Cache-Control": "no-store"})


@router.get("/api/openapi.json", include_in_schema=False)
def get_openapi(request: Request) -> Response:
    """Return this API's description."""
    return respond(request, dump(request.app.openapi()))
