"""Signing secrets of endpoints: one for each user and URL, created on first use, shown once, rotated and revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import standardwebhooks

from jobledger.ledger.webhooks import endpoint_secrets
from jobledger.ledger.webhooks.endpoint_secrets import Endpoint
from tests.api.conftest import Api, run_api
from tests.support.polling import DEADLINE_SECONDS
from tests.support.webhook_endpoint import ReceivedRequest, WebhookEndpoint, run_webhook_endpoint

ENDPOINTS: Final = "/api/monitoring/events/webhook-endpoints"
WEBHOOK_SETTINGS: Final = {
    "allowed_private_hosts": ["127.0.0.1"],
    "retry_delays_seconds": [0, 0.2, 2, 10],
    "jitter": 0,
}


@pytest.fixture
async def endpoint() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as running:
        yield running


@pytest.fixture
async def api(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API with all roles and header authentication, as an admin."""
    async for running in run_api(mongodb_uri, db_name, tmp_path, webhooks=WEBHOOK_SETTINGS):
        yield running.as_user("ann", roles=["admin"])


async def submit_with_webhook(api: Api, url: str, **more: Any) -> list[dict[str, str]]:
    """Submit a job and return the secrets that the response shows."""
    body = {"job_type": "echo", "parameters": {}, "webhook": {"url": url, **more.pop("webhook", {})}}
    response = await api.post("/api/events/jobs", body | more.pop("body", {}), **more)
    assert response.status_code == 202, response.text
    secrets: list[dict[str, str]] = response.json().get("webhook_secrets", [])
    return secrets


async def wait_for_failed_attempt(api: Api, code: str) -> None:
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        aclosing(api.stream_events(after=0, types="DeliveryAttempted")) as events,
    ):
        async for event in events:
            if (event["data"].get("error") or {}).get("code") == code:
                break


def is_valid_signature(secret: str, request: ReceivedRequest) -> bool:
    try:
        standardwebhooks.Webhook(secret).verify(request.body, request.headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


async def test_secret_is_shown_once_by_first_submission(api: Api, endpoint: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [new] = await submit_with_webhook(alice, endpoint.url())
    assert await submit_with_webhook(alice, endpoint.url()) == []
    requests = await endpoint.wait_for_requests(2)
    assert all(is_valid_signature(new["secret"], request) for request in requests)
    position = await api.event_store.read_head_position()
    for path in (
        "/api/ledger/events?limit=1000",
        "/api/events/jobs",
        "/api/monitoring/events/webhooks",
        f"{ENDPOINTS}?limit=1000",
    ):
        text = (await api.get(path, position)).text
        assert new["endpoint_id"] in text or path == "/api/ledger/events?limit=1000" or path == "/api/events/jobs"
        assert new["secret"] not in text
    assert new["secret"] not in repr(endpoint_secrets.RevealedSecret(**new))


async def test_message_of_one_user_fails_validation_at_endpoint_of_another(api: Api, endpoint: WebhookEndpoint) -> None:
    """Holds for the same URL, other URLs, batches, own secrets, repetitions, and submissions by an admin."""
    mallory, alice = api.as_user("mallory"), api.as_user("alice")
    [victim] = await submit_with_webhook(alice, endpoint.url("/alice"))
    [secret_of_mallory] = await submit_with_webhook(mallory, endpoint.url("/alice"))
    assert secret_of_mallory["secret"] != victim["secret"]
    await submit_with_webhook(mallory, endpoint.url("/alice"), webhook={"secrets": [secret_of_mallory["secret"]]})
    job = {"job_type": "echo", "parameters": {}, "webhook": {"url": endpoint.url("/alice")}}
    response = await mallory.post("/api/events/batches", {"jobs": [job, job], "webhook": job["webhook"]})
    assert response.status_code == 202
    await submit_with_webhook(mallory, endpoint.url("/alice") + "?x=1")
    await submit_with_webhook(mallory, endpoint.url("/alice") + "#x")
    await submit_with_webhook(api, endpoint.url("/alice"), body={"user_id": "mallory"})
    requests = await endpoint.wait_for_requests(9)
    users = [(request.json_body.get("job") or request.json_body["batch"])["user_id"] for request in requests]
    from_alice = [request for request, user in zip(requests, users, strict=True) if user == "alice"]
    from_mallory = [request for request, user in zip(requests, users, strict=True) if user != "alice"]
    assert len(from_alice) == 1
    assert is_valid_signature(victim["secret"], from_alice[0])
    assert len(from_mallory) == 8
    assert not any(is_valid_signature(victim["secret"], request) for request in from_mallory)
    rejected = await mallory.post("/api/events/jobs", {**job, "user_id": "alice"})
    assert rejected.status_code == 403


async def test_batch_submission_shows_each_new_secret_once(api: Api, endpoint: WebhookEndpoint) -> None:
    jobs = [
        {"job_type": "echo", "parameters": {}, "webhook": {"url": endpoint.url(f"/{number % 2}")}}
        for number in range(4)
    ]
    body = {"jobs": jobs, "webhook": {"url": endpoint.url("/2")}}
    first = (await api.as_user("alice").post("/api/events/batches", body)).json()["webhook_secrets"]
    assert {shown["url"] for shown in first} == {endpoint.url("/0"), endpoint.url("/1"), endpoint.url("/2")}
    assert "webhook_secrets" not in (await api.as_user("alice").post("/api/events/batches", body)).json()
    secrets = {shown["url"]: shown["secret"] for shown in first}
    for request in await endpoint.wait_for_requests(10):
        assert is_valid_signature(secrets[endpoint.url(request.path)], request)


async def test_repeated_request_does_not_show_secret_again(api: Api, endpoint: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    once = {"Idempotency-Key": "k"}
    assert len(await submit_with_webhook(alice, endpoint.url(), **once)) == 1
    assert await submit_with_webhook(alice, endpoint.url(), **once) == []


async def test_rejected_submission_keeps_secret_for_the_next(api: Api, endpoint: WebhookEndpoint) -> None:
    # A submission that fails after this step leaves the same state.
    await endpoint_secrets.ensure_secrets(api.db, [Endpoint("alice", endpoint.url())])
    [new] = await submit_with_webhook(api.as_user("alice"), endpoint.url())
    [request] = await endpoint.wait_for_requests(1)
    assert is_valid_signature(new["secret"], request)


async def test_concurrent_submissions_create_one_secret_and_reveal_it_once(api: Api) -> None:
    endpoints = [Endpoint("alice", f"https://example.org/{number}") for number in range(5)]

    async def create_and_reveal() -> list[endpoint_secrets.RevealedSecret]:
        await endpoint_secrets.ensure_secrets(api.db, endpoints)
        return await endpoint_secrets.reveal_new_secrets(api.db, endpoints)

    results = await asyncio.gather(*(create_and_reveal() for _ in range(10)))
    revealed = [shown for result in results for shown in result]
    assert len(revealed) == len({shown.endpoint_id for shown in revealed}) == 5
    for owned in endpoints:
        [secret] = await endpoint_secrets.load_signing_secrets(api.db, owned)
        assert secret in {shown.secret for shown in revealed}


async def test_old_secret_signs_beside_new_one_during_grace_period(api: Api, endpoint: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [old] = await submit_with_webhook(alice, endpoint.url())
    path = f"{ENDPOINTS}/{old['endpoint_id']}/rotate-secret"
    new = (await alice.post(path, {"grace_period_s": 3600})).json()
    await endpoint.wait_for_requests(1)
    await submit_with_webhook(alice, endpoint.url())
    during_grace = (await endpoint.wait_for_requests(2))[1]
    assert is_valid_signature(new["secret"], during_grace)
    assert is_valid_signature(old["secret"], during_grace)
    last = (await alice.post(path, {"grace_period_s": 0})).json()
    await submit_with_webhook(alice, endpoint.url())
    after_grace = (await endpoint.wait_for_requests(3))[2]
    assert [is_valid_signature(key["secret"], after_grace) for key in (last, new, old)] == [True, False, False]
    [listed] = (await alice.get(ENDPOINTS)).json()["endpoints"]
    assert (listed["endpoint_id"], listed["revoked"], listed["previous_secret_expires_at"]) == (
        old["endpoint_id"],
        False,
        None,
    )


async def test_concurrent_rotations_keep_every_revealed_secret(api: Api) -> None:
    owned = Endpoint("alice", "https://example.org/")
    await endpoint_secrets.ensure_secrets(api.db, [owned])
    grace = timedelta(hours=1)
    revealed = await asyncio.gather(
        *(endpoint_secrets.rotate_secret(api.db, owned.endpoint_id, grace) for _ in range(3))
    )
    assert {shown.secret for shown in revealed if shown} <= set(
        await endpoint_secrets.load_signing_secrets(api.db, owned)
    )


async def test_revoked_secret_stops_deliveries_until_rotation(api: Api, endpoint: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [old] = await submit_with_webhook(alice, endpoint.url())
    await endpoint.wait_for_requests(1)
    revoked = await alice.http.delete(f"{ENDPOINTS}/{old['endpoint_id']}/secret", headers=alice.principal_headers)
    assert revoked.status_code == 200
    assert await submit_with_webhook(alice, endpoint.url()) == []
    await wait_for_failed_attempt(alice, "SECRETS_UNAVAILABLE")
    assert len(endpoint.requests) == 1
    new = (await alice.post(f"{ENDPOINTS}/{old['endpoint_id']}/rotate-secret")).json()
    second = (await endpoint.wait_for_requests(2))[1]
    assert is_valid_signature(new["secret"], second)
    assert not is_valid_signature(old["secret"], second)


async def test_endpoints_are_accessible_to_owner_and_admins_only(api: Api, endpoint: WebhookEndpoint) -> None:
    [secret_of_alice] = await submit_with_webhook(api.as_user("alice"), endpoint.url())
    bob = api.as_user("bob", groups=["team-x"], roles=["monitor"])
    assert (await bob.get(ENDPOINTS)).json()["endpoints"] == []
    for caller in (bob, api.as_user()):
        for method, path in (("POST", "rotate-secret"), ("DELETE", "secret")):
            response = await api.http.request(
                method, f"{ENDPOINTS}/{secret_of_alice['endpoint_id']}/{path}", headers=caller.principal_headers
            )
            assert response.status_code in (401, 404)
    assert len((await api.get(ENDPOINTS)).json()["endpoints"]) == 1
    assert (await api.post(f"{ENDPOINTS}/{secret_of_alice['endpoint_id']}/rotate-secret")).status_code == 200


async def test_submission_for_another_user_does_not_get_groups_of_admin(api: Api) -> None:
    admin = api.as_user("ann", groups=["team-admins"], roles=["admin"])
    job = {"job_type": "echo", "parameters": {}, "access_control": {"visibility": "team"}}
    job_of_bob = (await admin.post("/api/events/jobs", {**job, "user_id": "bob"})).json()["job_id"]
    job_of_admin = (await admin.post("/api/events/jobs", job)).json()["job_id"]
    jobs = [job, {**job, "user_id": "ann"}, {**job, "user_id": "eve"}]
    batch = (await admin.post("/api/events/batches", {"user_id": "bob", "jobs": jobs})).json()
    streams = [job_of_bob, job_of_admin, batch["batch_id"], *batch["job_ids"]]
    teams = [(await api.event_store.read_stream(stream, limit=1))[0].data.get("teams", []) for stream in streams]
    assert teams == [[], ["team-admins"], [], [], ["team-admins"], []]
    await admin.wait_until_finished(job_of_bob)
    responses = [
        await admin.post(f"/api/events/jobs/{job_of_bob}/restart"),
        await admin.http.put(
            f"/api/events/jobs/{job_of_admin}",
            json={"access_control": {"visibility": "team"}},
            headers=admin.principal_headers,
        ),
    ]
    assert [response.json()["job"]["teams"] for response in responses] == [[], ["team-admins"]]
