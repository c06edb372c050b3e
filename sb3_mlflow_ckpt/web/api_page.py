"""Owns the page that explains the REST API, made from the app's own OpenAPI document: it works without a network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from sb3_mlflow_ckpt.web.rendering import page

router = APIRouter(include_in_schema=False)

_EXAMPLES = {"run_id": "RUN_ID", "episode": "EPISODE", "run": "RUN_ID"}


@dataclass(frozen=True)
class Parameter:
    """What a route takes."""

    name: str
    place: str
    kind: str
    required: bool
    default: str
    description: str


@dataclass(frozen=True)
class Answer:
    """What a route may answer."""

    status: str
    description: str
    media_type: str
    fields: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Route:
    """One route."""

    anchor: str
    method: str
    path: str
    summary: str
    description: str
    parameters: tuple[Parameter, ...]
    answers: tuple[Answer, ...]
    curl: str


def routes(document: Mapping[str, Any], base: str) -> tuple[Route, ...]:
    """Return every route of an OpenAPI document.

    Args:
        document: The document.
        base: Where the server is, for the examples.
    """
    schemas = document.get("components", {}).get("schemas", {})
    return tuple(
        _route(path, method, operation, schemas, base)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )


def _route(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any], base: str) -> Route:
    parameters = tuple(_parameter(item) for item in operation.get("parameters", ()))
    return Route(
        anchor=str(operation.get("operationId", path)),
        method=method.upper(),
        path=path,
        summary=str(operation.get("summary", "")),
        description=str(operation.get("description", "")),
        parameters=parameters,
        answers=tuple(_answer(status, item, schemas) for status, item in operation.get("responses", {}).items()),
        curl=_curl(path, parameters, operation, base),
    )


def _parameter(item: Mapping[str, Any]) -> Parameter:
    schema = item.get("schema", {})
    default = schema.get("default")
    return Parameter(
        name=item["name"],
        place=item["in"],
        kind=_kind(schema),
        required=bool(item.get("required")),
        default="" if default in (None, "", []) else str(default),
        description=str(item.get("description") or schema.get("description") or ""),
    )


def _kind(schema: Mapping[str, Any]) -> str:
    """Return a schema in a word or two: integer or null, list of Run."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(part) for part in schema[key]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _answer(status: str, item: Mapping[str, Any], schemas: Mapping[str, Any]) -> Answer:
    content = item.get("content", {})
    media_type = next(iter(content), "")
    schema = content.get(media_type, {}).get("schema", {})
    named = schemas.get(str(schema.get("$ref", "")).rpartition("/")[2], {}) if status == "200" else {}
    fields = tuple(
        (name, _kind(part), str(part.get("description", ""))) for name, part in named.get("properties", {}).items()
    )
    return Answer(status, str(item.get("description", "")), media_type, fields)


def _curl(path: str, parameters: tuple[Parameter, ...], operation: Mapping[str, Any], base: str) -> str:
    for parameter in parameters:
        if parameter.place == "path":
            path = path.replace(f"{{{parameter.name}}}", _EXAMPLES.get(parameter.name, parameter.name.upper()))
    needed = [item for item in parameters if item.required and item.place == "query"]
    query = "&".join(f"{item.name}={_EXAMPLES.get(item.name, '1')}" for item in needed)
    if operation.get("operationId") == "compare_runs":
        query = "run=RUN_ID&run=OTHER_RUN_ID"
    address = f"{base}{quote(path)}" + (f"?{query}" if query else "")
    flags = ["-O", "-J"] if path.endswith("/download") else []
    return shlex.join(["curl", *flags, address])


@router.get("/api")
def show_api(request: Request) -> Response:
    """Explain the API."""
    base = str(request.base_url).rstrip("/")
    document = request.app.openapi()
    return page(
        request,
        "api.html",
        routes=routes(document, base),
        version=document["info"]["version"],
        description=str(document["info"].get("description", "")),
        with_token=request.app.state.settings.token is not None,
        outage=None,
    )
