"""Owns the API's description: OpenAPI, the same whatever the server's settings."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sb3_mlflow_ckpt.web.schemas import Problem

API_VERSION = "1"
"""Another one where something is renamed or goes; what comes in addition changes nothing."""

DESCRIPTION = """Training runs and their checkpoints, as they lie in run folders or in MongoDB.

Nothing can be changed here. Times are RFC 3339 in UTC. A number that is not finite is null. Records are shown as they
are kept: where somebody edited one, a value may be missing or of another kind than is described.
Answers bear an `ETag`; `If-None-Match` is answered with 304 where nothing has changed. HEAD works wherever GET does.
A server that was started with a token wants it: `Authorization: Bearer <token>`."""


def describe_api(app: FastAPI) -> None:
    """Make `app.openapi()` return the API's description."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
            # Answers refer to it; FastAPI adds of itself only what has a media type of JSON.
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            document["components"]["schemas"] |= {**problem.pop("$defs", {}), "Problem": problem}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
