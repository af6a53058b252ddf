"""The OpenAPI document describes every route, error code and header; `/api/docs` shows all of it without requests."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonschema_rs import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel, create_model

from jobledger.api.app import ROUTES
from jobledger.api.auth.redaction import Viewer
from jobledger.api.event_json import encode_event
from jobledger.api.http.error_codes import ERROR_CODES
from jobledger.api.http.errors import ERROR_RESPONSES
from jobledger.api.http.preferences import MAX_WAIT_SECONDS
from jobledger.api.openapi import document as openapi
from jobledger.api.openapi.operation import OPERATIONS
from jobledger.api.schemas.batches import BatchBody, BatchRestartBody, BatchUpdateBody
from jobledger.api.schemas.jobs import JobBody, JobRestartBody, JobUpdateBody
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.events import Event, RecordedEvent
from jobledger.workers.registry import load_processors
from tests.api.conftest import Api
from tests.support.event_examples import EVENT_EXAMPLES, NOON

API = Path(__file__).parents[2] / "api"
DOCUMENT = openapi.build_document(ROUTES, {name: processor.Parameters for name, processor in load_processors().items()})
MODELS_WITH_EXAMPLE: tuple[type[BaseModel], ...] = (
    *(JobBody, JobUpdateBody, JobRestartBody),
    *(BatchBody, BatchUpdateBody, BatchRestartBody),
    ReasonBody,
)
OPERATIONS_BY_ROUTE = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def test_document_describes_every_route() -> None:
    missing = [f"{route.methods} {route.path}" for route in ROUTES if route.endpoint not in OPERATIONS]
    assert not missing, f"the handlers of these routes need @Operation: {missing}"
    assert {route.endpoint for route in ROUTES} == set(OPERATIONS), "a handler with @Operation has no route"


def find_raised_codes() -> Iterator[tuple[str, int]]:
    """Yield code and status of every `ApiError(status, "code", …)` in the source. The status is 0 if computed."""
    for file in API.rglob("*.py"):
        if "dashboard" in file.parts:  # dashboard pages are not in the document
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                status, code = node.args[:2]
                if isinstance(code, ast.Constant):
                    yield str(code.value), status.value if isinstance(status, ast.Constant) else 0  # type: ignore[misc]  # a status is an int


def test_error_codes_in_source_are_in_catalog_and_in_a_response() -> None:
    raised = {*find_raised_codes(), *((code, status) for _, status, code, _ in ERROR_RESPONSES)}
    assert raised
    assert {(code, status) for code, status in raised if ERROR_CODES.get(code, (None,))[0] != status} == set()
    described = {
        code
        for operation in OPERATIONS_BY_ROUTE.values()
        for response in operation["responses"].values()
        for code in re.findall(r"^- `(\w+)`", response["description"], re.MULTILINE)
    }
    codes_outside_operations = {"method_not_allowed", "bad_request"}
    assert described == set(ERROR_CODES) - codes_outside_operations
    assert set(ERROR_CODES) - codes_outside_operations - {"not_found", "range_not_satisfiable", "batch_not_found"} <= {
        code for code, _ in raised
    }


def test_operation_ids_are_unique_and_consist_of_tag_and_action() -> None:
    ids = [operation["operationId"] for operation in OPERATIONS_BY_ROUTE.values()]
    assert len(set(ids)) == len(ids)
    assert OPERATIONS_BY_ROUTE["GET /api/events/jobs"]["operationId"] == "jobs.list"
    assert OPERATIONS_BY_ROUTE["GET /api/events/jobs/{job_id}"]["operationId"] == "jobs.get"
    assert OPERATIONS_BY_ROUTE["POST /api/events/batches/{batch_id}/pause"]["operationId"] == "batches.pause"
    assert all(re.fullmatch(r"[a-z]+\.[a-zA-Z]+", operation_id) for operation_id in ids), ids


def test_parameters_of_two_job_types_with_equal_class_names_have_own_schemas() -> None:
    def create_models() -> type[BaseModel]:
        item = create_model("Item", amount=(int, ...))
        return create_model("Parameters", items=(list[item], ...))

    job_types = {"invoice": create_models(), "credit-note": create_models(), "credit_note": create_models()}
    schemas = openapi.build_document(ROUTES, job_types)["components"]["schemas"]
    for prefix, number in (("Invoice", ""), ("CreditNote", ""), ("CreditNote", "2")):
        assert schemas[f"{prefix}Parameters{number}"]["properties"]["items"]["items"] == {
            "$ref": f"#/components/schemas/{prefix}Item{number}"
        }
    assert {"InvoiceJobBody", "CreditNoteJobBody", "CreditNoteJobBody2"} <= schemas.keys()
    assert not [name for name in schemas if not re.fullmatch(r"[A-Za-z0-9]+", name)]


def test_schemas_contain_readable_latin_names_and_no_models_of_queries() -> None:
    schemas = openapi.build_document(ROUTES, {"Ämter-Größe": create_model("P")})["components"]["schemas"]
    assert "AmterGroeParameters" in schemas
    assert [name for name in schemas if name.endswith("Query")] == []


@pytest.mark.parametrize(
    "job_types",
    [("ab", "aB", "a.b"), ("job",), ("error",), ("job-resource",), ("job-in-batch",), ("2fa",), ("Ämter", "書", "--")],
    ids="/".join,
)
def test_schema_names_of_odd_job_types_are_identifiers_that_differ_without_case(job_types: Sequence[str]) -> None:
    class WithStatus(BaseModel):
        status: Literal["x"]

    def create_parameters() -> type[BaseModel]:
        models = [create_model(name, x=(int, ...)) for name in ("Body", "Resource", "Response")]
        fields: dict[str, Any] = {model.__name__: (model, ...) for model in models}
        parameters: type[BaseModel] = create_model("Any", __base__=WithStatus, **fields)
        return parameters

    document = openapi.build_document(ROUTES, {job_type: create_parameters() for job_type in job_types})
    schemas = document["components"]["schemas"]
    references = re.findall(r"'\$ref': '#/components/schemas/([^']+)'", str(document))
    assert {*references} <= schemas.keys()
    assert [name for name in schemas if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", name)] == []
    inline_types = [name + field.capitalize() for name in schemas for field in schemas[name].get("properties", ())]
    names = {name.lower() for name in schemas}
    assert len(names) == len(schemas)
    assert names.isdisjoint(name.lower() for name in inline_types), "generators name inline types so"
    variants = [schemas[choice["$ref"].rpartition("/")[2]] for choice in schemas["JobBody"]["anyOf"]]
    assert [variant["properties"]["job_type"]["const"] for variant in variants] == [*job_types]


def test_properties_with_defaults_are_optional_and_describe_their_default() -> None:
    model = create_model("P", default=(int, 3), properties=(list[int], []), enum=(int | None, None), plain=(int, ...))
    schemas = openapi.build_document(ROUTES, {"odd": model})["components"]["schemas"]
    odd = schemas["OddParameters"]
    assert odd["required"] == ["plain"]
    assert odd["properties"]["default"]["description"] == "Default: `3`."
    assert odd["properties"]["default"]["x-default"] == 3
    assert odd["properties"].keys() == {"default", "properties", "enum", "plain"}
    assert schemas["LinkBody"]["properties"]["expires_in_s"]["description"] == "Default: `3600`."
    with_default = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, property_schema in schema.get("properties", {}).items()
        if "default" in property_schema
    ]
    assert with_default == [], "openapi-typescript requires these properties"


def test_enum_of_several_types_becomes_one_enum_for_each_type() -> None:
    class Model(BaseModel):
        mixed: Literal["a", 1, True, None]
        plain: Literal["a", None]

    schemas = openapi.build_document(ROUTES, {"odd": Model})["components"]["schemas"]
    fields = schemas["OddParameters"]["properties"]
    assert fields["mixed"]["anyOf"] == [{"enum": ["a"]}, {"enum": [1]}, {"const": True}, {"type": "null"}]
    assert fields["plain"]["enum"] == ["a", None]


@pytest.mark.parametrize("event", EVENT_EXAMPLES, ids=lambda event: type(event).__name__)
def test_event_schema_is_selected_by_type_and_describes_all_fields(event: Event) -> None:
    union = DOCUMENT["components"]["schemas"]["EventResource"]
    name = type(event).__name__
    assert union["discriminator"]["mapping"][name] == f"#/components/schemas/{name}Event"
    assert len(union["oneOf"]) == len(union["discriminator"]["mapping"])
    validator = Draft202012Validator(
        {"$ref": "#/components/schemas/EventResource", "components": DOCUMENT["components"]}
    )
    stored = {"_id": 1, "event_id": "e", "stream": "job-1", "version": 1, "type": name, "time": NOON, "schema": 1}
    recorded = RecordedEvent({**stored, "data": event.to_payload(), "meta": {"actor": "user:alice"}, "hash": b""})
    for viewer in (Viewer(Principal("alice"), AccessLevel.READ), Viewer(Principal("alice"), AccessLevel.ADMIN)):
        content = json.loads(encode_event(recorded, viewer))
        validator.validate(content)
        validator.validate({**content, "data": {}})
        assert not validator.is_valid({**content, "type": "Unknown"})
        fields = DOCUMENT["components"]["schemas"][f"{name}Data"].get("properties", {})
        assert content["data"].keys() <= fields.keys()


def test_file_download_describes_bytes_and_parts() -> None:
    operation = OPERATIONS_BY_ROUTE["GET /api/events/files/{path}"]
    for status in ("200", "206"):
        content = operation["responses"][status]["content"]
        assert content["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}
    assert "Content-Range" in operation["responses"]["206"]["headers"]
    assert "206" not in OPERATIONS_BY_ROUTE["GET /api/events/jobs/{job_id}/download-archive"]["responses"]
    queries = {parameter["name"]: parameter["schema"] for parameter in operation["parameters"]}
    assert queries["signature"] == {"type": "string"}, "clients send defaults, and an empty signature is invalid"


def test_document_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_examples_belong_to_models_of_bodies() -> None:
    assert openapi.EXAMPLES.keys() == {model.__name__ for model in MODELS_WITH_EXAMPLE}


@pytest.mark.parametrize("model", MODELS_WITH_EXAMPLE, ids=lambda model: model.__name__)
def test_examples_match_schemas(model: type[BaseModel]) -> None:
    name = model.__name__
    validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})
    validator.validate(openapi.EXAMPLES[name])
    model.model_validate(openapi.EXAMPLES[name])


@pytest.mark.parametrize(
    ("body", "is_valid"),
    [
        ({"job_type": "echo", "parameters": {"seconds": 1}}, True),
        ({"job_type": "echo", "parameters": {"seconds": -1}}, False),
        ({"job_type": "unknown", "parameters": {}}, False),
        ({"parameters": {}}, False),
        (openapi.EXAMPLES["JobBody"]["parameters"], True),
        ({"parameters": openapi.EXAMPLES["JobBody"]["parameters"]}, True),
    ],
    ids=str,
)
def test_job_schema_validates_parameters_by_job_type(body: Any, is_valid: bool) -> None:
    validator = Draft202012Validator({"$ref": "#/components/schemas/JobBody", "components": DOCUMENT["components"]})
    assert validator.is_valid(body) is is_valid


async def test_examples_are_accepted_by_the_api(shared_api: Api) -> None:
    submitted = await shared_api.post("/api/events/jobs", openapi.EXAMPLES["JobBody"])
    batched = await shared_api.post("/api/events/batches", openapi.EXAMPLES["BatchBody"])
    job, batch = submitted.headers["location"], batched.headers["location"]
    updated = await shared_api.http.put(job, json=openapi.EXAMPLES["JobUpdateBody"])
    batch_updated = await shared_api.http.put(batch, json=openapi.EXAMPLES["BatchUpdateBody"])
    cancelled = await shared_api.post(f"{job}/cancel", openapi.EXAMPLES["ReasonBody"])
    restarted = await shared_api.post(f"{job}/restart", openapi.EXAMPLES["JobRestartBody"])
    batch_restarted = await shared_api.post(f"{batch}/restart", openapi.EXAMPLES["BatchRestartBody"])

    responses = (submitted, batched, updated, batch_updated, cancelled, restarted, batch_restarted)
    assert [response.status_code for response in responses] == [202, 202, 200, 200, 200, 200, 200], [
        response.text for response in responses
    ]


def test_document_contains_common_responses_headers_and_parameters() -> None:
    submit = OPERATIONS_BY_ROUTE["POST /api/events/jobs"]
    assert {"400", "401", "403", "409", "413", "415", "422", "429", "500", "503"} <= submit["responses"].keys()
    assert submit["responses"]["202"]["headers"].keys() == {
        "X-Request-ID",
        "Location",
        "Ledger-Position",
        "Preference-Applied",
    }
    descriptions = {parameter["name"]: parameter["description"] for parameter in submit["parameters"]}
    assert descriptions.keys() == {"Prefer", "Idempotency-Key"}
    assert f"at most {MAX_WAIT_SECONDS} seconds" in descriptions["Prefer"]
    assert submit["requestBody"]["required"]
    assert not OPERATIONS_BY_ROUTE["POST /api/events/jobs/{job_id}/cancel"]["requestBody"]["required"]
    assert submit["responses"]["503"]["$ref"] == "#/components/responses/Error503"
    assert "Retry-After" in DOCUMENT["components"]["responses"]["Error503"]["headers"]
    changed = OPERATIONS_BY_ROUTE["PUT /api/events/jobs/{job_id}"]
    assert "If-Match" in {parameter["name"] for parameter in changed["parameters"]}
    assert "precondition_failed" in changed["responses"]["412"]["description"]
    listed = {parameter["name"]: parameter for parameter in OPERATIONS_BY_ROUTE["GET /api/events/jobs"]["parameters"]}
    assert listed["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
    assert listed["cursor"]["schema"] == {"type": "string"}
    assert "null" not in str(listed)
    assert OPERATIONS_BY_ROUTE["GET /healthz"]["security"] == []


async def test_document_and_docs_page_return_304_if_unchanged(shared_api: Api) -> None:
    for path, media_type in (("/api/openapi.json", "application/json"), ("/api/docs", "text/html; charset=utf-8")):
        response = await shared_api.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type
        revalidated = await shared_api.get(path, **{"If-None-Match": response.headers["etag"]})
        assert (revalidated.status_code, revalidated.content) == (304, b"")
    assert (await shared_api.get("/api/openapi.json")).json() == DOCUMENT


async def test_docs_page_shows_all_operations_and_loads_nothing(shared_api: Api) -> None:
    response = await shared_api.get("/api/docs")
    text = response.text

    for operation in OPERATIONS_BY_ROUTE.values():
        assert f'id="{operation["operationId"]}"' in text
    for name in DOCUMENT["components"]["schemas"]:
        assert f'id="{name}"' in text
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)
    assert "<script" not in text
    assert re.findall(r'(?:src|href)="(?!#|openapi\.json")[^"]*"', text) == []
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'; style-src 'sha256-" in policy
    assert "http" not in policy
