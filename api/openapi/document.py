"""api: the OpenAPI 3.1 document, made of the routes, what api/openapi/operations.py says of them, and the models
that validate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from jobledger.api.auth.permissions import PUBLIC_PATHS
from jobledger.api.http.error_codes import ERROR_CODES
from jobledger.api.http.preferences import MAX_WAIT_SECONDS
from jobledger.api.openapi.operations import OPERATIONS, Operation
from jobledger.api.schemas import requests as models
from jobledger.api.schemas.responses import ErrorResponse

Json = dict[str, Any]
_REFS: Final = "#/components/schemas/{model}"
_TAGS: Final = {
    "jobs": "Submit jobs, follow them, act on them.",
    "batches": "Jobs that belong together.",
    "files": "What completed jobs have made.",
    "ledger": "The log itself, for auditors and subscribers.",
    "monitoring": "How everything is.",
    "service": "Where things are, and whether it runs.",
}
_POSITION: Final = {"type": "integer", "minimum": 0}
_REQUEST_HEADERS: Final[Mapping[str, tuple[Json, str]]] = {
    "Ledger-Position": (_POSITION, "Wait until the views have reached this position; a change has answered with it."),
    "If-Match": ({"type": "string"}, "Do nothing unless it still has this ETag."),
    "If-None-Match": ({"type": "string"}, "The ETag that you have: if it is still right, the answer is 304."),
    "Idempotency-Key": (
        {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
        "The same key, user and body are answered with the first result, and nothing is done twice.",
    ),
    "Prefer": (
        {"type": "string", "examples": ["wait=30"]},
        f"`wait=SECONDS`: answer when it has ended, or after so many seconds, at most {MAX_WAIT_SECONDS}.",
    ),
    "Last-Event-ID": (_POSITION, "The position of the last event that you have: the stream goes on behind it."),
    "Range": ({"type": "string", "examples": ["bytes=0-499"]}, "Only these parts of the file."),
}
_RESPONSE_HEADERS: Final[Mapping[str, tuple[Json, str]]] = {
    "X-Request-ID": ({"type": "string"}, "Under this id the request is in the log: yours, if you sent one."),
    "Ledger-Position": (_POSITION, "The position of the change: a GET that sends it sees the change."),
    "ETag": ({"type": "string"}, "The version, for If-Match and If-None-Match."),
    "Location": ({"type": "string"}, "Where it can be read."),
    "Preference-Applied": ({"type": "string"}, "The preference that was applied: `wait=SECONDS`."),
    "Retry-After": (_POSITION, "After so many seconds it is worth trying again."),
    "WWW-Authenticate": ({"type": "string"}, "How to say who you are."),
}
_DESCRIPTION: Final = """\
Jobs are submitted, processed, and followed here; every change is an event in one log.

Success is `{"status": "success", …}`, failure `{"status": "error", "code", "message", "details"}`. Bodies are JSON.
A change answers with `Ledger-Position`; a GET that sends it sees the change. What one may not see
answers as if it were not there."""
_EVERYWHERE: Final = (
    "unknown_host",
    "ambiguous_length",
    "duplicate_header",
    "uri_too_long",
    "headers_too_large",
    "invalid_content",
    "internal_error",
)
_SIGNED_IN: Final = (
    "authentication_required",
    "invalid_credentials",
    "jwks_unavailable",
    "too_many_requests",
    "too_many_auth_failures",
    "database_unavailable",
)
_BODY: Final = (
    "malformed_json",
    "incomplete_body",
    "content_too_large",
    "too_many_values",
    "unsupported_content_encoding",
    "unsupported_media_type",
    "server_busy",
)
_CHANGE: Final = ("invalid_state", "version_conflict", "already_exists", "write_contention")
_POST: Final = ("malformed_idempotency_key", "idempotency_key_reused", "invalid_content")
_OF_ONE: Final = ("precondition_failed", "unreadable_event", "event_damaged")
_IN_PATH: Final = {
    "job_id": "job_not_found",
    "batch_id": "batch_not_found",
    "path": "file_not_found",
    "delivery_id": "delivery_not_found",
    "endpoint_id": "endpoint_not_found",
}
_SESSION: Final = {
    "event": "FOSDEM 2025",
    "session": "Welcome to FOSDEM",
    "url": "https://fosdem.org/2025/schedule/event/fosdem-2025-6712-welcome-to-fosdem-2025/",
    "filename": "Welcome.md",
    "track": "Keynotes",
    "day": "Saturday",
    "starttime": "09:30",
    "endtime": "09:55",
    "speakers": ["FOSDEM Staff"],
    "video_url": None,
    "attachments_url": None,
    "source_language": "en",
    "target_language": "de",
}
EXAMPLES: Final[Mapping[type[BaseModel], Json]] = {
    models.JobBody: {"job_type": "session", "job_name": "Welcome", "priority": 10, "parameters": _SESSION},
    models.BatchBody: {
        "batch_name": "Keynotes",
        "parameters": {"event": "FOSDEM 2025", "track": "Keynotes"},
        "jobs": [{"parameters": {"session": "Welcome", "url": _SESSION["url"], "filename": "Welcome.md"}}],
        "access_control": {"visibility": "team", "write_access": ["team-editors"]},
    },
    models.JobUpdateBody: {"priority": 100, "not_before": "2026-02-01T09:30:00Z"},
    models.BatchUpdateBody: {"access_control": {"visibility": "public"}},
    models.ReasonBody: {"reason": "the talk was given up"},
    models.JobRestartBody: {"reason": "the recording has come", "reuse_steps": False},
    models.BatchRestartBody: {"only": "failed"},
}
"""Bodies that are accepted as they stand."""


def build_document(routes: Iterable[Route], job_types: Mapping[str, type[BaseModel]], base_url: str = "/") -> Json:
    """Return the document. Routes that api/openapi/operations.py does not describe are left out, and a test fails.

    Args:
        routes: what to describe.
        job_types: the models of parameters by job type.
        base: the address of the API.
    """
    described = [(route, OPERATIONS[route.endpoint]) for route in routes if route.endpoint in OPERATIONS]
    names, schemas = _schemas([door for _, door in described], job_types)
    paths: dict[str, Json] = {}
    for route, door in described:
        method = next(iter((route.methods or set()) - {"HEAD"}))
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[method.lower()] = _operation(route, door, method, path, names, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Jobledger",
            "version": version("jobledger"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": base_url}],
        "security": [{"bearer": []}, {}],
        "tags": [{"name": name, "description": description} for name, description in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "headers": {name: _header(*about) for name, about in _RESPONSE_HEADERS.items()},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (`auth.mode: keys`) or a JSON Web Token (`jwt`). In the modes `open` "
                    "and `proxy`, and for what is public where `auth.anonymous_read` is on, nothing has to be sent.",
                }
            },
        },
    }


# Schemas ----------------------------------------------------------------------------------------------------------

Mode = Literal["validation", "serialization"]
Names = Mapping[tuple[Any, Mode], Json]


def _schemas(doors: Iterable[Operation], job_types: Mapping[str, type[BaseModel]]) -> tuple[Names, Json]:
    """Return a reference for each model, and the schemas that are referred to."""
    taken = [model for door in doors for model in (door.body, door.query_model) if model is not None]
    given: list[type[BaseModel]] = [ErrorResponse]
    given += [door.response for door in doors if not isinstance(door.response, str)]
    wanted: list[tuple[type[BaseModel], Mode]] = [(model, "validation") for model in (*taken, *job_types.values())]
    wanted += [(model, "serialization") for model in given]
    names, definitions = models_json_schema(list(dict.fromkeys(wanted)), ref_template=_REFS)
    schemas: Json = definitions["$defs"]
    parameters = {name: names[model, "validation"] for name, model in job_types.items()}
    return names, schemas | _jobs(schemas, parameters)


def _jobs(schemas: Mapping[str, Json], parameters: Mapping[str, Json]) -> Json:
    """Return the schema of a job's body with one form for each job type, which says what its parameters are."""
    plain = {name: value for name, value in schemas["JobBody"].items() if name != "title"}
    in_batch = {**plain, "description": "As a job by itself; what its parameters lack is in the batch's."}
    forms = {f"{name.capitalize()}JobBody": _of_type(plain, name, given) for name, given in parameters.items()}
    several = [{"$ref": _REFS.format(model=name)} for name in forms]
    if "session" in parameters:
        several.append(parameters["session"])  # a bare session
    batch = dict(schemas["BatchBody"])
    jobs = {**batch["properties"]["jobs"], "items": {"$ref": _REFS.format(model="JobInBatch")}}
    return {
        **forms,
        "JobBody": {"title": "JobBody", "description": plain["description"], "anyOf": several},
        "JobInBatch": {"title": "JobInBatch", **in_batch},
        "BatchBody": {**batch, "properties": {**batch["properties"], "jobs": jobs}},
    }


def _of_type(plain: Json, name: str, parameters: Json) -> Json:
    fields = plain["properties"]
    job_type = {"const": name, **({"default": name} if fields["job_type"]["default"] == name else {})}
    required = plain["required"] if "default" in job_type else [*plain["required"], "job_type"]
    changed = {**fields, "job_type": job_type, "parameters": parameters}
    return {**plain, "description": f"A job of type `{name}`.", "properties": changed, "required": required}


# Operations -------------------------------------------------------------------------------------------------------


def _operation(route: Route, door: Operation, method: str, path: str, names: Names, schemas: Json) -> Json:
    operation: Json = {
        "operationId": route.name,
        "tags": [_tag(path)],
        "summary": door.summary,
        "parameters": _parameters(route, door, method, names, schemas),
    }
    if door.body is not None:
        content: Json = {"schema": names[door.body, "validation"]}
        if door.body in EXAMPLES:
            content["example"] = EXAMPLES[door.body]
        operation["requestBody"] = {"required": not door.is_body_optional, "content": {"application/json": content}}
    operation["responses"] = {
        **_successes(door, method, names),
        **_failures(_codes(route, door, method, path)),
    }
    if path in PUBLIC_PATHS:
        operation["security"] = []
    return operation


def _tag(path: str) -> str:
    for name in ("jobs", "batches", "files"):
        if path.startswith(f"/api/events/{name}"):
            return name
    return next((name for name in ("ledger", "monitoring") if path.startswith(f"/api/{name}/")), "service")


def _parameters(route: Route, door: Operation, method: str, names: Names, schemas: Json) -> list[Json]:
    found: list[Json] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.param_convertors
    ]
    model = schemas[names[door.query_model, "validation"]["$ref"].rpartition("/")[2]]
    found += [_in_query(name, schema, model) for name, schema in model["properties"].items()]
    headers = list(door.request_headers)
    headers += ["Ledger-Position"] if door.reads_views else []
    headers += ["If-Match"] if method != "GET" and _has_version(route) else []
    headers += ["Idempotency-Key"] if method == "POST" else []
    for name in headers:
        schema, description = _REQUEST_HEADERS[name]
        found.append({"name": name, "in": "header", "description": description, "schema": schema})
    return found


def _in_query(name: str, schema: Json, model: Json) -> Json:
    """Return a query parameter. Null cannot be said in an address: it is left out."""
    schema = {key: value for key, value in schema.items() if key != "title" and (key, value) != ("default", None)}
    forms = [form for form in schema.get("anyOf", ()) if form != {"type": "null"}]
    if len(forms) == 1:
        schema = {**{key: value for key, value in schema.items() if key != "anyOf"}, **forms[0]}
    parameter = {"name": name, "in": "query", "schema": schema, "required": name in model.get("required", ())}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    return parameter


def _has_version(route: Route) -> bool:
    return not {"job_id", "batch_id"}.isdisjoint(route.param_convertors)


def _successes(door: Operation, method: str, names: Names) -> dict[str, Json]:
    headers = [
        *door.response_headers,
        *(["Ledger-Position"] if door.reads_views or (method != "GET" and door.appends_events) else []),
    ]
    headers += ["Preference-Applied"] if "Prefer" in door.request_headers else []
    if isinstance(door.response, str):
        content: Json = {door.response: {"schema": {} if door.response != "application/json" else {"type": "object"}}}
    else:
        content = {"application/json": {"schema": names[door.response, "serialization"]}}
    about = "It is sent." if isinstance(door.response, str) else (door.response.__doc__ or "").partition("\n\n")[0]
    found = {str(door.status): {"description": about, "headers": _headers(*headers), "content": content}}
    if 206 in door.extra_statuses:
        found["206"] = {"description": "The parts asked for.", "headers": _headers(*headers), "content": content}
    if 304 in door.extra_statuses:
        found["304"] = {"description": "It is as you have it.", "headers": _headers(*headers)}
    return found


def _codes(route: Route, door: Operation, method: str, path: str) -> list[str]:
    codes = [*_EVERYWHERE, *door.error_codes]
    if path not in PUBLIC_PATHS:
        codes += _SIGNED_IN
    if path == "/readyz":
        codes += ["database_unavailable", "projection_stalled"]
    if route.param_convertors:
        codes += ["not_found", *(_IN_PATH[name] for name in route.param_convertors)]
    if method != "GET":
        codes += ["forbidden", "origin_not_allowed"]
    if method != "GET" and door.appends_events:
        codes += _CHANGE
    if method == "POST":
        codes += _POST
    if method != "GET" and _has_version(route):
        codes += _OF_ONE
    if door.body is not None:
        codes += _BODY
    if door.reads_views:
        codes += ["malformed_position", "projection_lagging"]
    return sorted(dict.fromkeys(codes), key=lambda code: (ERROR_CODES[code][0], code))


def _failures(codes: Sequence[str]) -> dict[str, Json]:
    return {
        str(status): _failure(status, list(found))
        for status, found in groupby(codes, key=lambda code: ERROR_CODES[code][0])
    }


def _failure(status: int, codes: Sequence[str]) -> Json:
    retry = ["Retry-After"] if status in (429, 503, 507) else []
    asked = ["WWW-Authenticate"] if status == 401 else []
    schema = {"allOf": [{"$ref": _REFS.format(model="ErrorResponse")}, {"properties": {"code": {"enum": list(codes)}}}]}
    example = {
        "status": "error",
        "code": codes[0],
        "message": f"{ERROR_CODES[codes[0]][1].capitalize()}.",
        "details": {},
    }
    return {
        "description": "\n".join(f"- `{code}`: {ERROR_CODES[code][1]}" for code in codes),
        "headers": _headers(*retry, *asked),
        "content": {"application/json": {"schema": schema, "example": example}},
    }


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-ID", *names)}


def _header(schema: Json, description: str) -> Json:
    return {"description": description, "schema": schema}
