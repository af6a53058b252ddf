"""Webhooks are sent, repeated as promised, and put on record, whatever the receiver does."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from jobledger.ledger.domain.commands import CancelJob, RequeueDelivery, RestartJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.delivery import delivery_id_for
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliverySucceeded,
    EventMetadata,
    Webhook,
)
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.net.webhook_signature import generate_secret
from jobledger.ledger.store.command_handler import create_streams, new_batch_id, new_job_id
from jobledger.projections.views import deliveries
from jobledger.workers.webhooks.schedule import DeliveryLimits
from tests.support.role_runner import FAST_WEBHOOKS, RunningRoles, WorkerOptions, make_echo_job, run_roles_in_process
from tests.support.webhook_endpoint import WebhookEndpoint, run_webhook_endpoint

OVER = (DeliverySucceeded, DeliveryAbandoned)


@pytest.fixture
async def cms() -> AsyncIterator[WebhookEndpoint]:
    async with run_webhook_endpoint() as found:
        yield found


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as found:
        yield found


async def end_a_job(here: RunningRoles, webhook: Webhook, **fields: Any) -> str:
    """Have a job end that has a webhook; return the id of the delivery."""
    job_id = await here.submit(webhook=webhook, **fields)
    [cancelled] = await here.handle_commands(job_id, CancelJob("somebody"))
    return delivery_id_for(job_id, cancelled.version)


async def over(here: RunningRoles, delivery_id: str, *, after: int = 0) -> Document:
    """Wait for the end of a delivery; return its document."""
    last = await here.wait_for_event(OVER, delivery_id, after=after)
    await here.wait_for_views(last.position)
    found = await deliveries.get(here.checkpoint.views, delivery_id)
    assert found is not None
    return found


async def test_an_end_is_told_at_once_with_what_it_was(here: RunningRoles, cms: WebhookEndpoint) -> None:
    delivery_id = await end_a_job(here, Webhook(url=cms.url("/hook?token=1")), parameters={"extra": {"cms": 7}})
    done = await over(here, delivery_id)
    [request] = cms.requests
    assert request.path == "/hook?token=1"
    assert request.webhook_id == delivery_id
    assert request.headers["content-type"] == "application/json"
    body = request.json_body
    assert (body["schema_version"], body["type"], body["sequence"]) == (1, "job.cancelled", 1)
    assert body["job"]["job_id"] == done["job_id"]
    assert body["job"]["parameters"] == {"extra": {"cms": 7}}
    assert body["job"]["status"] == "cancelled"
    assert done["status"] == "delivered"
    [attempt] = done["attempts"]
    assert (attempt["attempt"], attempt["status_code"], attempt["error"], attempt["response"]) == (1, 200, None, "ok")
    assert attempt["body_sha256"] == hashlib.sha256(request.body).hexdigest()


async def test_a_completed_job_brings_its_markdown_and_metadata_if_asked_for(
    connection: Connection, store: Path, cms: WebhookEndpoint
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as here:
        hooks = [
            Webhook(url=cms.url("/both"), include_markdown=True, include_metadata=True),
            Webhook(url=cms.url("/none")),
        ]
        for hook in hooks:
            await here.submit({"text": "Grüße"}, webhook=hook, job_name="cms-4711")
        await cms.wait_for_requests(2)
    [both], [none] = cms.requests_to("/both"), cms.requests_to("/none")
    assert both.json_body["type"] == "job.completed"
    assert both.json_body["job"]["job_name"] == "cms-4711"
    assert "Grüße" in both.json_body["markdown"]
    assert both.json_body["metadata"]["duration"] >= 0
    assert both.json_body["job"]["results"]["markdown_url"]
    assert not {"markdown", "metadata", "error"} & none.json_body.keys()


async def test_a_failed_job_says_why(connection: Connection, store: Path, cms: WebhookEndpoint) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as here:
        await here.submit({"fail": "always"}, webhook=Webhook(url=cms.url()), max_attempts=1)
        [request] = await cms.wait_for_requests(1)
    assert request.json_body["type"] == "job.failed"
    assert request.json_body["error"]["message"]
    assert request.json_body["job"]["error"] == request.json_body["error"]


async def test_a_batch_is_told_once_when_all_have_ended_and_once_more_after_a_restart(
    connection: Connection, store: Path, cms: WebhookEndpoint
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), webhooks=FAST_WEBHOOKS
    ) as here:
        batch_id, job_ids = new_batch_id(), [new_job_id(), new_job_id()]
        batch = BatchSubmitted(
            batch_name="Tag 1", total_jobs=2, job_ids=job_ids, user_id="user-1", webhook=Webhook(url=cms.url())
        )
        submitted = [(job_id, SubmitJob(make_echo_job({"text": "x"}, batch_id=batch_id))) for job_id in job_ids]
        await create_streams(here.event_store, [(batch_id, SubmitBatch(batch)), *submitted], meta=EventMetadata("test"))
        await cms.wait_for_requests(1)
        await here.handle_commands(job_ids[0], RestartJob("somebody"))
        first, second = await cms.wait_for_requests(2)
    assert first.json_body["type"] == second.json_body["type"] == "batch.completed"
    assert first.json_body["batch"]["completed_jobs"] == 2
    assert first.json_body["batch"]["job_ids"] == job_ids
    assert first.webhook_id != second.webhook_id
    assert (first.json_body["sequence"], second.json_body["sequence"]) == (1, 2)


async def test_failures_are_repeated_by_the_schedule_under_one_id_and_then_given_up(
    here: RunningRoles, cms: WebhookEndpoint
) -> None:
    cms.script_responses("/hook", 500)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert done["status"] == "abandoned"
    assert [it["status_code"] for it in done["attempts"]] == [500] * 5
    assert [it["next_attempt_at"] is None for it in done["attempts"]] == [False] * 4 + [True]
    assert done["reason"] == done["attempts"][-1]["error"]["message"]
    pauses = [
        later.received_at - earlier.received_at for earlier, later in zip(cms.requests, cms.requests[1:], strict=False)
    ]
    assert len(pauses) == 4
    assert all(pause >= 0.2 for pause in pauses)
    assert len({(it.webhook_id, it.body) for it in cms.requests}) == 1


async def test_a_receiver_that_recovers_is_told(here: RunningRoles, cms: WebhookEndpoint) -> None:
    cms.script_responses("/hook", 500, "reset", "hang", 204)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert done["status"] == "delivered"
    assert [it["status_code"] for it in done["attempts"]] == [500, None, None, 204]
    assert all(it["error"]["message"] for it in done["attempts"][:3])


async def test_gone_is_final(here: RunningRoles, cms: WebhookEndpoint) -> None:
    cms.script_responses("/hook", 410)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert (done["status"], len(cms.requests)) == ("abandoned", 1)


async def test_who_asks_for_time_gets_it(here: RunningRoles, cms: WebhookEndpoint) -> None:
    cms.script_responses("/hook", (429, {"Retry-After": "1"}), 200)
    await over(here, await end_a_job(here, Webhook(url=cms.url())))
    first, second = cms.requests
    assert 1.0 <= second.received_at - first.received_at < 3


async def test_header_values_and_signatures_come_from_where_secrets_are(
    connection: Connection, store: Path, cms: WebhookEndpoint
) -> None:
    old, new = generate_secret(), generate_secret()
    async with run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as here:
        kept = {"_id": "secrets-1", "headers": {"Authorization": "Bearer s3cret"}, "secrets": [new, old]}
        await here.db.webhook_secrets.insert_one(kept)
        own = Webhook(
            url=cms.url("/own"), header_names=["Authorization"], secrets_ref="secrets-1", has_own_secrets=True
        )
        ended = [await end_a_job(here, own), await end_a_job(here, Webhook(url=cms.url("/all")))]
        for delivery_id in ended:
            await over(here, delivery_id)
        everything = str([it.data for it in await here.read_all_events()])
        [endpoint] = await here.db.endpoint_secrets.find().to_list()
        of_all = endpoint["secret"]
    [request], [other] = cms.requests_to("/own"), cms.requests_to("/all")
    assert request.headers["authorization"] == "Bearer s3cret"
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(request.body, request.headers)
    standardwebhooks.Webhook(of_all).verify(other.body, other.headers)
    for secret in (old, new, of_all, "s3cret"):
        assert secret not in everything
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(old).verify(request.body + b" ", request.headers)


async def test_secrets_that_were_removed_are_a_clear_failure(here: RunningRoles, cms: WebhookEndpoint) -> None:
    hook = Webhook(url=cms.url(), header_names=["Authorization"], secrets_ref="secrets-gone")
    done = await over(here, await end_a_job(here, hook))
    assert done["status"] == "abandoned"
    assert done["attempts"][0]["error"]["code"] == "BODY_UNAVAILABLE"
    assert not cms.requests


async def test_each_receiver_has_numbers_of_its_own_without_a_gap(here: RunningRoles, cms: WebhookEndpoint) -> None:
    for number in range(6):
        await end_a_job(here, Webhook(url=cms.url(f"/{number % 2}")), user_id="alice" if number < 4 else "bob")
    requests = await cms.wait_for_requests(6)
    numbers: dict[str, list[int]] = {}
    for request in requests:
        numbers.setdefault(request.json_body["endpoint_id"], []).append(request.json_body["sequence"])
    assert sorted(sorted(it) for it in numbers.values()) == [[1], [1], [1, 2], [1, 2]]


async def test_what_was_given_up_or_delivered_is_sent_again_when_asked_for(
    here: RunningRoles, cms: WebhookEndpoint
) -> None:
    cms.script_responses("/hook", 410, 200)
    delivery_id = await end_a_job(here, Webhook(url=cms.url()))
    first = await over(here, delivery_id)
    assert first["status"] == "abandoned"
    for times in (2, 3):
        [again] = await here.handle_commands(delivery_id, RequeueDelivery("somebody"))
        done = await over(here, delivery_id, after=again.position)
        assert (done["status"], done["attempt"], len(cms.requests)) == ("delivered", times, times)
    assert len({it.webhook_id for it in cms.requests}) == 1


async def test_asked_for_while_it_is_on_its_way_it_is_sent_once_more(here: RunningRoles, cms: WebhookEndpoint) -> None:
    cms.script_responses("/hook", "hang", 200)
    delivery_id = await end_a_job(here, Webhook(url=cms.url()))
    await cms.wait_for_requests(1)
    await here.handle_commands(delivery_id, RequeueDelivery("impatient"))
    done = await over(here, delivery_id)
    assert done["status"] == "delivered"
    assert [it["status_code"] for it in done["attempts"]] == [None, 200]


async def test_dead_receivers_hold_up_nobody(connection: Connection, store: Path) -> None:
    """Four hundred deliveries to ten receivers, of which three hang: the others have all of theirs within seconds."""
    alive = 280
    slow = replace(
        FAST_WEBHOOKS, timeout_seconds=5, retry_delays=(0, 60), limits=DeliveryLimits(circuit_breaker_failures=5)
    )
    async with (
        run_webhook_endpoint() as cms,
        run_webhook_endpoint() as dead_1,
        run_webhook_endpoint() as dead_2,
        run_webhook_endpoint() as dead_3,
        run_roles_in_process(connection, store, projector=True, webhooks=slow) as here,
    ):
        for dead in (dead_1, dead_2, dead_3):
            dead.script_responses("/hook", "hang")
        urls = [cms.url(f"/{number}") for number in range(7)] + [it.url() for it in (dead_1, dead_2, dead_3)]
        begun = asyncio.get_running_loop().time()
        for round_ in range(0, 40, 10):
            await asyncio.gather(
                *(end_a_job(here, Webhook(url=url)) for url in urls for _ in range(round_, round_ + 10))
            )
        ended = asyncio.get_running_loop().time()
        await cms.wait_for_requests(alive, seconds=30)
        took = asyncio.get_running_loop().time() - ended
    assert len({it.webhook_id for it in cms.requests}) == alive
    assert all(len(it.requests) <= 9 for it in (dead_1, dead_2, dead_3)), "they were left alone after a while"
    assert took < 15, f"{took:.1f} s after the last of them had been queued ({ended - begun:.1f} s)"


async def test_while_a_receiver_is_away_deliveries_wait_and_go_when_it_is_back(
    connection: Connection, store: Path
) -> None:
    limits = DeliveryLimits(circuit_breaker_failures=3, circuit_breaker_cooldown=timedelta(seconds=2))
    patient = replace(FAST_WEBHOOKS, retry_delays=(0, *[60] * 9), limits=limits)
    async with (
        run_webhook_endpoint() as cms,
        run_roles_in_process(connection, store, projector=True, webhooks=patient) as here,
    ):
        await cms.stop()
        first = [await end_a_job(here, Webhook(url=cms.url())) for _ in range(3)]
        for delivery_id in first:
            await here.wait_for_event(DeliveryAttempted, delivery_id)
        waiting = [await end_a_job(here, Webhook(url=cms.url())) for _ in range(20)]
        await cms.start()
        for delivery_id in waiting:
            done = await over(here, delivery_id)
            assert (done["status"], done["attempt"]) == ("delivered", 1)


async def test_a_standby_takes_over_what_the_leader_leaves(
    connection: Connection, store: Path, cms: WebhookEndpoint
) -> None:
    cms.script_responses("/hook", 500, 200)
    slow = replace(FAST_WEBHOOKS, retry_delays=(0, 2))
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, webhooks=slow) as first,
    ):
        delivery_id = await end_a_job(here, Webhook(url=cms.url()))
        await here.wait_for_event(DeliveryAttempted, delivery_id)
        async with run_roles_in_process(connection, store, webhooks=slow):
            assert first.webhooks_task is not None
            first.webhooks_task.cancel()
            await asyncio.gather(first.webhooks_task, return_exceptions=True)
            done = await over(here, delivery_id)
        actors = [it.meta.actor for it in await here.read_all_events() if it.type == "DeliveryAttempted"]
    assert (done["status"], len(cms.requests)) == ("delivered", 2)
    assert all(actor.startswith("webhooks:") for actor in actors)


async def test_what_is_on_its_way_at_shutdown_arrives_and_is_on_record(
    connection: Connection, store: Path, cms: WebhookEndpoint
) -> None:
    cms.script_responses("/hook", "hang")
    async with run_roles_in_process(connection, store, projector=True) as here:
        async with run_roles_in_process(connection, store, webhooks=FAST_WEBHOOKS):
            delivery_id = await end_a_job(here, Webhook(url=cms.url()))
            await cms.wait_for_requests(1)
        assert await here.read_event_types(delivery_id) == ["DeliveryQueued", "DeliveryAttempted"]
