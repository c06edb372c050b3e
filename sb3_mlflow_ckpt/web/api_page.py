"""Owns what the page of the API shows: every route, read from the API's own description. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_EXAMPLES = {"run_id": "550e8400e29b41d4a716446655440000", "episode": "100"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a route."""

    name: str
    where: str
    kind: str
    default: str
    description: str


@dataclass(frozen=True)
class Route:
    """A route of the API."""

    anchor: str
    path: str
    summary: str
    description: str
    parameters: Sequence[Parameter]
    answers: Sequence[tuple[str, str]]
    example: str


def api_view(openapi: Mapping[str, Any]) -> list[Route]:
    """Return the routes of an OpenAPI document."""
    return [_route(path, methods["get"]) for path, methods in openapi["paths"].items() if "get" in methods]


def _route(path: str, operation: Mapping[str, Any]) -> Route:
    parameters = [_parameter(parameter) for parameter in operation.get("parameters", ())]
    answers = [(status, answer["description"]) for status, answer in sorted(operation["responses"].items())]
    example = path
    for name, value in _EXAMPLES.items():
        example = example.replace(f"{{{name}}}", value)
    if path.endswith("/compare"):
        example += "?run=550e8400e29b41d4a716446655440000&run=660e8400e29b41d4a716446655440000"
    return Route(
        anchor=str(operation["operationId"]),
        path=path,
        summary=str(operation.get("summary", "")),
        description=str(operation.get("description", "")),
        parameters=parameters,
        answers=answers,
        example=f"curl '{{base}}{example}'",
    )


def _parameter(parameter: Mapping[str, Any]) -> Parameter:
    schema = parameter.get("schema", {})
    default = schema.get("default")
    return Parameter(
        name=str(parameter["name"]),
        where=str(parameter["in"]),
        kind=_kind(schema),
        default=""
        if default in (None, "", [])
        else str(default).lower()
        if isinstance(default, bool)
        else str(default),
        description=str(parameter.get("description", "")),
    )


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(kind for kind in map(_kind, schema["anyOf"]) if kind != "null")
    if schema.get("type") == "array":
        return f"{_kind(schema.get('items', {}))}, repeated"
    bounds = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    return " ".join([str(schema.get("type", "any")), *bounds])
