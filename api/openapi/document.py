"""Build the OpenAPI 3.1 document from the routes, their operations, and the models that validate requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import resources
from importlib.metadata import version
from itertools import groupby
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jobledger.api.auth.permissions import PUBLIC_PATHS
from jobledger.api.http.error_codes import ERROR_CODES
from jobledger.api.openapi.operation import DocumentedRoute, Operation
from jobledger.api.schemas.response_models import ErrorResponse

Json = dict[str, Any]
_REFS: Final = "#/components/schemas/{model}"
_STATIC: Final[Json] = yaml.safe_load(resources.files(__package__).joinpath("document.yaml").read_text("utf-8"))
EXAMPLES: Final[Mapping[str, Json]] = _STATIC["examples"]
"""Example bodies by the name of their model. The server accepts them unchanged."""
_ERROR_CODE_GROUPS: Final[Mapping[str, Any]] = _STATIC["error_code_groups"]


def build_document(
    routes: Sequence[DocumentedRoute], job_types: Mapping[str, type[BaseModel]], base_url: str = "/"
) -> Json:
    """Return the document. `job_types` maps job types to the models of their parameters."""
    names, schemas = _build_schemas([route.operation for route in routes], job_types)
    paths: dict[str, Json] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        described = _describe_operation(route, path, names, schemas)
        paths.setdefault(path, {})[route.operation.method.lower()] = described
    document: Json = deepcopy(_STATIC["document"])
    document["info"]["version"] = version("jobledger")
    document["components"]["schemas"] = schemas
    return {**document, "servers": [{"url": base_url}], "paths": paths}


# Schemas ----------------------------------------------------------------------------------------------------------

Mode = Literal["validation", "serialization"]
Names = Mapping[tuple[Any, Mode], Json]


def _build_schemas(operations: Sequence[Operation], job_types: Mapping[str, type[BaseModel]]) -> tuple[Names, Json]:
    """Return the reference of each model, and the schemas by name."""
    requested = [operation.query_model for operation in operations]
    requested += [operation.body for operation in operations if operation.body is not None]
    returned: list[type[BaseModel]] = [ErrorResponse]
    returned += [operation.response for operation in operations if not isinstance(operation.response, str)]
    modes: list[tuple[type[BaseModel], Mode]] = [(model, "validation") for model in (*requested, *job_types.values())]
    modes += [(model, "serialization") for model in returned]
    names, definitions = models_json_schema(list(dict.fromkeys(modes)), ref_template=_REFS)
    schemas: Json = definitions["$defs"]
    parameters = {name: names[model, "validation"] for name, model in job_types.items()}
    return names, schemas | _build_job_schemas(schemas, parameters)


def _build_job_schemas(schemas: Mapping[str, Json], parameters: Mapping[str, Json]) -> Json:
    """Return the schemas of jobs and batches, with one variant of `JobBody` for each job type and its parameters."""
    plain = {name: value for name, value in schemas["JobBody"].items() if name != "title"}
    in_batch = {**plain, "description": "A job of a batch. The parameters of the batch are defaults for its own."}
    variants = {
        f"{name.capitalize()}JobBody": _build_variant(plain, name, schema) for name, schema in parameters.items()
    }
    choices = [{"$ref": _REFS.format(model=name)} for name in variants]
    if "session" in parameters:
        choices.append(parameters["session"])  # a bare session
    batch = dict(schemas["BatchBody"])
    jobs = {**batch["properties"]["jobs"], "items": {"$ref": _REFS.format(model="JobInBatch")}}
    return {
        **variants,
        "JobBody": {"title": "JobBody", "description": plain["description"], "anyOf": choices},
        "JobInBatch": {"title": "JobInBatch", **in_batch},
        "BatchBody": {**batch, "properties": {**batch["properties"], "jobs": jobs}},
    }


def _build_variant(plain: Json, name: str, parameters: Json) -> Json:
    fields = plain["properties"]
    job_type = {"const": name, **({"default": name} if fields["job_type"]["default"] == name else {})}
    required = plain["required"] if "default" in job_type else [*plain["required"], "job_type"]
    changed = {**fields, "job_type": job_type, "parameters": parameters}
    return {**plain, "description": f"A job of type `{name}`.", "properties": changed, "required": required}


# Operations -------------------------------------------------------------------------------------------------------


def _describe_operation(route: DocumentedRoute, path: str, names: Names, schemas: Json) -> Json:
    operation = route.operation
    described: Json = {
        "operationId": route.name,
        "tags": [_select_tag(path)],
        "summary": route.summary,
        "parameters": _describe_parameters(route, names, schemas),
    }
    if operation.body is not None:
        content: Json = {"schema": names[operation.body, "validation"]}
        if operation.body.__name__ in EXAMPLES:
            content["example"] = EXAMPLES[operation.body.__name__]
        described["requestBody"] = {
            "required": not operation.is_body_optional,
            "content": {"application/json": content},
        }
    described["responses"] = {
        **_describe_successes(operation, names),
        **_describe_errors(_list_error_codes(route, path)),
    }
    if path in PUBLIC_PATHS:
        described["security"] = []
    return described


def _select_tag(path: str) -> str:
    for name in ("jobs", "batches", "files"):
        if path.startswith(f"/api/events/{name}"):
            return name
    return next((name for name in ("ledger", "monitoring") if path.startswith(f"/api/{name}/")), "service")


def _describe_parameters(route: DocumentedRoute, names: Names, schemas: Json) -> list[Json]:
    operation, method = route.operation, route.operation.method
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.param_convertors
    ]
    model = schemas[names[operation.query_model, "validation"]["$ref"].rpartition("/")[2]]
    parameters += [_describe_query_parameter(name, schema, model) for name, schema in model["properties"].items()]
    headers = ["If-Match", "If-None-Match"] if operation.is_conditional else []
    headers += operation.request_headers
    headers += ["Ledger-Position"] if operation.is_from_views else []
    headers += ["If-Match"] if method != "GET" and _has_version(route) else []
    headers += ["Idempotency-Key"] if method == "POST" else []
    return parameters + [{"name": name, "in": "header", **_STATIC["request_headers"][name]} for name in headers]


def _describe_query_parameter(name: str, schema: Json, model: Json) -> Json:
    """Return a query parameter. A query string cannot express null, so null is left out."""
    schema = {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}
    variants = [variant for variant in schema.get("anyOf", ()) if variant != {"type": "null"}]
    if len(variants) == 1:
        schema = {**{key: value for key, value in schema.items() if key != "anyOf"}, **variants[0]}
    parameter = {"name": name, "in": "query", "schema": schema, "required": name in model.get("required", ())}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    return parameter


def _has_version(route: DocumentedRoute) -> bool:
    return not {"job_id", "batch_id"}.isdisjoint(route.param_convertors)


def _describe_successes(operation: Operation, names: Names) -> dict[str, Json]:
    headers = [*operation.response_headers]
    if operation.is_conditional:
        headers.append("ETag")
    if operation.is_from_views or (operation.method != "GET" and operation.can_append_events):
        headers.append("Ledger-Position")
    if "Prefer" in operation.request_headers:
        headers.append("Preference-Applied")
    if isinstance(operation.response, str):
        description = "The content."
        schema = {"type": "object"} if operation.response == "application/json" else {}
        content: Json = {operation.response: {"schema": schema}}
    else:
        description = (operation.response.__doc__ or "").partition("\n\n")[0]
        content = {"application/json": {"schema": names[operation.response, "serialization"]}}
    described_headers = _select_headers(*headers)
    complete: Json = {"description": description, "headers": described_headers, "content": content}
    responses: dict[str, Json] = {str(operation.status): complete}
    if "Range" in operation.request_headers:
        responses["206"] = {**complete, "description": "The requested parts."}
    if operation.is_conditional:
        responses["304"] = {"description": "Your copy is current.", "headers": described_headers}
    return responses


def _list_error_codes(route: DocumentedRoute, path: str) -> list[str]:
    operation, method = route.operation, route.operation.method
    codes = [*_ERROR_CODE_GROUPS["every_request"], *operation.error_codes]
    if path not in PUBLIC_PATHS:
        codes += _ERROR_CODE_GROUPS["authentication"]
    if route.param_convertors:
        codes += ["not_found", *(_ERROR_CODE_GROUPS["not_found"][name] for name in route.param_convertors)]
    if method != "GET":
        codes += ["forbidden", "origin_not_allowed"]
    if method != "GET" and operation.can_append_events:
        codes += _ERROR_CODE_GROUPS["can_append_events"]
    if method == "POST":
        codes += _ERROR_CODE_GROUPS["post"]
    if method != "GET" and _has_version(route):
        codes += _ERROR_CODE_GROUPS["checks_version"]
    if operation.body is not None:
        codes += _ERROR_CODE_GROUPS["body"]
    if operation.is_from_views:
        codes += ["malformed_position", "projection_lagging"]
    if operation.is_conditional:
        codes.append("precondition_failed")
    return sorted(dict.fromkeys(codes), key=lambda code: (ERROR_CODES[code][0], code))


def _describe_errors(codes: Sequence[str]) -> dict[str, Json]:
    return {
        str(status): _describe_error(status, list(group))
        for status, group in groupby(codes, key=lambda code: ERROR_CODES[code][0])
    }


def _describe_error(status: int, codes: Sequence[str]) -> Json:
    retry = ["Retry-After"] if status in (429, 503, 507) else []
    authenticate = ["WWW-Authenticate"] if status == 401 else []
    schema = {"allOf": [{"$ref": _REFS.format(model="ErrorResponse")}, {"properties": {"code": {"enum": list(codes)}}}]}
    example = {
        "status": "error",
        "code": codes[0],
        "message": f"{ERROR_CODES[codes[0]][1].capitalize()}.",
        "details": {},
    }
    return {
        "description": "\n".join(f"- `{code}`: {ERROR_CODES[code][1]}" for code in codes),
        "headers": _select_headers(*retry, *authenticate),
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _select_headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-ID", *names)}
