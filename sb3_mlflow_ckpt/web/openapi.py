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
            _without_fastapis_own(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _without_fastapis_own(document: dict[str, Any]) -> None:
    """Take out the answers that FastAPI supposes for every path with an id: here, such an id names nothing: 404."""
    for operations in document["paths"].values():
        for operation in operations.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
