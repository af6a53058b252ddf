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
from jobledger.ledger.domain.delivery import name_of
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliverySucceeded,
    Meta,
    Webhook,
)
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.net.webhook_signature import new_secret
from jobledger.ledger.store.command_handler import handle_new, new_batch_id, new_job_id
from jobledger.projections.views import deliveries
from jobledger.workers.webhooks.schedule import Limits
from tests.support.receiver import Receiver, receiver
from tests.support.running import IMPATIENT, Process, WorkerOptions, asked, process

OVER = (DeliverySucceeded, DeliveryAbandoned)


@pytest.fixture
async def cms() -> AsyncIterator[Receiver]:
    async with receiver() as found:
        yield found


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[Process]:
    async with process(connection, store, projector=True, webhooks=IMPATIENT) as found:
        yield found


async def end_a_job(here: Process, webhook: Webhook, **fields: Any) -> str:
    """Have a job end that has a webhook; return the id of the delivery."""
    job_id = await here.submit(webhook=webhook, **fields)
    [cancelled] = await here.do(job_id, CancelJob("somebody"))
    return name_of(job_id, cancelled.version)


async def over(here: Process, delivery_id: str, *, after: int = 0) -> Document:
    """Wait for the end of a delivery; return its document."""
    last = await here.heard(OVER, delivery_id, after=after)
    await here.views_reach(last.position)
    found = await deliveries.get(here.checkpoint.views, delivery_id)
    assert found is not None
    return found


async def test_an_end_is_told_at_once_with_what_it_was(here: Process, cms: Receiver) -> None:
    delivery_id = await end_a_job(here, Webhook(url=cms.url("/hook?token=1")), parameters={"extra": {"cms": 7}})
    done = await over(here, delivery_id)
    [request] = cms.received
    assert request.path == "/hook?token=1"
    assert request.webhook_id == delivery_id
    assert request.headers["content-type"] == "application/json"
    body = request.content
    assert (body["schema_version"], body["type"], body["sequence"]) == (1, "job.cancelled", 1)
    assert body["job"]["job_id"] == done["job_id"]
    assert body["job"]["parameters"] == {"extra": {"cms": 7}}
    assert body["job"]["status"] == "cancelled"
    assert done["status"] == "delivered"
    [attempt] = done["attempts"]
    assert (attempt["attempt"], attempt["status_code"], attempt["error"], attempt["response"]) == (1, 200, None, "ok")
    assert attempt["body_sha256"] == hashlib.sha256(request.body).hexdigest()


async def test_a_completed_job_brings_its_markdown_and_metadata_if_asked_for(
    connection: Connection, store: Path, cms: Receiver
) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions(), webhooks=IMPATIENT) as here:
        hooks = [
            Webhook(url=cms.url("/both"), include_markdown=True, include_metadata=True),
            Webhook(url=cms.url("/none")),
        ]
        for hook in hooks:
            await here.submit({"text": "Grüße"}, webhook=hook, job_name="cms-4711")
        await cms.until(2)
    [both], [none] = cms.at("/both"), cms.at("/none")
    assert both.content["type"] == "job.completed"
    assert both.content["job"]["job_name"] == "cms-4711"
    assert "Grüße" in both.content["markdown"]
    assert both.content["metadata"]["duration"] >= 0
    assert both.content["job"]["results"]["markdown_url"]
    assert not {"markdown", "metadata", "error"} & none.content.keys()


async def test_a_failed_job_says_why(connection: Connection, store: Path, cms: Receiver) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions(), webhooks=IMPATIENT) as here:
        await here.submit({"fail": "always"}, webhook=Webhook(url=cms.url()), max_attempts=1)
        [request] = await cms.until(1)
    assert request.content["type"] == "job.failed"
    assert request.content["error"]["message"]
    assert request.content["job"]["error"] == request.content["error"]


async def test_a_batch_is_told_once_when_all_have_ended_and_once_more_after_a_restart(
    connection: Connection, store: Path, cms: Receiver
) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions(), webhooks=IMPATIENT) as here:
        batch_id, job_ids = new_batch_id(), [new_job_id(), new_job_id()]
        batch = BatchSubmitted(
            batch_name="Tag 1", total_jobs=2, job_ids=job_ids, user_id="user-1", webhook=Webhook(url=cms.url())
        )
        submitted = [(job_id, SubmitJob(asked({"text": "x"}, batch_id=batch_id))) for job_id in job_ids]
        await handle_new(here.log, [(batch_id, SubmitBatch(batch)), *submitted], meta=Meta("test"))
        await cms.until(1)
        await here.do(job_ids[0], RestartJob("somebody"))
        first, second = await cms.until(2)
    assert first.content["type"] == second.content["type"] == "batch.completed"
    assert first.content["batch"]["completed_jobs"] == 2
    assert first.content["batch"]["job_ids"] == job_ids
    assert first.webhook_id != second.webhook_id
    assert (first.content["sequence"], second.content["sequence"]) == (1, 2)


async def test_failures_are_repeated_by_the_schedule_under_one_id_and_then_given_up(
    here: Process, cms: Receiver
) -> None:
    cms.answers("/hook", 500)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert done["status"] == "abandoned"
    assert [it["status_code"] for it in done["attempts"]] == [500] * 5
    assert [it["next_at"] is None for it in done["attempts"]] == [False] * 4 + [True]
    assert done["reason"] == done["attempts"][-1]["error"]["message"]
    pauses = [later.at - earlier.at for earlier, later in zip(cms.received, cms.received[1:], strict=False)]
    assert len(pauses) == 4
    assert all(pause >= 0.2 for pause in pauses)
    assert len({(it.webhook_id, it.body) for it in cms.received}) == 1


async def test_a_receiver_that_recovers_is_told(here: Process, cms: Receiver) -> None:
    cms.answers("/hook", 500, "reset", "hang", 204)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert done["status"] == "delivered"
    assert [it["status_code"] for it in done["attempts"]] == [500, None, None, 204]
    assert all(it["error"]["message"] for it in done["attempts"][:3])


async def test_gone_is_final(here: Process, cms: Receiver) -> None:
    cms.answers("/hook", 410)
    done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
    assert (done["status"], len(cms.received)) == ("abandoned", 1)


async def test_who_asks_for_time_gets_it(here: Process, cms: Receiver) -> None:
    cms.answers("/hook", (429, {"Retry-After": "1"}), 200)
    await over(here, await end_a_job(here, Webhook(url=cms.url())))
    first, second = cms.received
    assert 1.0 <= second.at - first.at < 3


async def test_header_values_and_signatures_come_from_where_secrets_are(
    connection: Connection, store: Path, cms: Receiver
) -> None:
    old, new = new_secret(), new_secret()
    async with process(connection, store, projector=True, webhooks=IMPATIENT) as here:
        kept = {"_id": "headers-1", "headers": {"Authorization": "Bearer s3cret"}, "secrets": [new, old]}
        await here.db.webhook_headers.insert_one(kept)
        own = Webhook(url=cms.url("/own"), header_names=["Authorization"], headers_ref="headers-1", signed=True)
        ended = [await end_a_job(here, own), await end_a_job(here, Webhook(url=cms.url("/all")))]
        for delivery_id in ended:
            await over(here, delivery_id)
        everything = str([it.data for it in await here.everything()])
        [endpoint] = await here.db.webhook_endpoints.find().to_list()
        of_all = endpoint["secret"]
    [request], [other] = cms.at("/own"), cms.at("/all")
    assert request.headers["authorization"] == "Bearer s3cret"
    for secret in (old, new):
        standardwebhooks.Webhook(secret).verify(request.body, request.headers)
    standardwebhooks.Webhook(of_all).verify(other.body, other.headers)
    for secret in (old, new, of_all, "s3cret"):
        assert secret not in everything
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(old).verify(request.body + b" ", request.headers)


async def test_secrets_that_were_removed_are_a_clear_failure(here: Process, cms: Receiver) -> None:
    hook = Webhook(url=cms.url(), header_names=["Authorization"], headers_ref="headers-gone")
    done = await over(here, await end_a_job(here, hook))
    assert done["status"] == "abandoned"
    assert done["attempts"][0]["error"]["code"] == "NOT_COMPOSED"
    assert not cms.received


async def test_each_receiver_has_numbers_of_its_own_without_a_gap(here: Process, cms: Receiver) -> None:
    for number in range(6):
        await end_a_job(here, Webhook(url=cms.url(f"/{number % 2}")), user_id="alice" if number < 4 else "bob")
    requests = await cms.until(6)
    numbers: dict[str, list[int]] = {}
    for request in requests:
        numbers.setdefault(request.content["receiver"], []).append(request.content["sequence"])
    assert sorted(sorted(it) for it in numbers.values()) == [[1], [1], [1, 2], [1, 2]]


async def test_what_was_given_up_or_delivered_is_sent_again_when_asked_for(here: Process, cms: Receiver) -> None:
    cms.answers("/hook", 410, 200)
    delivery_id = await end_a_job(here, Webhook(url=cms.url()))
    first = await over(here, delivery_id)
    assert first["status"] == "abandoned"
    for times in (2, 3):
        [again] = await here.do(delivery_id, RequeueDelivery("somebody"))
        done = await over(here, delivery_id, after=again.position)
        assert (done["status"], done["attempt"], len(cms.received)) == ("delivered", times, times)
    assert len({it.webhook_id for it in cms.received}) == 1


async def test_asked_for_while_it_is_on_its_way_it_is_sent_once_more(here: Process, cms: Receiver) -> None:
    cms.answers("/hook", "hang", 200)
    delivery_id = await end_a_job(here, Webhook(url=cms.url()))
    await cms.until(1)
    await here.do(delivery_id, RequeueDelivery("impatient"))
    done = await over(here, delivery_id)
    assert done["status"] == "delivered"
    assert [it["status_code"] for it in done["attempts"]] == [None, 200]


async def test_dead_receivers_hold_up_nobody(connection: Connection, store: Path) -> None:
    """Four hundred deliveries to ten receivers, of which three hang: the others have all of theirs within seconds."""
    alive = 280
    slow = replace(IMPATIENT, timeout_seconds=5, schedule=(0, 60), limits=Limits(silent_times=5))
    async with (
        receiver() as cms,
        receiver() as dead_1,
        receiver() as dead_2,
        receiver() as dead_3,
        process(connection, store, projector=True, webhooks=slow) as here,
    ):
        for dead in (dead_1, dead_2, dead_3):
            dead.answers("/hook", "hang")
        urls = [cms.url(f"/{number}") for number in range(7)] + [it.url() for it in (dead_1, dead_2, dead_3)]
        begun = asyncio.get_running_loop().time()
        for round_ in range(0, 40, 10):
            await asyncio.gather(
                *(end_a_job(here, Webhook(url=url)) for url in urls for _ in range(round_, round_ + 10))
            )
        ended = asyncio.get_running_loop().time()
        await cms.until(alive, seconds=30)
        took = asyncio.get_running_loop().time() - ended
    assert len({it.webhook_id for it in cms.received}) == alive
    assert all(len(it.received) <= 9 for it in (dead_1, dead_2, dead_3)), "they were left alone after a while"
    assert took < 15, f"{took:.1f} s after the last of them had been queued ({ended - begun:.1f} s)"


async def test_while_a_receiver_is_away_deliveries_wait_and_go_when_it_is_back(
    connection: Connection, store: Path
) -> None:
    limits = Limits(silent_times=3, first_rest=timedelta(seconds=0.5))
    patient = replace(IMPATIENT, schedule=(0, *[60] * 9), limits=limits)
    async with receiver() as cms, process(connection, store, projector=True, webhooks=patient) as here:
        await cms.close()
        first = [await end_a_job(here, Webhook(url=cms.url())) for _ in range(3)]
        for delivery_id in first:
            await here.heard(DeliveryAttempted, delivery_id)
        waiting = [await end_a_job(here, Webhook(url=cms.url())) for _ in range(20)]
        await cms.listen()
        for delivery_id in waiting:
            done = await over(here, delivery_id)
            assert (done["status"], done["attempt"]) == ("delivered", 1)


async def test_a_standby_takes_over_what_the_leader_leaves(connection: Connection, store: Path, cms: Receiver) -> None:
    cms.answers("/hook", 500, 200)
    slow = replace(IMPATIENT, schedule=(0, 2))
    async with (
        process(connection, store, projector=True) as here,
        process(connection, store, webhooks=slow) as first,
    ):
        delivery_id = await end_a_job(here, Webhook(url=cms.url()))
        await here.heard(DeliveryAttempted, delivery_id)
        async with process(connection, store, webhooks=slow):
            assert first.sending is not None
            first.sending.cancel()
            await asyncio.gather(first.sending, return_exceptions=True)
            done = await over(here, delivery_id)
        actors = [it.meta.actor for it in await here.everything() if it.type == "DeliveryAttempted"]
    assert (done["status"], len(cms.received)) == ("delivered", 2)
    assert all(actor.startswith("webhooks:") for actor in actors)


async def test_what_is_on_its_way_at_shutdown_arrives_and_is_on_record(
    connection: Connection, store: Path, cms: Receiver
) -> None:
    cms.answers("/hook", "hang")
    async with process(connection, store, projector=True) as here:
        async with process(connection, store, webhooks=IMPATIENT):
            delivery_id = await end_a_job(here, Webhook(url=cms.url()))
            await cms.until(1)
        assert await here.history(delivery_id) == ["DeliveryQueued", "DeliveryAttempted"]
