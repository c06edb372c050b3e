"""Owns how templates become answers: their environment, what each page knows, and pages that say what is wrong."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from sb3_mlflow_ckpt.errors import MirrorUnavailableError
from sb3_mlflow_ckpt.web import formats
from sb3_mlflow_ckpt.web.conditional import respond
from sb3_mlflow_ckpt.web.formats import Moment
from sb3_mlflow_ckpt.web.problems import Problem, own_path

HTML = "text/html; charset=utf-8"
_MOST_KEPT = 64


def segment(value: Any) -> str:
    """Return a text as one part of an address's path."""
    return quote(str(value), safe="", errors="replace")


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("sb3_mlflow_ckpt.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["segment"] = segment
    return made


_templates = _environment()


@dataclass(frozen=True)
class Outage:
    """A store that does not answer.

    Attributes:
        name: What it is.
        uri: Where it is.
        detail: What it said.
        since: When what is shown was read.
    """

    name: str
    uri: str
    detail: str
    since: Moment | None


@dataclass(frozen=True)
class _Kept:
    view: Any
    at: datetime


class LastGood:
    """What pages showed last, by their addresses: for a store that does not answer. Bounded; safe to lose."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, address: str, make: Callable[[], Any]) -> tuple[Any, Outage | None]:
        """Return what a page shows, and the outage if it is only what it showed last.

        Raises:
            MirrorUnavailableError: The store does not answer, and the page was not seen before.
        """
        try:
            view = make()
        except MirrorUnavailableError as error:
            with self._lock:
                kept = self._kept.get(address)
            if kept is None:
                raise
            outage = Outage(error.name, formats.text(error.uri), formats.text(str(error)), formats.moment(kept.at))
            return kept.view, outage
        with self._lock:
            self._kept[address] = _Kept(view, datetime.now(timezone.utc))
            self._kept.move_to_end(address)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return view, None


def page(request: Request, template: str, *, status: int = 200, **known: Any) -> Response:
    """Return a page."""
    body = _templates.get_template(template).render(
        root=request.app.state.settings.root_path, path=own_path(request.scope), **known
    )
    response = respond(request, body.encode("utf-8", "replace"), HTML, status=status)
    if status != 200:
        response.headers["Cache-Control"] = "no-store"
    return response


def problem_page(request: Request, problem: Problem) -> Response | None:
    """Return the page that says what is wrong, or None for who does not read pages."""
    if not _reads_pages(request):
        return None
    return page(request, "problem.html", status=problem.status, problem=problem, detail=formats.text(problem.detail))


def _reads_pages(request: Request) -> bool:
    accepted = request.headers.get("accept", "*/*").lower()
    return "text/html" in accepted or own_path(request.scope).startswith("/training")
