"""Tests of the deliverer: webhooks are sent, retried and recorded, whatever the endpoint does."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from jobledger.ledger.domain.commands import CancelJob, RequeueDelivery, RestartJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.delivery import build_delivery_id
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliverySucceeded,
    EventMetadata,
    Webhook,
)
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id, create_streams
from jobledger.ledger.webhooks.signature import generate_secret
from jobledger.projections.views import deliveries
from tests.support.role_runner import FAST_WEBHOOKS, RunningRoles, WorkerOptions, make_echo_job, run_roles_in_process
from tests.support.webhook_endpoint import WebhookEndpoint, run_webhook_endpoint

TERMINAL_DELIVERY_EVENTS = (DeliverySucceeded, DeliveryAbandoned)


@pytest.fixture
async def endpoint() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
async def roles(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as running:
        yield running


async def finish_job(roles: RunningRoles, webhook: Webhook, **fields: Any) -> str:
    """Submit and cancel a job with a webhook. Return the ID of the delivery."""
    job_id = await roles.submit(webhook=webhook, **fields)
    [cancelled] = await roles.handle_commands(job_id, CancelJob("user-1"))
    return build_delivery_id(job_id, cancelled.version)


async def wait_for_delivery(roles: RunningRoles, delivery_id: str, *, after: int = 0) -> Document:
    """Wait until a delivery is delivered or abandoned. Return its document."""
    last = await roles.wait_for_event(TERMINAL_DELIVERY_EVENTS, delivery_id, after=after)
    await roles.wait_for_views(last.position)
    delivery = await deliveries.get(roles.checkpoint.views, delivery_id)
    assert delivery is not None
    return delivery


async def test_finished_job_sends_its_webhook_at_once(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    delivery_id = await finish_job(roles, Webhook(url=endpoint.url("/hook?token=1")), parameters={"extra": {"cms": 7}})
    delivery = await wait_for_delivery(roles, delivery_id)
    [request] = endpoint.requests
    assert request.path == "/hook?token=1"
    assert request.webhook_id == delivery_id
    assert request.headers["content-type"] == "application/json"
    body = request.json_body
    assert (body["schema_version"], body["type"], body["sequence"]) == (1, "job.cancelled", 1)
    assert body["job"]["job_id"] == delivery["job_id"]
    assert body["job"]["parameters"] == {"extra": {"cms": 7}}
    assert body["job"]["status"] == "cancelled"
    assert delivery["status"] == "delivered"
    [attempt] = delivery["attempts"]
    assert (attempt["attempt"], attempt["status_code"], attempt["error"], attempt["response"]) == (1, 200, None, "ok")
    assert attempt["body_sha256"] == hashlib.sha256(request.body).hexdigest()


async def test_completed_job_sends_markdown_and_metadata_on_request(
    connection: Connection, store: Path, endpoint: WebhookEndpoint
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as roles:
        hooks = [
            Webhook(url=endpoint.url("/both"), include_markdown=True, include_metadata=True),
            Webhook(url=endpoint.url("/none")),
        ]
        for hook in hooks:
            await roles.submit({"text": "Grüße"}, webhook=hook, job_name="cms-4711")
        await endpoint.wait_for_requests(2)
    [full], [minimal] = endpoint.requests_to("/both"), endpoint.requests_to("/none")
    assert full.json_body["type"] == "job.completed"
    assert full.json_body["job"]["job_name"] == "cms-4711"
    assert "Grüße" in full.json_body["markdown"]
    assert full.json_body["metadata"]["duration"] >= 0
    assert full.json_body["job"]["results"]["markdown_url"]
    assert not {"markdown", "metadata", "error"} & minimal.json_body.keys()


async def test_failed_job_sends_its_error(connection: Connection, store: Path, endpoint: WebhookEndpoint) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as roles:
        await roles.submit({"fail": "always"}, webhook=Webhook(url=endpoint.url()), max_attempts=1)
        [request] = await endpoint.wait_for_requests(1)
    assert request.json_body["type"] == "job.failed"
    assert request.json_body["error"]["message"]
    assert request.json_body["job"]["error"] == request.json_body["error"]


async def test_batch_sends_one_webhook_per_completion(
    connection: Connection, store: Path, endpoint: WebhookEndpoint
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as roles:
        batch_id, job_ids = create_batch_id(), [create_job_id(), create_job_id()]
        batch = BatchSubmitted(
            batch_name="Tag 1", total_jobs=2, job_ids=job_ids, user_id="user-1", webhook=Webhook(url=endpoint.url())
        )
        submitted = [(job_id, SubmitJob(make_echo_job({"text": "x"}, batch_id=batch_id))) for job_id in job_ids]
        await create_streams(
            roles.event_store, [(batch_id, SubmitBatch(batch)), *submitted], meta=EventMetadata("test")
        )
        await endpoint.wait_for_requests(1)
        await roles.handle_commands(job_ids[0], RestartJob("user-1"))
        first, second = await endpoint.wait_for_requests(2)
    assert first.json_body["type"] == second.json_body["type"] == "batch.completed"
    assert first.json_body["batch"]["completed_jobs"] == 2
    assert first.json_body["batch"]["job_ids"] == job_ids
    assert first.webhook_id != second.webhook_id
    assert (first.json_body["sequence"], second.json_body["sequence"]) == (1, 2)


async def test_failing_delivery_is_retried_with_one_id_and_then_abandoned(
    roles: RunningRoles, endpoint: WebhookEndpoint
) -> None:
    endpoint.script_responses("/hook", 500)
    delivery = await wait_for_delivery(roles, await finish_job(roles, Webhook(url=endpoint.url())))
    assert delivery["status"] == "abandoned"
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [500] * 5
    assert [attempt["next_attempt_at"] is None for attempt in delivery["attempts"]] == [False] * 4 + [True]
    assert delivery["reason"] == delivery["attempts"][-1]["error"]["message"]
    pauses = [
        later.received_at - earlier.received_at
        for earlier, later in zip(endpoint.requests, endpoint.requests[1:], strict=False)
    ]
    assert len(pauses) == 4
    assert all(pause >= 0.2 for pause in pauses)
    assert len({(request.webhook_id, request.body) for request in endpoint.requests}) == 1


async def test_delivery_to_recovering_endpoint_succeeds(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/hook", 500, "reset", "hang", 204)
    delivery = await wait_for_delivery(roles, await finish_job(roles, Webhook(url=endpoint.url())))
    assert delivery["status"] == "delivered"
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [500, None, None, 204]
    assert all(attempt["error"]["message"] for attempt in delivery["attempts"][:3])


async def test_delivery_with_status_410_is_abandoned(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/hook", 410)
    delivery = await wait_for_delivery(roles, await finish_job(roles, Webhook(url=endpoint.url())))
    assert (delivery["status"], len(endpoint.requests)) == ("abandoned", 1)


async def test_delivery_respects_retry_after(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/hook", (429, {"Retry-After": "1"}), 200)
    delivery = await wait_for_delivery(roles, await finish_job(roles, Webhook(url=endpoint.url())))
    first, second = endpoint.requests
    assert second.received_at - first.received_at >= 1.0
    attempt = delivery["attempts"][0]
    assert attempt["next_attempt_at"] - attempt["attempted_at"] < timedelta(seconds=1 + 10), "10 s for a busy machine"


async def test_headers_and_signatures_use_stored_secrets_that_no_event_contains(
    connection: Connection, store: Path, endpoint: WebhookEndpoint
) -> None:
    old, new = generate_secret(), generate_secret()
    async with run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as roles:
        secrets = {"_id": "secrets-1", "headers": {"Authorization": "Bearer s3cret"}, "secrets": [new, old]}
        await roles.db.webhook_secrets.insert_one(secrets)
        signed = Webhook(
            url=endpoint.url("/own"), header_names=["Authorization"], secrets_ref="secrets-1", has_own_secrets=True
        )
        delivery_ids = [await finish_job(roles, signed), await finish_job(roles, Webhook(url=endpoint.url("/all")))]
        for delivery_id in delivery_ids:
            await wait_for_delivery(roles, delivery_id)
        event_texts = str([event.data for event in await roles.read_all_events()])
        [stored] = await roles.db.endpoint_secrets.find().to_list()
        endpoint_secret = stored["secret"]
    [request], [default_request] = endpoint.requests_to("/own"), endpoint.requests_to("/all")
    assert request.headers["authorization"] == "Bearer s3cret"
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(request.body, request.headers)
    standardwebhooks.Webhook(endpoint_secret).verify(default_request.body, default_request.headers)
    for secret in (old, new, endpoint_secret, "s3cret"):
        assert secret not in event_texts
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(old).verify(request.body + b" ", request.headers)


async def test_delivery_with_removed_secrets_is_abandoned_with_the_reason(
    roles: RunningRoles, endpoint: WebhookEndpoint
) -> None:
    hook = Webhook(url=endpoint.url(), header_names=["Authorization"], secrets_ref="secrets-gone")
    delivery = await wait_for_delivery(roles, await finish_job(roles, hook))
    assert delivery["status"] == "abandoned"
    assert delivery["attempts"][0]["error"]["code"] == "SECRETS_UNAVAILABLE"
    assert not endpoint.requests


async def test_sequence_numbers_have_no_gaps_per_endpoint(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    for number in range(6):
        await finish_job(roles, Webhook(url=endpoint.url(f"/{number % 2}")), user_id="alice" if number < 4 else "bob")
    requests = await endpoint.wait_for_requests(6)
    numbers: dict[str, list[int]] = {}
    for request in requests:
        numbers.setdefault(request.json_body["endpoint_id"], []).append(request.json_body["sequence"])
    assert sorted(map(sorted, numbers.values())) == [[1], [1], [1, 2], [1, 2]]


async def test_requeued_delivery_is_sent_again_with_the_same_id(roles: RunningRoles, endpoint: WebhookEndpoint) -> None:
    endpoint.script_responses("/hook", 410, 200)
    delivery_id = await finish_job(roles, Webhook(url=endpoint.url()))
    first = await wait_for_delivery(roles, delivery_id)
    assert first["status"] == "abandoned"
    for attempts in (2, 3):
        [requeued] = await roles.handle_commands(delivery_id, RequeueDelivery("user-1"))
        delivery = await wait_for_delivery(roles, delivery_id, after=requeued.position)
        assert (delivery["status"], delivery["attempt"], len(endpoint.requests)) == ("delivered", attempts, attempts)
    assert len({request.webhook_id for request in endpoint.requests}) == 1


async def test_delivery_requeued_during_an_attempt_is_sent_once_more(
    roles: RunningRoles, endpoint: WebhookEndpoint
) -> None:
    endpoint.script_responses("/hook", "hang", 200)
    delivery_id = await finish_job(roles, Webhook(url=endpoint.url()))
    await endpoint.wait_for_requests(1)
    await roles.handle_commands(delivery_id, RequeueDelivery("user-1"))
    delivery = await wait_for_delivery(roles, delivery_id)
    assert delivery["status"] == "delivered"
    assert [attempt["status_code"] for attempt in delivery["attempts"]] == [None, 200]


async def test_hanging_endpoints_do_not_delay_other_endpoints(connection: Connection, store: Path) -> None:
    """Ten endpoints get 40 deliveries each. Three endpoints hang; the others get theirs within seconds."""
    expected = 280
    slow = FAST_WEBHOOKS.model_copy(
        update={"timeout_seconds": 5, "retry_delays_seconds": [0, 60], "circuit_breaker_failures": 5}
    )
    async with (
        run_webhook_endpoint() as endpoint,
        run_webhook_endpoint() as hanging_1,
        run_webhook_endpoint() as hanging_2,
        run_webhook_endpoint() as hanging_3,
        run_roles_in_process(connection, store, projector=True, webhooks=slow) as roles,
    ):
        for hanging in (hanging_1, hanging_2, hanging_3):
            hanging.script_responses("/hook", "hang")
        urls = [endpoint.url(f"/{number}") for number in range(7)] + [
            endpoint.url() for endpoint in (hanging_1, hanging_2, hanging_3)
        ]
        started_at = asyncio.get_running_loop().time()
        for batch_start in range(0, 40, 10):
            await asyncio.gather(
                *(finish_job(roles, Webhook(url=url)) for url in urls for _ in range(batch_start, batch_start + 10))
            )
        queued_at = asyncio.get_running_loop().time()
        await endpoint.wait_for_requests(expected, seconds=60)
        seconds = asyncio.get_running_loop().time() - queued_at
    assert len({request.webhook_id for request in endpoint.requests}) == expected
    assert all(len(endpoint.requests) <= 9 for endpoint in (hanging_1, hanging_2, hanging_3)), (
        "the circuit breaker must stop attempts"
    )
    assert seconds < 30, (
        f"{seconds:.1f} s after the last delivery was queued (queueing: {queued_at - started_at:.1f} s)"
    )


async def test_deliveries_wait_for_an_unreachable_endpoint(connection: Connection, store: Path) -> None:
    settings = FAST_WEBHOOKS.model_copy(
        update={
            "retry_delays_seconds": [0, *[60] * 9],
            "circuit_breaker_failures": 3,
            "circuit_breaker_cooldown_seconds": 5,  # longer than finishing 20 jobs at the same time takes
        }
    )
    async with (
        run_webhook_endpoint() as endpoint,
        run_roles_in_process(connection, store, projector=True, webhooks=settings) as roles,
    ):
        await endpoint.stop()
        first = [await finish_job(roles, Webhook(url=endpoint.url())) for _ in range(3)]
        for delivery_id in first:
            await roles.wait_for_event(DeliveryAttempted, delivery_id)
        waiting = await asyncio.gather(*(finish_job(roles, Webhook(url=endpoint.url())) for _ in range(20)))
        await endpoint.start()
        for delivery_id in waiting:
            delivery = await wait_for_delivery(roles, delivery_id)
            assert (delivery["status"], delivery["attempt"]) == ("delivered", 1)


async def test_standby_continues_deliveries_of_a_stopped_leader(
    connection: Connection, store: Path, endpoint: WebhookEndpoint
) -> None:
    endpoint.script_responses("/hook", 500, 200)
    slow = FAST_WEBHOOKS.model_copy(update={"retry_delays_seconds": [0, 2]})
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, webhooks=slow) as first,
    ):
        delivery_id = await finish_job(roles, Webhook(url=endpoint.url()))
        await roles.wait_for_event(DeliveryAttempted, delivery_id)
        async with run_roles_in_process(connection, store, webhooks=slow):
            assert first.webhooks_task is not None
            first.webhooks_task.cancel()
            await asyncio.gather(first.webhooks_task, return_exceptions=True)
            delivery = await wait_for_delivery(roles, delivery_id)
        actors = [event.meta.actor for event in await roles.read_all_events() if event.type == "DeliveryAttempted"]
    assert (delivery["status"], len(endpoint.requests)) == ("delivered", 2)
    assert all(actor.startswith("webhooks:") for actor in actors)


async def test_attempt_in_flight_at_shutdown_is_recorded(
    connection: Connection, store: Path, endpoint: WebhookEndpoint
) -> None:
    endpoint.script_responses("/hook", "hang")
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, webhooks=FAST_WEBHOOKS):
            delivery_id = await finish_job(roles, Webhook(url=endpoint.url()))
            await endpoint.wait_for_requests(1)
        assert await roles.read_event_types(delivery_id) == ["DeliveryQueued", "DeliveryAttempted"]
