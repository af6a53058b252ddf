"""Signing secrets of endpoints: one for each user and URL, created on first use, shown once, rotated and revoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import standardwebhooks

from jobledger.ledger.store import endpoint_secrets
from jobledger.ledger.store.endpoint_secrets import Endpoint
from tests.api.conftest import Api, run_api
from tests.support.header_auth import HeaderAuthBackend
from tests.support.webhook_endpoint import ReceivedRequest, WebhookEndpoint, run_webhook_endpoint

ENDPOINTS: Final = "/api/monitoring/events/webhook-endpoints"
HOOKS: Final = {"allowed_private_hosts": ["127.0.0.1"], "retry_delays_seconds": [0, 0.2, 0.2, 0.2], "jitter": 0}


@pytest.fixture
async def cms() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as found:
        yield found


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    monkeypatch.setattr("jobledger.cli.server.SingleUserBackend", lambda _user_id: HeaderAuthBackend())
    async for running in run_api(mongodb_uri, db_name, tmp_path, webhooks=HOOKS):
        yield running.as_user("ann", roles=["admin"])


async def submitted(api: Api, url: str, **more: Any) -> list[dict[str, str]]:
    """Submit a job and return the secrets that the answer shows."""
    body = {"job_type": "echo", "parameters": {}, "webhook": {"url": url, **more.pop("webhook", {})}}
    answer = await api.post("/api/events/jobs", body | more.pop("body", {}), **more)
    assert answer.status_code == 202, answer.text
    shown: list[dict[str, str]] = answer.json().get("webhook_secrets", [])
    return shown


def validates(secret: str, request: ReceivedRequest) -> bool:
    try:
        standardwebhooks.Webhook(secret).verify(request.body, request.headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


async def test_secret_is_shown_by_the_first_submission_only_and_nowhere_else(api: Api, cms: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [new] = await submitted(alice, cms.url())
    assert await submitted(alice, cms.url()) == []
    requests = await cms.wait_for_requests(2)
    assert all(validates(new["secret"], request) for request in requests)
    position = await api.event_store.head_position()
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


async def test_no_users_message_validates_at_a_receiver_of_another(api: Api, cms: WebhookEndpoint) -> None:
    """Whatever they submit: the same URL, another one, a batch, own secrets, again, or by an admin for somebody."""
    mallory, alice = api.as_user("mallory"), api.as_user("alice")
    [victim] = await submitted(alice, cms.url("/alice"))
    [theirs] = await submitted(mallory, cms.url("/alice"))
    assert theirs["secret"] != victim["secret"]
    await submitted(mallory, cms.url("/alice"), webhook={"secrets": [theirs["secret"]]})
    job = {"job_type": "echo", "parameters": {}, "webhook": {"url": cms.url("/alice")}}
    answer = await mallory.post("/api/events/batches", {"jobs": [job, job], "webhook": job["webhook"]})
    assert answer.status_code == 202
    await submitted(mallory, cms.url("/alice") + "?x=1")
    await submitted(mallory, cms.url("/alice") + "#x")
    await submitted(api, cms.url("/alice"), body={"user_id": "mallory"})
    requests = await cms.wait_for_requests(9)
    by_alice = [it for it in requests if (it.json_body.get("job") or it.json_body["batch"])["user_id"] == "alice"]
    others = [it for it in requests if it not in by_alice]
    assert len(by_alice) == 1
    assert validates(victim["secret"], by_alice[0])
    assert len(others) == 8
    assert not any(validates(victim["secret"], request) for request in others)
    for body in ({"user_id": "alice"},):
        refused = await mallory.post("/api/events/jobs", {**job, **body})
        assert refused.status_code == 403


async def test_batch_shows_each_new_secret_once(api: Api, cms: WebhookEndpoint) -> None:
    jobs = [
        {"job_type": "echo", "parameters": {}, "webhook": {"url": cms.url(f"/{number % 2}")}} for number in range(4)
    ]
    body = {"jobs": jobs, "webhook": {"url": cms.url("/2")}}
    first = (await api.as_user("alice").post("/api/events/batches", body)).json()["webhook_secrets"]
    assert {it["url"] for it in first} == {cms.url("/0"), cms.url("/1"), cms.url("/2")}
    assert "webhook_secrets" not in (await api.as_user("alice").post("/api/events/batches", body)).json()
    secrets = {it["url"]: it["secret"] for it in first}
    for request in await cms.wait_for_requests(10):
        assert validates(secrets[cms.url(request.path)], request)


async def test_repeated_request_does_not_show_the_secret_again(api: Api, cms: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    once = {"Idempotency-Key": "k"}
    assert len(await submitted(alice, cms.url(), **once)) == 1
    assert await submitted(alice, cms.url(), **once) == []


async def test_refused_submission_keeps_the_secret_for_the_next(api: Api, cms: WebhookEndpoint) -> None:
    await endpoint_secrets.ensure_secrets(
        api.db, [Endpoint("alice", cms.url())]
    )  # as one that failed after this step leaves it
    [new] = await submitted(api.as_user("alice"), cms.url())
    [request] = await cms.wait_for_requests(1)
    assert validates(new["secret"], request)


async def test_many_processes_create_one_secret_and_one_shows_it(api: Api) -> None:
    wanted = [Endpoint("alice", f"https://example.org/{number}") for number in range(5)]

    async def use() -> list[endpoint_secrets.RevealedSecret]:
        await endpoint_secrets.ensure_secrets(api.db, wanted)
        return await endpoint_secrets.reveal_new_secrets(api.db, wanted)

    shown = [it for found in await asyncio.gather(*(use() for _ in range(10))) for it in found]
    assert len(shown) == len({it.endpoint_id for it in shown}) == 5
    for endpoint in wanted:
        [secret] = await endpoint_secrets.load_signing_secrets(api.db, endpoint)
        assert secret in {it.secret for it in shown}


async def test_old_secret_signs_beside_the_new_one_for_the_grace_period(api: Api, cms: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [old] = await submitted(alice, cms.url())
    path = f"{ENDPOINTS}/{old['endpoint_id']}/rotate-secret"
    new = (await alice.post(path, {"grace_period_s": 3600})).json()
    await cms.wait_for_requests(1)
    await submitted(alice, cms.url())
    both = (await cms.wait_for_requests(2))[1]
    assert validates(new["secret"], both)
    assert validates(old["secret"], both)
    last = (await alice.post(path, {"grace_period_s": 0})).json()
    await submitted(alice, cms.url())
    one = (await cms.wait_for_requests(3))[2]
    assert [validates(it["secret"], one) for it in (last, new, old)] == [True, False, False]
    [listed] = (await alice.get(ENDPOINTS)).json()["endpoints"]
    assert (listed["endpoint_id"], listed["revoked"], listed["previous_secret_expires_at"]) == (
        old["endpoint_id"],
        False,
        None,
    )


async def test_rotations_at_the_same_moment_lose_no_secret_that_was_shown(api: Api) -> None:
    endpoint = Endpoint("alice", "https://example.org/")
    await endpoint_secrets.ensure_secrets(api.db, [endpoint])
    grace = timedelta(hours=1)
    shown = await asyncio.gather(
        *(endpoint_secrets.rotate_secret(api.db, endpoint.endpoint_id, grace) for _ in range(3))
    )
    assert {it.secret for it in shown if it} <= set(await endpoint_secrets.load_signing_secrets(api.db, endpoint))


async def test_revoked_secret_sends_nothing_until_it_is_rotated(api: Api, cms: WebhookEndpoint) -> None:
    alice = api.as_user("alice")
    [old] = await submitted(alice, cms.url())
    await cms.wait_for_requests(1)
    revoked = await alice.http.delete(f"{ENDPOINTS}/{old['endpoint_id']}/secret", headers=alice.principal_headers)
    assert revoked.status_code == 200
    assert await submitted(alice, cms.url()) == []
    await asyncio.sleep(0.3)
    assert len(cms.requests) == 1
    new = (await alice.post(f"{ENDPOINTS}/{old['endpoint_id']}/rotate-secret")).json()
    second = (await cms.wait_for_requests(2))[1]
    assert validates(new["secret"], second)
    assert not validates(old["secret"], second)


async def test_endpoints_are_for_their_owner_and_admins(api: Api, cms: WebhookEndpoint) -> None:
    [mine] = await submitted(api.as_user("alice"), cms.url())
    bob = api.as_user("bob", groups=["team-x"], roles=["monitor"])
    assert (await bob.get(ENDPOINTS)).json()["endpoints"] == []
    for who in (bob, api.as_user()):
        for method, path in (("POST", "rotate-secret"), ("DELETE", "secret")):
            answer = await api.http.request(
                method, f"{ENDPOINTS}/{mine['endpoint_id']}/{path}", headers=who.principal_headers
            )
            assert answer.status_code in (401, 404)
    assert len((await api.get(ENDPOINTS)).json()["endpoints"]) == 1
    assert (await api.post(f"{ENDPOINTS}/{mine['endpoint_id']}/rotate-secret")).status_code == 200


async def test_admin_gives_nobody_their_own_groups(api: Api) -> None:
    admin = api.as_user("ann", groups=["team-admins"], roles=["admin"])
    job = {"job_type": "echo", "parameters": {}, "access_control": {"visibility": "team"}}
    theirs = (await admin.post("/api/events/jobs", {**job, "user_id": "bob"})).json()["job_id"]
    mine = (await admin.post("/api/events/jobs", job)).json()["job_id"]
    jobs = [job, {**job, "user_id": "ann"}, {**job, "user_id": "eve"}]
    batch = (await admin.post("/api/events/batches", {"user_id": "bob", "jobs": jobs})).json()
    streams = [theirs, mine, batch["batch_id"], *batch["job_ids"]]
    teams = [(await api.event_store.read_stream(stream, limit=1))[0].data.get("teams", []) for stream in streams]
    assert teams == [[], ["team-admins"], [], [], ["team-admins"], []]
    await admin.wait_until_finished(theirs)
    changed = [
        await admin.post(f"/api/events/jobs/{theirs}/restart"),
        await admin.http.put(
            f"/api/events/jobs/{mine}", json={"access_control": {"visibility": "team"}}, headers=admin.principal_headers
        ),
    ]
    assert [it.json()["job"]["teams"] for it in changed] == [[], ["team-admins"]]
