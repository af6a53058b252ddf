"""Build the OpenAPI 3.1 document from the routes, their operations, and the models that validate requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import resources
from importlib.metadata import version
from itertools import groupby
from typing import Any, Final

import yaml
from pydantic import BaseModel

from jobledger.api.auth.permissions import PUBLIC_PATHS
from jobledger.api.http.error_codes import ERROR_CODES
from jobledger.api.openapi.component_schemas import Json, References, build_schemas, get_reference
from jobledger.api.openapi.operation import DocumentedRoute, Operation

_STATIC: Final[Json] = yaml.safe_load(resources.files(__package__).joinpath("document.yaml").read_text("utf-8"))
EXAMPLES: Final[Mapping[str, Json]] = _STATIC["examples"]
"""Example bodies by the name of their model. The server accepts them unchanged."""
_TAG_WORDS: Final[Mapping[str, Sequence[str]]] = {
    "jobs": ("job", "jobs"),
    "batches": ("batch", "batches"),
    "files": ("file", "files"),
}
"""The words of handler names that repeat the tag."""
_ERROR_CODE_GROUPS: Final[Mapping[str, Any]] = _STATIC["error_code_groups"]


def build_document(
    routes: Sequence[DocumentedRoute], job_types: Mapping[str, type[BaseModel]], base_url: str = "/"
) -> Json:
    """Return the document. `job_types` maps job types to the models of their parameters."""
    references, schemas, queries = build_schemas([route.operation for route in routes], job_types)
    paths: dict[str, Json] = {}
    statuses: set[int] = set()
    for route in routes:
        path = route.path.replace(":path}", "}")
        described = _describe_operation(route, path, references, queries)
        paths.setdefault(path, {})[route.operation.method.lower()] = described
        statuses |= {ERROR_CODES[code][0] for code in _list_error_codes(route, path)}
    document: Json = deepcopy(_STATIC["document"])
    document["info"]["version"] = version("jobledger")
    document["components"]["schemas"] = schemas
    document["components"]["responses"] = {f"Error{status}": _build_error(status) for status in sorted(statuses)}
    return {**document, "servers": [{"url": base_url}], "paths": paths}


# Operations -------------------------------------------------------------------------------------------------------


def _describe_operation(route: DocumentedRoute, path: str, references: References, queries: Json) -> Json:
    operation = route.operation
    described: Json = {
        "operationId": _build_operation_id(route, path),
        "tags": [_select_tag(path)],
        "summary": route.summary,
        "parameters": _describe_parameters(route, references, queries),
    }
    if operation.body is not None:
        content: Json = {"schema": references[operation.body, "validation"]}
        if operation.body.__name__ in EXAMPLES:
            content["example"] = EXAMPLES[operation.body.__name__]
        described["requestBody"] = {
            "required": not operation.is_body_optional,
            "content": {"application/json": content},
        }
    described["responses"] = {
        **_describe_successes(operation, references),
        **_describe_errors(_list_error_codes(route, path)),
    }
    if path in PUBLIC_PATHS:
        described["security"] = []
    return described


def _build_operation_id(route: DocumentedRoute, path: str) -> str:
    """Return the tag and what the handler does, such as `jobs.list` for `list_jobs`."""
    tag = _select_tag(path)
    verb, *words = [word for word in route.name.split("_") if word not in _TAG_WORDS.get(tag, ())]
    return f"{tag}.{verb}{''.join(word.capitalize() for word in words)}"


def _select_tag(path: str) -> str:
    for name in ("jobs", "batches", "files"):
        if path.startswith(f"/api/events/{name}"):
            return name
    return next((name for name in ("ledger", "monitoring") if path.startswith(f"/api/{name}/")), "service")


def _describe_parameters(route: DocumentedRoute, references: References, queries: Json) -> list[Json]:
    operation, method = route.operation, route.operation.method
    parameters: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.param_convertors
    ]
    model = queries[references[operation.query_model, "validation"]["$ref"].rpartition("/")[2]]
    parameters += [_describe_query_parameter(name, schema, model) for name, schema in model["properties"].items()]
    headers = ["If-Match", "If-None-Match"] if operation.is_conditional else []
    headers += operation.request_headers
    headers += ["Ledger-Position"] if operation.is_from_views else []
    headers += ["If-Match"] if method != "GET" and _has_version(route) else []
    headers += ["Idempotency-Key"] if method == "POST" else []
    return parameters + [{"name": name, "in": "header", **_STATIC["request_headers"][name]} for name in headers]


def _describe_query_parameter(name: str, schema: Json, model: Json) -> Json:
    """Return a query parameter without null, which a query string cannot express.

    Empty defaults are left out: generated clients send defaults, and an empty `signature` is an invalid one.
    """
    without = ("title", *(("default",) if schema.get("default") in (None, "") else ()))
    schema = {keyword: value for keyword, value in schema.items() if keyword not in without}
    variants = [variant for variant in schema.get("anyOf", ()) if variant != {"type": "null"}]
    if len(variants) == 1:
        schema = {**{key: value for key, value in schema.items() if key != "anyOf"}, **variants[0]}
    parameter = {"name": name, "in": "query", "schema": schema, "required": name in model.get("required", ())}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    return parameter


def _has_version(route: DocumentedRoute) -> bool:
    return not {"job_id", "batch_id"}.isdisjoint(route.param_convertors)


def _describe_successes(operation: Operation, references: References) -> dict[str, Json]:
    headers = [*operation.response_headers]
    if operation.is_conditional:
        headers.append("ETag")
    if operation.is_from_views or (operation.method != "GET" and operation.can_append_events):
        headers.append("Ledger-Position")
    if "Prefer" in operation.request_headers:
        headers.append("Preference-Applied")
    if isinstance(operation.response, str):
        description, content = "The content.", _describe_content(operation.response)
    else:
        description = (operation.response.__doc__ or "").partition("\n\n")[0]
        content = {"application/json": {"schema": references[operation.response, "serialization"]}}
    described_headers = _select_headers(*headers)
    complete: Json = {"description": description, "headers": described_headers, "content": content}
    responses: dict[str, Json] = {str(operation.status): complete}
    if "Range" in operation.request_headers:
        partial_headers = {**described_headers, **_select_headers("Content-Range")}
        responses["206"] = {**complete, "description": "The requested parts.", "headers": partial_headers}
    if operation.is_conditional:
        responses["304"] = {"description": "Your copy is current.", "headers": described_headers}
    return responses


def _describe_content(media_type: str) -> Json:
    """Return the content of a response that is not a model. Generators do not know the media type `*/*`."""
    if media_type == "application/json":
        return {media_type: {"schema": {"type": "object"}}}
    schema: Json = {"type": "string"} if media_type.startswith("text/") else {"type": "string", "format": "binary"}
    media_types = ("application/octet-stream", media_type) if media_type == "*/*" else (media_type,)
    return {name: {"schema": schema} for name in media_types}


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
        str(status): {
            "$ref": f"#/components/responses/Error{status}",
            "description": "\n".join(f"- `{code}`: {ERROR_CODES[code][1]}" for code in group),
        }
        for status, group in groupby(codes, key=lambda code: ERROR_CODES[code][0])
    }


def _build_error(status: int) -> Json:
    """Return the response that all operations share for a status. Each operation describes its own codes."""
    codes = sorted(code for code, (code_status, _) in ERROR_CODES.items() if code_status == status)
    retry = ["Retry-After"] if status in (429, 503, 507) else []
    authenticate = ["WWW-Authenticate"] if status == 401 else []
    schema = get_reference("ErrorResponse")
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
