"""Test limits of request content: the error names the field, the limit and the actual size."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger.ledger.domain import limits
from tests.api.conftest import Api, check_error

NAMES = [f"reader-{number}" for number in range(8000)]
HEADERS = {f"X-Header-{number}": "x" * 7000 for number in range(20)}
WEBHOOK = {"url": "http://example.org/", "headers": HEADERS}
LARGE = {"text": "x" * (limits.MAX_PARAMETERS_BYTES + 1)}
TOO_LARGE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one list of names": ({"access_control": {"read_access": NAMES}}, ("read_access", "200", "8000")),
    "three lists together": (
        {"access_control": {"read_access": NAMES[:150], "admin_access": NAMES[:150]}},
        ("access_control", "200", "300"),
    ),
    "one name": ({"access_control": {"write_access": ["x" * 201]}}, ("write_access", "200")),
    "headers": ({"webhook": WEBHOOK}, ("webhook.headers", str(limits.MAX_WEBHOOK_HEADER_BYTES), "140")),
    "parameters": ({"parameters": LARGE}, ("parameters", str(limits.MAX_PARAMETERS_BYTES))),
    "numbers": ({"parameters": {"a": [0] * 900_000}}, ("parameters", str(limits.MAX_PARAMETERS_BYTES))),
    "name": ({"job_name": "x" * 501}, ("job_name", "500")),
    "owner": ({"user_id": "x" * 201}, ("user_id", "200")),
}
JOB: dict[str, Any] = {"job_type": "echo", "parameters": {}}


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_job_over_a_limit_is_rejected_alone_and_in_a_batch(shared_api: Api, name: str) -> None:
    content, words = TOO_LARGE[name]
    head = await shared_api.event_store.read_head_position()
    for path, body in (
        ("/api/events/jobs", JOB | content),
        ("/api/events/batches", {"jobs": [JOB, JOB | content]}),
    ):
        response = await shared_api.post(path, body)
        assert response.status_code == 422, response.text[:500]
        for word in words:
            assert word in response.json()["message"], response.json()["message"]
    await shared_api.check_no_request_recorded(after=head)


async def test_updates_have_the_limits_of_submissions(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    batch = await shared_api.submit_batch({}, {})
    access = {"access_control": {"read_access": NAMES}}
    for path, content in (
        (f"/api/events/jobs/{job_id}", access),
        (f"/api/events/jobs/{job_id}", {"parameters": LARGE}),
        (f"/api/events/batches/{batch['batch_id']}", access),
    ):
        head = await shared_api.event_store.read_head_position()
        response = await shared_api.http.put(path, json=content)
        check_error(response, 422, "invalid_content")
        assert "at most" in response.text
        await shared_api.check_no_request_recorded(after=head)
    for content in (access, {"parameters": LARGE}):
        response = await shared_api.post("/api/events/batches", {"jobs": [JOB] * 2, **content})
        check_error(response, 422, "invalid_content")


async def test_groups_of_the_principal_are_limited(header_auth_api: Api) -> None:
    with_300_groups = header_auth_api.as_user("anna", [f"team-{number}" for number in range(300)])
    response = await with_300_groups.post("/api/events/jobs", JOB)
    check_error(response, 422, "invalid_content")
    assert "`teams` must have at most 200 groups, got 300" in response.json()["message"]
    with_100_groups = header_auth_api.as_user("anna", [f"team-{number}" for number in range(100)])
    assert (await with_100_groups.post("/api/events/jobs", JOB)).status_code == 202
