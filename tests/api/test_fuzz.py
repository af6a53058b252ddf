"""Test that generated requests, valid or not, get only responses that the OpenAPI document describes.

`make test` sends the same few requests each time. `make fuzz` sends JOBLEDGER_FUZZ_REQUESTS random ones to each route.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from pymongo import MongoClient
from schemathesis import Case, checks

from tests.api.test_openapi import DOCUMENT
from tests.support.installation import Installation, RunningCommand

FUZZ_REQUESTS = int(os.environ.get("JOBLEDGER_FUZZ_REQUESTS", "0"))
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
EXAMPLES = settings(
    max_examples=FUZZ_REQUESTS or 3,
    derandomize=not FUZZ_REQUESTS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
schema = schemathesis.openapi.from_dict(DOCUMENT)
REJECTION_STATUSES = ["400", "401", "403", "404", "405", "409", "412", "413", "414", "415", "416", "422", "429", "431"]
schema.config.checks.negative_data_rejection.expected_statuses = REJECTION_STATUSES
STREAM_PATH = "/api/ledger/stream"


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """A process with all roles. The fixture fails if its log contains a fault at the end."""
    name = f"test_{uuid4().hex[:16]}"
    with Installation(
        tmp_path_factory.mktemp("fuzz"),
        mongodb={"uri": mongodb_uri, "db_name": name},
        api={"port": 0},
        event_worker={"shutdown_grace_seconds": 0},
    ) as installation:
        role = installation.start_up_command()
        yield role
        ended = role.stop()
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)
    assert ended.exit_code == 0, ended.err[-5000:]
    assert "Traceback" not in ended.err, ended.err
    assert "fault" not in ended.err, ended.err


@pytest.fixture(scope="module")
def http(role: RunningCommand) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=role.url, timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@schema.exclude(path=STREAM_PATH).parametrize()
@EXAMPLES
def test_generated_request_gets_a_documented_response(
    case: Case[Any], role: RunningCommand, http: httpx.Client, session: requests.Session
) -> None:
    use_existing_ids(case, http)
    remove_waits(case)
    response = case.call(base_url=role.url, session=session, timeout=30)
    # A request with a too long URL is rejected before its method is checked.
    excluded = [checks.unsupported_method] if response.status_code == 414 else []
    if case.path.endswith("/link"):
        # A GET of any path below …/files/ is valid, also of a file named `link`. OpenAPI cannot describe this.
        excluded.append(checks.allow_header_conformance)
    case.validate_response(response, checks=CHECKS, excluded_checks=excluded)


@schema.include(path=STREAM_PATH).parametrize()
@EXAMPLES
def test_generated_stream_request_gets_a_documented_response(
    case: Case[Any], role: RunningCommand, session: requests.Session
) -> None:
    request = case.as_transport_kwargs(base_url=role.url)
    with session.request(**request, stream=True, timeout=30) as response:
        documented = case.operation.definition.raw["responses"]
        if case.method.upper() == "GET":
            assert str(response.status_code) in documented
        media_type = response.headers["content-type"].partition(";")[0]
        assert media_type == ("text/event-stream" if response.ok else "application/json")


def use_existing_ids(case: Case[Any], http: httpx.Client) -> None:
    """Put the ID of a new job or batch into half of the paths, because no generated ID exists."""
    job = {"job_type": "echo", "parameters": {"track": "A"}}
    for name, path, body in (("job_id", "jobs", job), ("batch_id", "batches", {"jobs": [job]})):
        value = case.path_parameters.get(name)
        if value is not None and zlib.crc32(str(value).encode(errors="replace")) % 2:
            case.path_parameters[name] = http.post(f"/api/events/{path}", json=body).json()[name]


def remove_waits(case: Case[Any]) -> None:
    """Remove positions and preferences for which a valid request may wait long."""
    for name in [name for name in case.headers or () if name.lower() in ("ledger-position", "prefer")]:
        if case.headers[name].isdecimal() or "wait" in case.headers[name]:
            del case.headers[name]
    if str((case.query or {}).get("min_position", "")).isdecimal():
        del case.query["min_position"]
