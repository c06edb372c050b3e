"""Owns what an answer looks like that is none: problem+json (RFC 9457), or a page where the pages give one.

What a stranger asked for is never repeated as HTML, and nothing of a traceback is told.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from sb3_mlflow_ckpt.errors import InvalidQueryError, MirrorUnavailableError, RunNotFoundError
from sb3_mlflow_ckpt.web.bodies import dump

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5


@dataclass(frozen=True)
class Problem:
    """What is wrong.

    Attributes:
        status: The HTTP status.
        detail: One sentence that says what is wrong, for people.
        name: Which kind of problem it is, for programs; the status alone tells where it is empty.
        headers: What the answer's headers say besides.
        more: Further members of the document.
    """

    status: int
    detail: str
    name: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return the name of the status."""
        return HTTPStatus(self.status).phrase

    def document(self) -> dict[str, Any]:
        """Return the members of RFC 9457."""
        kind = f"urn:sb3-mlflow-ckpt:{self.name}" if self.name else "about:blank"
        return {"type": kind, "title": self.title, "status": self.status, "detail": self.detail, **self.more}


class ProblemError(Exception):
    """An endpoint answers with a problem.

    Args:
        problem: Which.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.detail)


NOTHING_THERE = Problem(404, "There is nothing at this address", "not-found")


def not_found(what: str) -> ProblemError:
    """Return the error that says that something is not there."""
    return ProblemError(Problem(404, what, "not-found"))


def respond_to_problem(request: Request, problem: Problem) -> Response:
    """Return the answer: a page if `app.state.problem_page` gives one for the request, problem+json otherwise.

    `problem_page` is a function of a request and a problem that returns a response or None. It is asked for nothing
    under `/api` or `/healthz`. The problem's headers and status are put on what it returns.
    """
    response = _page(request, problem)
    if response is None:
        response = Response(dump(problem.document()), media_type=MEDIA_TYPE)
    response.status_code = problem.status
    for name, value in {"Cache-Control": "no-store", **problem.headers}.items():
        response.headers[name] = value
    return response


def _page(request: Request, problem: Problem) -> Response | None:
    page = getattr(request.app.state, "problem_page", None)
    if page is None or is_for_programs(request):
        return None
    try:
        found: Response | None = page(request, problem)
    except Exception:
        # What tells of a fault must not fail of one.
        logger.exception("The page of a problem could not be drawn")
        return None
    return found


def is_for_programs(request: Request) -> bool:
    """Tell whether a request is for the API."""
    return re.match(r"/(api|healthz)(/|$)", own_path(request.scope)) is not None


def own_path(scope: Mapping[str, Any]) -> str:
    """Return a request's path behind the place where a proxy has put the server."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def problem_of(error: Exception) -> Problem:
    """Return the problem that an error is: an unknown one is the server's own."""
    if isinstance(error, ProblemError):
        return error.problem
    if isinstance(error, RunNotFoundError):
        return Problem(404, str(error), "run-not-found")
    if isinstance(error, MirrorUnavailableError):
        retry = {"Retry-After": str(RETRY_SECONDS)}
        return Problem(503, str(error), "store-unavailable", retry, {"store": error.name, "uri": error.uri})
    if isinstance(error, InvalidQueryError):
        return _invalid([{"parameter": error.parameter, "problem": error.problem}])
    if isinstance(error, RequestValidationError):
        return _validation_problem(error)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return NOTHING_THERE
        return Problem(error.status_code, str(error.detail), headers=error.headers or {})
    return Problem(500, "The server failed to answer; its log says why", "internal-error")


def _validation_problem(error: RequestValidationError) -> Problem:
    found = [(tuple(map(str, item["loc"])), str(item["msg"])) for item in error.errors()]
    if any(place[0] == "path" for place, _ in found):
        # An address that names nothing, whatever is wrong with it.
        return NOTHING_THERE
    return _invalid([{"parameter": ".".join(place[1:]), "problem": message} for place, message in found])


def _invalid(errors: list[dict[str, str]]) -> Problem:
    detail = "; ".join(f"{error['parameter']}: {error['problem']}" for error in errors)
    return Problem(422, detail, "invalid-parameter", more={"errors": errors})


def add_problem_handlers(app: FastAPI) -> None:
    """Make an app answer errors with problems."""

    async def handle(request: Request, error: Exception) -> Response:
        return respond_to_problem(request, problem_of(error))

    for kind in (
        ProblemError,
        RunNotFoundError,
        MirrorUnavailableError,
        InvalidQueryError,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, handle)
