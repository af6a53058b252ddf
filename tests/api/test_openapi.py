"""The OpenAPI document describes every route, every code and every header, and the page shows all of it, offline."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from jobledger.api.app import ROUTES
from jobledger.api.http.error_codes import ERROR_CODES
from jobledger.api.http.errors import ERROR_RESPONSES
from jobledger.api.openapi import document as openapi
from jobledger.api.openapi.operation import OPERATIONS
from jobledger.api.schemas.batches import BatchBody, BatchRestartBody, BatchUpdateBody
from jobledger.api.schemas.jobs import JobBody, JobRestartBody, JobUpdateBody
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.workers.registry import load_processors
from tests.api.conftest import Api

API = Path(__file__).parents[2] / "api"
DOCUMENT = openapi.build_document(ROUTES, {name: processor.Parameters for name, processor in load_processors().items()})
DOCUMENTED = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def test_every_route_is_described() -> None:
    missing = [f"{route.methods} {route.path}" for route in ROUTES if route.endpoint not in OPERATIONS]
    assert not missing, f"the handlers of these routes need @Operation: {missing}"
    assert {route.endpoint for route in ROUTES} == set(OPERATIONS), "a handler with @Operation has no route"


def codes_raised() -> Iterator[tuple[str, int]]:
    """Every `ApiError(status, "code", …)` in the source; where the status is computed, 0."""
    for file in API.rglob("*.py"):
        if "dashboard" in file.parts:  # its pages are not in the document
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                status, code = node.args[:2]
                if isinstance(code, ast.Constant):
                    yield str(code.value), status.value if isinstance(status, ast.Constant) else 0  # type: ignore[misc]  # a status is an int


def test_every_code_that_can_be_answered_is_in_the_catalogue_with_its_status_and_in_some_answer() -> None:
    raised = {*codes_raised(), *((code, status) for _, status, code, _ in ERROR_RESPONSES)}
    assert raised
    assert {(code, status) for code, status in raised if ERROR_CODES.get(code, (None,))[0] != status} == set()
    described = {
        code
        for operation in DOCUMENTED.values()
        for response in operation["responses"].values()
        for code in re.findall(r"^- `(\w+)`", response["description"], re.MULTILINE)
    }
    of_no_operation = {"method_not_allowed", "bad_request"}
    assert described == set(ERROR_CODES) - of_no_operation
    assert set(ERROR_CODES) - of_no_operation - {"not_found", "range_not_satisfiable", "batch_not_found"} <= {
        code for code, _ in raised
    }


def test_the_document_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


@pytest.mark.parametrize("model", openapi.EXAMPLES, ids=lambda model: model.__name__)
def test_the_examples_fit_the_schemas(model: type[BaseModel]) -> None:
    name = model.__name__
    validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})
    validator.validate(openapi.EXAMPLES[model])
    model.model_validate(openapi.EXAMPLES[model])


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ({"job_type": "echo", "parameters": {"seconds": 1}}, True),
        ({"job_type": "echo", "parameters": {"seconds": -1}}, False),
        ({"job_type": "unheard of", "parameters": {}}, False),
        ({"parameters": {}}, False),
        (openapi.EXAMPLES[JobBody]["parameters"], True),
        ({"parameters": openapi.EXAMPLES[JobBody]["parameters"]}, True),
    ],
    ids=str,
)
def test_the_schema_of_a_job_knows_what_the_parameters_of_each_type_are(body: Any, fits: bool) -> None:
    validator = Draft202012Validator({"$ref": "#/components/schemas/JobBody", "components": DOCUMENT["components"]})
    assert validator.is_valid(body) is fits


async def test_the_examples_are_accepted_as_they_stand(api_without_worker: Api) -> None:
    submitted = await api_without_worker.post("/api/events/jobs", openapi.EXAMPLES[JobBody])
    batched = await api_without_worker.post("/api/events/batches", openapi.EXAMPLES[BatchBody])
    job, batch = submitted.headers["location"], batched.headers["location"]
    updated = await api_without_worker.http.put(job, json=openapi.EXAMPLES[JobUpdateBody])
    shared = await api_without_worker.http.put(batch, json=openapi.EXAMPLES[BatchUpdateBody])
    cancelled = await api_without_worker.post(f"{job}/cancel", openapi.EXAMPLES[ReasonBody])
    restarted = await api_without_worker.post(f"{job}/restart", openapi.EXAMPLES[JobRestartBody])
    again = await api_without_worker.post(f"{batch}/restart", openapi.EXAMPLES[BatchRestartBody])

    answers = (submitted, batched, updated, shared, cancelled, restarted, again)
    assert [answer.status_code for answer in answers] == [202, 202, 200, 200, 200, 200, 200], [
        it.text for it in answers
    ]


def test_what_goes_without_saying_is_said() -> None:
    submit = DOCUMENTED["POST /api/events/jobs"]
    assert {"400", "401", "403", "409", "413", "415", "422", "429", "500", "503"} <= submit["responses"].keys()
    assert submit["responses"]["202"]["headers"].keys() == {
        "X-Request-ID",
        "Location",
        "Ledger-Position",
        "Preference-Applied",
    }
    assert {parameter["name"] for parameter in submit["parameters"]} == {"Prefer", "Idempotency-Key"}
    assert submit["requestBody"]["required"]
    assert not DOCUMENTED["POST /api/events/jobs/{job_id}/cancel"]["requestBody"]["required"]
    assert "Retry-After" in submit["responses"]["503"]["headers"]
    changed = DOCUMENTED["PUT /api/events/jobs/{job_id}"]
    assert "If-Match" in {parameter["name"] for parameter in changed["parameters"]}
    assert "precondition_failed" in changed["responses"]["412"]["description"]
    listed = {parameter["name"]: parameter for parameter in DOCUMENTED["GET /api/events/jobs"]["parameters"]}
    assert listed["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}
    assert listed["cursor"]["schema"] == {"type": "string"}
    assert "null" not in str(listed)
    assert DOCUMENTED["GET /healthz"]["security"] == []


async def test_the_document_and_the_page_are_served_and_not_again_to_who_has_them(api_without_worker: Api) -> None:
    for path, media_type in (("/api/openapi.json", "application/json"), ("/api/docs", "text/html; charset=utf-8")):
        answer = await api_without_worker.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media_type
        again = await api_without_worker.get(path, **{"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert (await api_without_worker.get("/api/openapi.json")).json() == DOCUMENT


async def test_the_page_shows_everything_and_loads_nothing(api_without_worker: Api) -> None:
    answer = await api_without_worker.get("/api/docs")
    text = answer.text

    for operation in DOCUMENTED.values():
        assert f'id="{operation["operationId"]}"' in text
    for name in DOCUMENT["components"]["schemas"]:
        assert f'id="{name}"' in text
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in re.findall(r'href="(#[^"]+)"', text)} <= set(ids)
    assert "<script" not in text
    assert re.findall(r'(?:src|href)="(?!#|openapi\.json")[^"]*"', text) == []
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; style-src 'sha256-" in policy
    assert "http" not in policy
