"""Owns the application: which routes there are, in which order, and what they share."""

from __future__ import annotations

from fastapi import FastAPI

from sb3_mlflow_ckpt.runs.reader import RunReader
from sb3_mlflow_ckpt.web import api, api_page, pages
from sb3_mlflow_ckpt.web.checkpoint_files import Checks
from sb3_mlflow_ckpt.web.conditional import Bodies
from sb3_mlflow_ckpt.web.openapi import API_VERSION, describe_api
from sb3_mlflow_ckpt.web.outages import PatientRuns
from sb3_mlflow_ckpt.web.problems import add_problem_handlers
from sb3_mlflow_ckpt.web.rendering import LastGood, problem_page
from sb3_mlflow_ckpt.web.security import Doorkeeper
from sb3_mlflow_ckpt.web.settings import WebSettings


def create_app(store: RunReader, settings: WebSettings) -> FastAPI:
    """Return the application that serves a store of runs: the REST API and the pages.

    `app.state` holds `store`, `settings`, `checks` (what is known of checkpoints' contents), `examiner` (which finds it
    out behind the pages), `bodies`, `last_good` (what pages showed last), and `problem_page` (see
    `problems.respond_to_problem`).

    Args:
        store: The runs.
        settings: How they are served.
    """
    # No page of FastAPI's own: those load scripts from other sites.
    app = FastAPI(
        title="sb3_mlflow_ckpt Training History",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.store = PatientRuns(store)
    app.state.settings = settings
    app.state.checks = Checks()
    app.state.bodies = Bodies()
    app.state.examiner = pages.Examiner(app.state.checks)
    app.state.last_good = LastGood()
    app.state.problem_page = problem_page
    add_problem_handlers(app)
    for part in (api, pages, api_page):
        app.include_router(part.router)
    describe_api(app)
    app.add_middleware(Doorkeeper, settings=settings)
    return app
