"""Options with fixed values accept the same values as the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from jobledger.cli.main import app
from tests.api.test_openapi import DOCUMENT, OPERATIONS_BY_ROUTE

_QUERY_PARAMETERS = {
    **{
        f"{command} --status": ("GET /api/events/jobs", "status")
        for command in ("jobs cancel", "jobs retry", "jobs archive", "jobs unarchive", "jobs delete", "errors ls")
    },
    "jobs ls --status": ("GET /api/events/jobs", "status"),
    "batches ls --status": ("GET /api/events/batches", "status"),
    "webhooks ls --status": ("GET /api/monitoring/events/webhooks", "status"),
}
_OWN_VALUES = ("return", "output", "shell", "level")
"""Parameters with fixed values that the API does not have."""
_BODY_FIELDS = {
    "batches retry --only": ("POST /api/events/batches/{batch_id}/restart", "only"),
    "webhooks redeliver --status": ("POST /api/monitoring/events/redeliver", "status"),
}


def list_literal_values(annotation: Any) -> set[str]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {value for part in get_args(annotation) for value in list_literal_values(part)}


def list_cli_choices(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yield `command --option` and its values for all options with fixed values."""
    for command in group.registered_commands:
        assert command.callback is not None
        name = f"{prefix}{command.name or command.callback.__name__}"
        for parameter, annotation in get_type_hints(command.callback).items():
            if parameter not in _OWN_VALUES and (values := list_literal_values(annotation)):
                yield f"{name} --{parameter}", values
    for subgroup in group.registered_groups:
        assert subgroup.typer_instance is not None
        yield from list_cli_choices(subgroup.typer_instance, f"{prefix}{subgroup.name} ")


def resolve_reference(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        target: Any = DOCUMENT
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


def list_schema_values(schema: dict[str, Any]) -> set[str]:
    schema = resolve_reference(schema)
    values = set(schema.get("enum", [])) | ({schema["const"]} if "const" in schema else set())
    return values | {value for part in schema.get("anyOf", ()) for value in list_schema_values(part)} - {None}


def list_api_choices() -> Iterator[tuple[str, set[str]]]:
    for option, (route, name) in _QUERY_PARAMETERS.items():
        [parameter] = [
            schema
            for schema in map(resolve_reference, OPERATIONS_BY_ROUTE[route]["parameters"])
            if schema["name"] == name
        ]
        yield option, list_schema_values(parameter["schema"])
    for option, (route, name) in _BODY_FIELDS.items():
        body = resolve_reference(OPERATIONS_BY_ROUTE[route]["requestBody"])["content"]["application/json"]["schema"]
        yield option, list_schema_values(resolve_reference(body)["properties"][name])


def test_cli_choices_match_openapi_document() -> None:
    assert dict(list_cli_choices(app)) == dict(list_api_choices())
