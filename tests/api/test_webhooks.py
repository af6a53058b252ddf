"""Webhooks over HTTP: what was told to whom, telling it again, the sink, and what is refused at submission."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.net.webhook_signature import generate_secret
from tests.api.conftest import DEADLINE_SECONDS, Api, run_api
from tests.support.header_auth import HeaderAuthBackend
from tests.support.webhook_endpoint import WebhookEndpoint, run_webhook_endpoint

HOOKS = "/api/monitoring/events/webhooks"
AGAIN = "/api/monitoring/events/redeliver"
SINK = "/api/events/test-webhook-callback"
IMPATIENT: dict[str, Any] = {
    "allowed_private_hosts": ["127.0.0.1"],
    "retry_delays_seconds": [0, 0.2],
    "jitter": 0,
    "echo_enabled": True,
}


@pytest.fixture
async def cms() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as found:
        yield found


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """All roles, webhooks to this machine, and a header that says who asks."""
    monkeypatch.setattr("jobledger.cli.server.SingleUserBackend", lambda _user_id: HeaderAuthBackend())
    async for running in run_api(mongodb_uri, db_name, tmp_path, webhooks=IMPATIENT):
        yield running.as_user("ann", roles=["admin"])


async def over(api: Api, number: int = 1) -> list[dict[str, Any]]:
    """Wait until so many deliveries have ended; return all, the newest first."""
    ended = position = 0
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(api.stream_events(after=0)) as events:
        async for event in events:
            ended += event["type"] in ("DeliverySucceeded", "DeliveryAbandoned")
            position = event["position"]
            if ended == number:
                break
    found: list[dict[str, Any]] = (await api.get(HOOKS, position)).json()["deliveries"]
    return found


async def test_a_webhook_is_delivered_listed_and_shown(api: Api, cms: WebhookEndpoint) -> None:
    job_id = await api.submit({"text": "x"}, webhook={"url": cms.url(), "headers": {"X-Key": "s3cret"}})
    [delivery] = await over(api)
    [request] = cms.requests
    assert request.headers["x-key"] == "s3cret"
    assert (delivery["delivery_id"], delivery["job_id"], delivery["type"]) == (
        request.webhook_id,
        job_id,
        "job.completed",
    )
    assert (delivery["status"], delivery["sequence"], delivery["attempt"]) == ("delivered", 1, 1)
    assert delivery["attempts"][0]["status_code"] == 200
    single = await api.get(f"{HOOKS}/{delivery['delivery_id']}")
    assert single.json()["delivery"] == delivery
    assert "s3cret" not in single.text
    log = await api.get("/api/ledger/events?limit=1000")
    assert "s3cret" not in log.text
    counted = (await api.get("/api/monitoring/events/stats")).json()["stats"]["webhooks"]
    assert counted == {"total": 1, "pending": 0, "delivered": 1, "abandoned": 0}


async def test_lists_are_filtered_and_a_receiver_finds_what_it_has_missed(api: Api, cms: WebhookEndpoint) -> None:
    cms.script_responses("/bad", 410)
    good = [await api.submit({"n": n}, webhook={"url": cms.url("/good")}) for n in range(3)]
    bad = await api.submit({"n": 9}, webhook={"url": cms.url("/bad")})
    await over(api, 4)

    async def found(query: str) -> list[str]:
        answer = await api.get(f"{HOOKS}?{query}")
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert content["total"] >= len(content["deliveries"])
        return [it["job_id"] for it in content["deliveries"]]

    assert await found("status=abandoned") == [bad]
    assert sorted(await found("status=delivered")) == sorted(good)
    assert await found(f"job_id={good[1]}") == [good[1]]
    assert len(await found(f"host=127.0.0.1:{cms.port}")) == 4
    assert await found("host=elsewhere:443") == await found("type=batch.failed") == []
    told = cms.requests_to("/good")[0].json_body
    missed = await found(f"endpoint_id={told['endpoint_id']}&after_sequence=1&sort=created_at")
    assert len(missed) == 2
    assert set(missed) < set(good)
    first = (await api.get(f"{HOOKS}?limit=3")).json()
    second = (await api.get(f"{HOOKS}?limit=3&cursor={first['next_cursor']}")).json()
    seen = [it["delivery_id"] for it in first["deliveries"] + second["deliveries"]]
    assert len(set(seen)) == 4
    assert "next_cursor" not in second


async def test_one_is_sent_again_with_the_same_id_and_once_for_one_key(api: Api, cms: WebhookEndpoint) -> None:
    cms.script_responses("/hook", 410, 200)
    await api.submit({}, webhook={"url": cms.url()})
    [delivery] = await over(api)
    path = f"{HOOKS}/{delivery['delivery_id']}/redeliver"
    again = await api.post(path, {"reason": "it is back"}, **{"Idempotency-Key": "k1"})
    assert again.status_code == 202, again.text
    assert again.json()["delivery"]["status"] == "pending"
    [done] = await over(api, 2)
    assert (done["status"], done["attempt"]) == ("delivered", 2)
    repeated = await api.post(path, {"reason": "it is back"}, **{"Idempotency-Key": "k1"})
    assert repeated.headers["Ledger-Position"] == again.headers["Ledger-Position"]
    assert len({it.webhook_id for it in cms.requests}) == 1
    assert len(cms.requests) == 2


async def test_all_that_were_given_up_are_sent_again(api: Api, cms: WebhookEndpoint) -> None:
    cms.script_responses("/down", 410, 410, 410, 200)
    for number in range(3):
        await api.submit({"n": number}, webhook={"url": cms.url("/down")})
    await api.submit({}, webhook={"url": cms.url("/up")})
    await over(api, 4)
    answer = await api.post(AGAIN, {"host": f"127.0.0.1:{cms.port}"})
    assert (answer.status_code, answer.json()["redelivered"]) == (202, 3)
    found = await over(api, 7)
    assert {it["status"] for it in found} == {"delivered"}
    assert (len(cms.requests_to("/down")), len(cms.requests_to("/up"))) == (6, 1)


async def test_owners_see_theirs_and_others_nothing(api: Api, cms: WebhookEndpoint) -> None:
    for user in ("bob", "eve"):
        await api.as_user(user).submit({}, webhook={"url": cms.url(f"/{user}")})
    assert len(await over(api, 2)) == 2
    for user in ("bob", "eve"):
        found = (await api.as_user(user).get(HOOKS)).json()
        assert (found["total"], [it["user_id"] for it in found["deliveries"]]) == (1, [user])
    mine = (await api.as_user("bob").get(HOOKS)).json()["deliveries"][0]["delivery_id"]
    eve = api.as_user("eve")
    assert (await eve.get(f"{HOOKS}/{mine}")).status_code == 404
    assert (await eve.post(f"{HOOKS}/{mine}/redeliver")).status_code == 404
    assert (await eve.post(AGAIN, {"status": "delivered"})).json()["redelivered"] == 1
    assert {it.path for it in await cms.wait_for_requests(3)} == {"/bob", "/eve"}
    assert len(cms.requests_to("/bob")) == 1


async def test_the_sink_keeps_what_it_is_sent_without_secrets(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    async for api in run_api(mongodb_uri, db_name, tmp_path, webhooks=IMPATIENT):
        url = f"{str(api.http.base_url).rstrip('/')}{SINK}"
        await api.submit({"extra": 7}, webhook={"url": url, "headers": {"Authorization": "Bearer s3cret"}})
        [delivery] = await over(api)
        assert delivery["status"] == "delivered", delivery
        answer = await api.get(SINK)
        [received] = answer.json()["received"]
        assert received["headers"]["webhook-id"] == delivery["delivery_id"]
        assert received["headers"]["authorization"] == "***"
        assert '"extra":7' in received["body"]
        assert "s3cret" not in answer.text


async def test_the_sink_is_off_unless_it_is_wanted(api_without_worker: Api) -> None:
    for answer in (await api_without_worker.post(SINK, {"x": 1}), await api_without_worker.get(SINK)):
        assert answer.status_code == 404
        assert "webhooks.echo_enabled" in answer.json()["message"]


@pytest.mark.parametrize(
    ("webhook", "says"),
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
async def test_a_webhook_that_can_never_work_is_refused_when_it_is_asked_for(
    api_without_worker: Api, webhook: dict[str, Any], says: str
) -> None:
    body = {"job_type": "echo", "parameters": {}, "webhook": webhook}
    for path, content in (("/api/events/jobs", body), ("/api/events/batches", {"jobs": [body]})):
        answer = await api_without_worker.post(path, content)
        assert answer.status_code == 422, answer.text
        [problem] = answer.json()["details"]["errors"]
        assert "webhook" in problem["path"]
        assert says in problem["message"]
        assert "short" not in problem["message"]


async def test_what_does_not_exist_is_not_found(api_without_worker: Api) -> None:
    for name in ("delivery-job-1-1", "job-1", "x"):
        assert (await api_without_worker.get(f"{HOOKS}/{name}")).json()["code"] == "delivery_not_found"
        assert (await api_without_worker.post(f"{HOOKS}/{name}/redeliver")).json()["code"] == "delivery_not_found"
    assert (await api_without_worker.get(f"{HOOKS}?job_id=job-1")).json()["code"] == "job_not_found"
    assert (await api_without_worker.get(f"{HOOKS}?status=lost")).status_code == 422


async def test_redelivery_of_a_deleted_jobs_webhook_is_refused_and_its_secrets_are_removed(
    api: Api, cms: WebhookEndpoint
) -> None:
    job_id = await api.submit(webhook={"url": cms.url(), "headers": {"Authorization": "secret"}})
    [delivery] = await over(api)
    assert await api.db.webhook_secrets.count_documents({}) == 1
    deleted = await api.http.delete(f"/api/events/jobs/{job_id}")
    answer = await api.post(f"{HOOKS}/{delivery['delivery_id']}/redeliver")
    assert (answer.status_code, answer.json()["code"]) == (410, "source_deleted")
    await api.get("/api/events/jobs", deleted.headers["Ledger-Position"])
    assert (await api.post(AGAIN, {"status": "delivered"})).json()["redelivered"] == 0
    async with asyncio.timeout(20):
        while await api.db.webhook_secrets.count_documents({}):  # noqa: ASYNC110 - nothing signals it
            await asyncio.sleep(0.05)
    assert len(cms.requests) == 1
