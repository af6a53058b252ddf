"""Whatever is sent, right or wrong: no fault, and no response that the OpenAPI document does not describe.

`make test` tries the same few requests each time; `make fuzz` tries JOBLEDGER_FUZZ_REQUESTS others for each
route.
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

MANY = int(os.environ.get("JOBLEDGER_FUZZ_REQUESTS", "0"))
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
    max_examples=MANY or 3,
    derandomize=not MANY,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
schema = schemathesis.openapi.from_dict(DOCUMENT)
REFUSALS = ["400", "401", "403", "404", "405", "409", "412", "413", "414", "415", "416", "422", "429", "431"]
schema.config.checks.negative_data_rejection.expected_statuses = REFUSALS
LIVE = "/api/ledger/stream"


@pytest.fixture(scope="module")
def role(mongodb_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCommand]:
    """Everything, running; at the end no fault is in the log."""
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


@schema.exclude(path=LIVE).parametrize()
@EXAMPLES
def test_generated_request_gets_a_documented_response(
    case: Case[Any], role: RunningCommand, http: httpx.Client, session: requests.Session
) -> None:
    leads_somewhere(case, http)
    waits_for_nothing(case)
    response = case.call(base_url=role.url, session=session, timeout=30)
    left_out = (
        [checks.unsupported_method] if response.status_code == 414 else []
    )  # refused before the method is looked at
    if case.path.endswith("/link"):
        # Below …/files/ a GET of any path is right, that of a file named `link`, too: no document can say so.
        left_out.append(checks.allow_header_conformance)
    case.validate_response(response, checks=CHECKS, excluded_checks=left_out)


@schema.include(path=LIVE).parametrize()
@EXAMPLES
def test_generated_stream_request_gets_a_documented_response(
    case: Case[Any], role: RunningCommand, session: requests.Session
) -> None:
    asked = case.as_transport_kwargs(base_url=role.url)
    with session.request(**asked, stream=True, timeout=30) as response:
        described = case.operation.definition.raw["responses"]
        if case.method.upper() == "GET":
            assert str(response.status_code) in described
        media_type = response.headers["content-type"].partition(";")[0]
        assert media_type == ("text/event-stream" if response.ok else "application/json")


def leads_somewhere(case: Case[Any], http: httpx.Client) -> None:
    """Put the id of a new job or batch into half of the addresses: none would ever be guessed."""
    given = case.path_parameters
    for name, found in (("job_id", "job_id"), ("batch_id", "batch_id")):
        if name in given and zlib.crc32(str(given[name]).encode(errors="replace")) % 2:
            body = {"job_type": "echo", "parameters": {"track": "A"}}
            many = name == "batch_id"
            response = http.post(
                f"/api/events/{'batches' if many else 'jobs'}", json={"jobs": [body]} if many else body
            )
            given[name] = response.json()[found]


def waits_for_nothing(case: Case[Any]) -> None:
    """Leave out what a right response may take long for: a position that the views have not reached, an end."""
    for name in [name for name in case.headers or () if name.lower() in ("ledger-position", "prefer")]:
        if case.headers[name].isdecimal() or "wait" in case.headers[name]:
            del case.headers[name]
    if str((case.query or {}).get("min_position", "")).isdecimal():
        del case.query["min_position"]
