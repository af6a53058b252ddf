"""Webhooks over HTTP: deliveries, redelivery, webhook echo, and what submission rejects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.webhooks.signature import generate_secret
from tests.api.conftest import Api, run_api
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.webhook_endpoint import WebhookEndpoint, run_webhook_endpoint

WEBHOOKS = "/api/monitoring/events/webhooks"
REDELIVER = "/api/monitoring/events/redeliver"
ECHO_PATH = "/api/events/test-webhook-callback"
WEBHOOK_SETTINGS: dict[str, Any] = {
    "allowed_private_hosts": ["127.0.0.1"],
    "retry_delays_seconds": [0, 0.2],
    "jitter": 0,
    "echo_enabled": True,
}


@pytest.fixture
async def endpoint() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as running:
        yield running


@pytest.fixture
async def api(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API with all roles and header authentication, as an admin. Webhooks may go to this machine."""
    async for running in run_api(mongodb_uri, db_name, tmp_path, webhooks=WEBHOOK_SETTINGS):
        yield running.as_user("ann", roles=["admin"])


async def wait_for_deliveries(api: Api, number: int = 1) -> list[dict[str, Any]]:
    """Wait until `number` deliveries have succeeded or were abandoned. Return all deliveries, newest first."""
    ended = position = 0
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(api.stream_events(after=0)) as events:
        async for event in events:
            ended += event["type"] in ("DeliverySucceeded", "DeliveryAbandoned")
            position = event["position"]
            if ended == number:
                break
    deliveries: list[dict[str, Any]] = (await api.get(WEBHOOKS, position)).json()["deliveries"]
    return deliveries


async def test_webhook_is_delivered_listed_and_shown(api: Api, endpoint: WebhookEndpoint) -> None:
    job_id = await api.submit({"text": "x"}, webhook={"url": endpoint.url(), "headers": {"X-Key": "s3cret"}})
    [delivery] = await wait_for_deliveries(api)
    [request] = endpoint.requests
    assert request.headers["x-key"] == "s3cret"
    assert (delivery["delivery_id"], delivery["job_id"], delivery["type"]) == (
        request.webhook_id,
        job_id,
        "job.completed",
    )
    assert (delivery["status"], delivery["sequence"], delivery["attempt"]) == ("delivered", 1, 1)
    assert delivery["attempts"][0]["status_code"] == 200
    single = await api.get(f"{WEBHOOKS}/{delivery['delivery_id']}")
    assert single.json()["delivery"] == delivery
    assert "s3cret" not in single.text
    log = await api.get("/api/ledger/events?limit=1000")
    assert "s3cret" not in log.text
    counts = (await api.get("/api/monitoring/events/stats")).json()["stats"]["webhooks"]
    assert counts == {"total": 1, "pending": 0, "delivered": 1, "abandoned": 0}


async def test_delivery_list_filters_and_finds_missed_deliveries(api: Api, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/bad", 410)
    good = [await api.submit({"n": n}, webhook={"url": endpoint.url("/good")}) for n in range(3)]
    bad = await api.submit({"n": 9}, webhook={"url": endpoint.url("/bad")})
    await wait_for_deliveries(api, 4)

    async def find_job_ids(query: str) -> list[str]:
        response = await api.get(f"{WEBHOOKS}?{query}")
        assert response.status_code == 200, response.text
        content = response.json()
        assert content["total"] >= len(content["deliveries"])
        return [delivery["job_id"] for delivery in content["deliveries"]]

    assert await find_job_ids("status=abandoned") == [bad]
    assert sorted(await find_job_ids("status=delivered")) == sorted(good)
    assert await find_job_ids(f"job_id={good[1]}") == [good[1]]
    assert len(await find_job_ids(f"host=127.0.0.1:{endpoint.port}")) == 4
    assert await find_job_ids("host=elsewhere:443") == await find_job_ids("type=batch.failed") == []
    message = endpoint.requests_to("/good")[0].json_body
    missed = await find_job_ids(f"endpoint_id={message['endpoint_id']}&after_sequence=1&sort=created_at")
    assert len(missed) == 2
    assert set(missed) < set(good)
    first = (await api.get(f"{WEBHOOKS}?limit=3")).json()
    second = (await api.get(f"{WEBHOOKS}?limit=3&cursor={first['next_cursor']}")).json()
    delivery_ids = [delivery["delivery_id"] for delivery in first["deliveries"] + second["deliveries"]]
    assert len(set(delivery_ids)) == 4
    assert "next_cursor" not in second


async def test_redelivery_keeps_message_id_and_is_idempotent(api: Api, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/hook", 410, 200)
    await api.submit({}, webhook={"url": endpoint.url()})
    [delivery] = await wait_for_deliveries(api)
    path = f"{WEBHOOKS}/{delivery['delivery_id']}/redeliver"
    redelivered = await api.post(path, {"reason": "endpoint is back"}, **{"Idempotency-Key": "k1"})
    assert redelivered.status_code == 202, redelivered.text
    assert redelivered.json()["delivery"]["status"] == "pending"
    [delivery] = await wait_for_deliveries(api, 2)
    assert (delivery["status"], delivery["attempt"]) == ("delivered", 2)
    repeated = await api.post(path, {"reason": "endpoint is back"}, **{"Idempotency-Key": "k1"})
    assert repeated.headers["Ledger-Position"] == redelivered.headers["Ledger-Position"]
    assert len({request.webhook_id for request in endpoint.requests}) == 1
    assert len(endpoint.requests) == 2


async def test_bulk_redelivery_sends_all_abandoned_deliveries(api: Api, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/down", 410, 410, 410, 200)
    for number in range(3):
        await api.submit({"n": number}, webhook={"url": endpoint.url("/down")})
    await api.submit({}, webhook={"url": endpoint.url("/up")})
    await wait_for_deliveries(api, 4)
    response = await api.post(REDELIVER, {"host": f"127.0.0.1:{endpoint.port}"})
    assert (response.status_code, response.json()["redelivered"]) == (202, 3)
    deliveries = await wait_for_deliveries(api, 7)
    assert {delivery["status"] for delivery in deliveries} == {"delivered"}
    assert (len(endpoint.requests_to("/down")), len(endpoint.requests_to("/up"))) == (6, 1)


async def test_deliveries_are_visible_to_owner_only(api: Api, endpoint: WebhookEndpoint) -> None:
    for user in ("bob", "eve"):
        await api.as_user(user).submit({}, webhook={"url": endpoint.url(f"/{user}")})
    assert len(await wait_for_deliveries(api, 2)) == 2
    for user in ("bob", "eve"):
        listed = (await api.as_user(user).get(WEBHOOKS)).json()
        assert (listed["total"], [delivery["user_id"] for delivery in listed["deliveries"]]) == (1, [user])
    delivery_of_bob = (await api.as_user("bob").get(WEBHOOKS)).json()["deliveries"][0]["delivery_id"]
    eve = api.as_user("eve")
    assert (await eve.get(f"{WEBHOOKS}/{delivery_of_bob}")).status_code == 404
    assert (await eve.post(f"{WEBHOOKS}/{delivery_of_bob}/redeliver")).status_code == 404
    assert (await eve.post(REDELIVER, {"status": "delivered"})).json()["redelivered"] == 1
    assert {request.path for request in await endpoint.wait_for_requests(3)} == {"/bob", "/eve"}
    assert len(endpoint.requests_to("/bob")) == 1


async def test_webhook_echo_keeps_requests_without_secrets(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, webhooks=WEBHOOK_SETTINGS):
        url = f"{api.url}{ECHO_PATH}"
        await api.submit({"extra": 7}, webhook={"url": url, "headers": {"Authorization": "Bearer s3cret"}})
        [delivery] = await wait_for_deliveries(api)
        assert delivery["status"] == "delivered", delivery
        response = await api.get(ECHO_PATH)
        [received] = response.json()["received"]
        assert received["headers"]["webhook-id"] == delivery["delivery_id"]
        assert received["headers"]["authorization"] == "***"
        assert '"extra":7' in received["body"]
        assert "s3cret" not in response.text


async def test_webhook_echo_is_off_by_default(shared_api: Api) -> None:
    for response in (await shared_api.post(ECHO_PATH, {"x": 1}), await shared_api.get(ECHO_PATH)):
        assert response.status_code == 404
        assert "webhooks.echo_enabled" in response.json()["message"]


@pytest.mark.parametrize(
    ("webhook", "message"),
    [
        ({"url": "ftp://example.org/x"}, "http"),
        ({"url": "https://user:pw@example.org/"}, "Authorization"),
        ({"url": "https://10.0.0.1/hook"}, "public"),
        ({"url": "http://169.254.169.254/latest"}, "public"),
        ({"url": "http://[::1]/x"}, "public"),
        ({"url": "https://example.org:22/x"}, "port"),
        ({"url": "https://example.org/", "secrets": ["short"]}, "whsec_"),
        ({"url": "https://example.org/", "secrets": [generate_secret(), generate_secret(), generate_secret()]}, "2"),
        ({"url": "https://example.org/", "headers": {"A": "x\r\ny"}}, "pattern"),
    ],
)
async def test_webhook_that_can_never_work_is_rejected_at_submission(
    shared_api: Api, webhook: dict[str, Any], message: str
) -> None:
    body = {"job_type": "echo", "parameters": {}, "webhook": webhook}
    for path, content in (("/api/events/jobs", body), ("/api/events/batches", {"jobs": [body]})):
        response = await shared_api.post(path, content)
        assert response.status_code == 422, response.text
        [problem] = response.json()["details"]["errors"]
        assert "webhook" in problem["path"]
        assert message in problem["message"]
        assert "short" not in problem["message"]


async def test_unknown_delivery_job_or_status_is_rejected(shared_api: Api) -> None:
    for name in ("delivery-job-1-1", "job-1", "x"):
        assert (await shared_api.get(f"{WEBHOOKS}/{name}")).json()["code"] == "delivery_not_found"
        assert (await shared_api.post(f"{WEBHOOKS}/{name}/redeliver")).json()["code"] == "delivery_not_found"
    assert (await shared_api.get(f"{WEBHOOKS}?job_id=job-1")).json()["code"] == "job_not_found"
    assert (await shared_api.get(f"{WEBHOOKS}?status=lost")).status_code == 422


async def test_redelivery_after_job_deletion_is_rejected_and_secrets_removed(
    api: Api, endpoint: WebhookEndpoint
) -> None:
    job_id = await api.submit(webhook={"url": endpoint.url(), "headers": {"Authorization": "secret"}})
    [delivery] = await wait_for_deliveries(api)
    assert await api.db.webhook_secrets.count_documents({}) == 1
    deleted = await api.http.delete(f"/api/events/jobs/{job_id}")
    response = await api.post(f"{WEBHOOKS}/{delivery['delivery_id']}/redeliver")
    assert (response.status_code, response.json()["code"]) == (410, "source_deleted")
    await api.get("/api/events/jobs", deleted.headers["Ledger-Position"])
    assert (await api.post(REDELIVER, {"status": "delivered"})).json()["redelivered"] == 0

    async def are_removed() -> bool:
        return await api.db.webhook_secrets.count_documents({}) == 0

    await poll_until(are_removed, "the secrets are removed")
    assert len(endpoint.requests) == 1
