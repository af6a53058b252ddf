"""Test redaction: every field has a rule, and principals without admin access see no secrets of the owner."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from jobledger.api.auth import redaction
from jobledger.api.auth.redaction import (
    BATCH_FIELD_RULES,
    DELIVERY_ATTEMPT_FIELD_RULES,
    DELIVERY_FIELD_RULES,
    EVENT_FIELD_RULES,
    FILTER_FIELDS,
    JOB_FIELD_RULES,
    METADATA_FIELD_RULES,
    Viewer,
    find_hidden_filters,
    pseudonymize_worker,
    redact_document,
)
from jobledger.api.schemas.batches import BatchListQuery, BatchResource
from jobledger.api.schemas.jobs import JobListQuery, JobResource
from jobledger.api.schemas.log import EventMetadataResource, HistoryResponse
from jobledger.api.schemas.request_models import PageQuery
from jobledger.api.schemas.webhooks import DeliveryAttempt, DeliveryFilter, DeliveryResource, DeliveryResponse
from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.commands import ClaimJob, FailAttempt
from jobledger.ledger.domain.events import (
    EVENT_TYPES,
    ErrorInfo,
    EventMetadata,
    JobLeaseExpired,
    JobReleased,
    RecordedEvent,
)
from jobledger.ledger.store.command_handler import handle_command
from jobledger.projections.views.job_log import build_log_entries
from tests.api.conftest import Api, run_api
from tests.support.header_auth import principal_header
from tests.support.polling import poll_until
from tests.support.webhook_endpoint import WebhookEndpoint, run_webhook_endpoint

OWNER: Final = principal_header("owner", ["team-hidden-team"])
HOST: Final = "hidden-host"
SECRETS: Final = ("hidden-path", "hidden-query", "hidden-header", "hidden-response", "hidden-user", "hidden-team", HOST)
"""Parts of values that only the owner and admins see."""
STRANGER: Final = Viewer(Principal("zoe"), AccessLevel.READ)
VIEWERS: Final = {
    "reader": principal_header("reader"),
    "writer": principal_header("writer"),
    "stranger": principal_header("zoe"),
    "monitor": principal_header("mona", roles=["monitor"]),
    "anonymous": principal_header(),
}


def test_every_event_field_has_a_redaction_rule() -> None:
    assert EVENT_FIELD_RULES.keys() == EVENT_TYPES.keys()
    for name, event in EVENT_TYPES.items():
        assert EVENT_FIELD_RULES[name].keys() == event.model_fields.keys(), name


@pytest.mark.parametrize(
    ("rules", "model", "fields_without_rule"),
    [
        (JOB_FIELD_RULES, JobResource, {"paused", "waiting_for"}),
        (BATCH_FIELD_RULES, BatchResource, {"waiting_for"}),
        (DELIVERY_FIELD_RULES, DeliveryResource, set()),
        (DELIVERY_ATTEMPT_FIELD_RULES, DeliveryAttempt, set()),
        (METADATA_FIELD_RULES, EventMetadataResource, {"request_fingerprint", "traceparent"}),
    ],
)
def test_every_response_field_has_a_redaction_rule(
    rules: dict[str, Any], model: Any, fields_without_rule: set[str]
) -> None:
    assert model.model_fields.keys() == rules.keys() | fields_without_rule
    assert set(EventMetadata.__dataclass_fields__) == METADATA_FIELD_RULES.keys() | {
        "request_fingerprint",
        "traceparent",
    }


@pytest.mark.parametrize(
    "event",
    [
        JobLeaseExpired(worker_id=f"{HOST}-1-abcdef", attempt=1),
        JobReleased(worker_id=f"{HOST}-1-abcdef", attempt=1, reason="the worker shuts down"),
        JobReleased(worker_id=f"{HOST}-1-abcdef", attempt=1, reason=f"{HOST} is full", is_machine_failure=True),
    ],
)
def test_log_lines_contain_no_worker_host(event: Any) -> None:
    document = {"type": type(event).__name__, "time": datetime.now(UTC)}
    [line] = build_log_entries(RecordedEvent(document, event))
    assert HOST not in line.message


def test_worker_pseudonym_is_stable_and_has_32_bits() -> None:
    first, second = pseudonymize_worker("host-1-abcdef"), pseudonymize_worker("host-2-abcdef")
    assert first == pseudonymize_worker("host-1-abcdef") != second
    assert first is not None
    assert len(first) == len("worker-") + 8


@pytest.fixture
async def api(
    header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Api]:
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    webhooks = {"allowed_private_hosts": ["127.0.0.1"], "retry_delays_seconds": [0, 0.1], "jitter": 0}
    async for api in run_api(mongodb_uri, db_name, tmp_path, webhooks=webhooks):
        yield api


@pytest.fixture
async def endpoint() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as endpoint:
        yield endpoint


ACCESS: Final = {
    "visibility": "public",
    "read_access": ["reader", "hidden-user-1", "team-hidden-team"],
    "write_access": ["writer", "hidden-user-2"],
    "admin_access": ["keeper", "hidden-user-3"],
}


async def create_resources(api: Api, endpoint: WebhookEndpoint) -> dict[str, str]:
    """Create a finished batch with a completed and a failed job, each with an abandoned webhook delivery.

    Returns:
        The IDs of the batch, the jobs and a delivery, and the head of the log, as path parameters.
    """
    endpoint.script_responses("/hidden-path?token=hidden-query", 500)
    endpoint.body = b"hidden-response"
    webhook = {"url": endpoint.url("/hidden-path?token=hidden-query"), "headers": {"X-hidden-header": "1"}}
    content = {
        "access_control": ACCESS,
        "webhook": webhook,
        "jobs": [
            {"job_type": "echo", "parameters": {"text": "x"}, "webhook": webhook},
            {"job_type": "echo", "parameters": {"fail": "on purpose"}, "max_attempts": 1, "webhook": webhook},
        ],
    }
    batch = (await api.post("/api/events/batches", content, **OWNER)).json()
    admin = api.as_user("ann", roles=["admin"])
    jobs = [await admin.wait_until_finished(job_id) for job_id in batch["job_ids"]]
    assert await admin.wait_for_event(batch["batch_id"], "BatchFinished")

    async def all_deliveries_abandoned() -> bool:
        return await api.db.events.count_documents({"type": "DeliveryAbandoned"}) >= 3

    await poll_until(all_deliveries_abandoned, "all deliveries are abandoned")
    head = await admin.event_store.read_head_position()
    await admin.get("/api/events/jobs", head)
    return {
        "batch": batch["batch_id"],
        "job": jobs[0]["job_id"],
        "failed": jobs[1]["job_id"],
        "delivery": f"delivery-{jobs[0]['job_id']}-{jobs[0]['version']}",
        "head": str(head),
    }


PATHS: Final = (
    "/api/events/jobs",
    "/api/events/jobs/{job}",
    "/api/events/jobs/{failed}",
    "/api/events/jobs/{job}?as_of={head}",
    "/api/events/jobs/{job}/history",
    "/api/events/jobs/{failed}/history",
    "/api/events/jobs/{job}/logs",
    "/api/events/batches",
    "/api/events/batches/{batch}",
    "/api/events/batches/{batch}?as_of={head}",
    "/api/events/batches/{batch}/jobs",
    "/api/events/batches/{batch}/history",
    "/api/ledger/events?limit=1000",
    "/api/ledger/events?stream={job}",
    "/api/ledger/events?stream={batch}",
    "/api/ledger/events?stream={delivery}",
    "/api/monitoring/events/webhooks?job_id={job}",
    "/api/monitoring/events/webhooks/{delivery}",
    "/monitoring/events/jobs/{job}",
    "/monitoring/events/jobs/{failed}",
    "/monitoring/events/batches/{batch}",
    "/monitoring/events/jobs",
    "/monitoring/events/log",
)


async def test_owner_only_values_are_hidden_in_every_response(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    leaks: list[str] = []
    for name, headers in VIEWERS.items():
        for path in PATHS:
            response = await api.http.get(path.format(**resources), headers=headers)
            assert response.status_code == 200 or (name == "anonymous" and response.status_code == 303), (name, path)
            leaks += [f"{name} at {path} sees {secret}" for secret in SECRETS if secret in response.text]
        stream = ""
        async with api.http.stream("GET", "/api/ledger/stream?after=0", headers=headers) as live:
            async for text in live.aiter_text():
                stream += text
                if f"id: {resources['head']}\n" in stream or stream.count("DeliveryAbandoned") >= 6:
                    break
        assert "DeliveryAttempted" in stream
        leaks += [f"{name} sees {secret} in the live stream" for secret in SECRETS if secret in stream]
    assert leaks == []


async def test_traceback_is_shown_to_the_owner_but_not_to_viewers_or_webhooks(
    api: Api, endpoint: WebhookEndpoint
) -> None:
    secret = "hidden-traceback"
    body = {
        "job_type": "echo",
        "parameters": {},
        "not_before": "2099-01-01T00:00:00Z",  # no real worker takes it
        "access_control": ACCESS,
        "webhook": {"url": endpoint.url("/failed")},
    }
    job_id = (await api.post("/api/events/jobs", body, **OWNER)).json()["job_id"]
    error = ErrorInfo(
        code="PROCESSOR_FAULT", message="it broke", details={"traceback": f"{secret}.py", "exception": "E"}
    )
    much_later, meta = datetime(2100, 1, 1, tzinfo=UTC), EventMetadata("worker:worker-1")
    for attempt, retry_at in ((1, much_later), (2, much_later), (3, None)):
        await handle_command(api.event_store, job_id, ClaimJob("worker-1", much_later), meta=meta)
        failure = FailAttempt("worker-1", attempt, error, retry_at)
        await handle_command(api.event_store, job_id, failure, meta=meta)
    head = await api.event_store.read_head_position()
    await api.as_user("ann", roles=["admin"]).get("/api/events/jobs", head)
    paths = (
        *("/api/events/jobs?include=error,logs", f"/api/events/jobs/{job_id}", f"/api/events/jobs/{job_id}/history"),
        *(f"/api/events/jobs/{job_id}?as_of={head}", f"/api/ledger/events?stream={job_id}"),
        f"/monitoring/events/jobs/{job_id}",
    )
    for path in (*paths, f"/api/events/jobs/{job_id}/logs"):
        shown = await api.http.get(path, headers=OWNER)
        assert shown.status_code == 200, path
        assert (secret in shown.text) == (path in paths), path
        for name, headers in VIEWERS.items():
            response = await api.http.get(path, headers=headers)
            assert response.status_code in {200, 303}, (name, path)
            assert secret not in response.text, (name, path)
    [request] = await endpoint.wait_for_requests(1, "/failed")
    assert request.json_body["error"]["details"] == {"exception": "E"}
    assert secret not in request.body.decode()


async def test_reader_sees_own_name_and_outcome(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    job = (await api.http.get(f"/api/events/jobs/{resources['job']}", headers=VIEWERS["reader"])).json()["job"]
    JobResource.model_validate(job, extra="forbid")
    assert job["access_control"]["read_access"] == ["reader"]
    assert job["access_control"]["write_access"] == []
    assert job["webhook"]["url"] == f"http://127.0.0.1:{endpoint.port}"
    assert job["worker_id"].startswith("worker-")
    response = await api.http.get(f"/api/monitoring/events/webhooks/{resources['delivery']}", headers=VIEWERS["reader"])
    delivery = DeliveryResponse.model_validate_json(response.content, extra="forbid", strict=True).delivery
    assert (delivery.status, delivery.attempts[0].status_code) == ("abandoned", 500)
    history = await api.http.get(f"/api/events/jobs/{resources['job']}/history", headers=VIEWERS["reader"])
    HistoryResponse.model_validate_json(history.content, extra="forbid", strict=True)
    assert (
        "on purpose" in (await api.http.get(f"/api/events/jobs/{resources['failed']}", headers=principal_header())).text
    )


async def test_owner_and_admins_see_all_values(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    for headers in (OWNER, principal_header("keeper"), principal_header("ann", roles=["admin"])):
        text = ""
        for path in PATHS:
            text += (await api.http.get(path.format(**resources), headers=headers)).text
        assert [secret for secret in SECRETS if secret not in text] == []


async def test_etags_differ_by_access_and_writer_can_use_own_etag(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    for path in (f"/api/events/jobs/{resources['job']}", f"/api/events/batches/{resources['batch']}"):
        tags = {}
        for name, headers in {"owner": OWNER, **VIEWERS}.items():
            response = await api.http.get(path, headers=headers)
            tags[name] = response.headers["etag"]
            assert "Cookie" in response.headers["vary"]
        assert tags["owner"] not in {tag for name, tag in tags.items() if name != "owner"}
        assert tags["reader"] != tags["writer"]
        for name, headers in {"owner": OWNER, **VIEWERS}.items():
            for tag in tags.values():
                status = (await api.http.get(path, headers={**headers, "If-None-Match": tag})).status_code
                assert status == (304 if tag == tags[name] else 200), (name, tag)
    path = f"/api/events/jobs/{resources['job']}"
    tag = (await api.http.get(path, headers=VIEWERS["writer"])).headers["etag"]
    changed = await api.http.post(f"{path}/archive", headers={**VIEWERS["writer"], "If-Match": tag})
    assert changed.status_code == 200, changed.text


async def test_job_as_of_position_is_redacted_by_current_access(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    path = f"/api/events/jobs/{resources['job']}"
    without_admins = {"access_control": {"visibility": "public", "admin_access": []}}
    changed = await api.http.put(path, json=without_admins, headers=OWNER)
    assert changed.status_code == 200
    headers = {**principal_header("keeper"), "Ledger-Position": changed.headers["ledger-position"]}
    response = await api.http.get(f"{path}?as_of={resources['head']}", headers=headers)
    assert response.status_code == 200
    assert "hidden" not in response.text


PARTLY_VISIBLE: Final = {"error_code"}  # the code of an error is visible to all


def test_every_list_filter_is_visible_or_rejected() -> None:
    for rules, model in (
        (JOB_FIELD_RULES, JobListQuery),
        (BATCH_FIELD_RULES, BatchListQuery),
        (DELIVERY_FIELD_RULES, DeliveryFilter),
    ):
        others = {"q", "include", "id_prefix"}  # every viewer sees the ID
        filters = model.model_fields.keys() - PageQuery.model_fields.keys() - others - PARTLY_VISIBLE
        fields = {name: FILTER_FIELDS.get(name, name) for name in filters}
        assert set(fields.values()) <= rules.keys(), model
        sample = {"a": "b"}
        hidden = {
            name for name, field in fields.items() if redact_document({field: sample}, rules, STRANGER)[field] != sample
        }
        assert hidden == set(find_hidden_filters(filters, rules)), model
    assert get_args(PageQuery.model_fields["sort"].annotation) == ("-created_at", "created_at")


@pytest.mark.parametrize(
    ("path", "filters", "hidden_field"),
    [
        ("/api/events/jobs", {"job_type": "echo"}, "worker_id"),
        ("/api/events/batches/{batch}/jobs", {"job_type": "echo"}, "worker_id"),
        ("/api/events/batches", {"archived": "false"}, "webhook"),
    ],
)
async def test_list_filter_by_hidden_field_requires_role_admin(
    api: Api, monkeypatch: pytest.MonkeyPatch, path: str, filters: dict[str, str], hidden_field: str
) -> None:
    body = {"access_control": ACCESS, "jobs": [{"job_type": "echo", "parameters": {"text": "x"}}]}
    batch = (await api.post("/api/events/batches", body, **OWNER)).json()["batch_id"]
    path, administrator = path.format(batch=batch), principal_header("ann", roles=["admin"])
    for headers in (*VIEWERS.values(), OWNER, administrator):
        assert (await api.http.get(path, params=filters, headers=headers)).status_code == 200
    [name] = filters
    monkeypatch.setattr(redaction, "FILTER_FIELDS", {**FILTER_FIELDS, name: hidden_field})
    for headers in (*VIEWERS.values(), OWNER):
        response = await api.http.get(path, params=filters, headers=headers)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden")
        assert f"`{name}` requires the role `admin`" in response.json()["message"]
        assert (await api.http.get(path, headers=headers)).status_code == 200
    assert (await api.http.get(path, params=filters, headers=administrator)).status_code == 200


@pytest.mark.parametrize("viewer", ["reader", "writer", "stranger"])
async def test_filter_by_hidden_field_is_rejected(api: Api, endpoint: WebhookEndpoint, viewer: str) -> None:
    resources = await create_resources(api, endpoint)
    path, bulk = "/api/monitoring/events/webhooks", "/api/monitoring/events/redeliver"
    complete, redacted = [
        (await api.http.get(f"{path}?job_id={resources['job']}", headers=headers)).json()["deliveries"][0]
        for headers in (OWNER, VIEWERS[viewer])
    ]
    for name in DeliveryFilter.model_fields.keys() - {"job_id"}:
        field = FILTER_FIELDS.get(name, name)
        value = complete[field] if field != "sequence" else 0
        filters = {"job_id": resources["job"], name: value}
        expected = 200 if field == "created_at" or redacted[field] == complete[field] else 403
        response = await api.http.get(path, params=filters, headers=VIEWERS[viewer])
        assert response.status_code == expected, (name, response.text)
        assert (await api.http.get(path, params=filters, headers=OWNER)).status_code == 200, name
        if viewer == "writer":
            response = await api.http.post(bulk, json=filters, headers=VIEWERS[viewer])
            assert response.status_code == (202 if expected == 200 else 403), (name, response.text)


async def test_filter_by_endpoint_is_rejected_for_non_owner(api: Api, endpoint: WebhookEndpoint) -> None:
    resources = await create_resources(api, endpoint)
    path = f"/api/monitoring/events/webhooks?job_id={resources['job']}"
    endpoint_id = (await api.http.get(path, headers=OWNER)).json()["deliveries"][0]["endpoint_id"]
    assert (await api.http.get(f"{path}&endpoint_id={endpoint_id}", headers=OWNER)).status_code == 200
    assert (await api.http.get(f"{path}&endpoint_id={endpoint_id}", headers=VIEWERS["writer"])).status_code == 403
