"""The rules of a delivery, and that an end queues it in its own transaction."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from jobledger.ledger.domain import delivery
from jobledger.ledger.domain.commands import (
    AbandonDelivery,
    CancelJob,
    ClaimJob,
    CompleteJob,
    FailAttempt,
    FinishBatch,
    RecordAttempt,
    ReopenBatch,
    RequeueDelivery,
    RestartJob,
    SubmitBatch,
    SubmitJob,
)
from jobledger.ledger.domain.delivery import Delivery, delivery_id_for, endpoint_id_for
from jobledger.ledger.domain.errors import InvalidState, NotFound
from jobledger.ledger.domain.events import (
    BatchCounts,
    BatchSubmitted,
    BatchSummary,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliveryQueued,
    DeliveryRequeued,
    DeliverySucceeded,
    Event,
    EventMetadata,
    Failure,
    Webhook,
)
from jobledger.ledger.store.command_handler import handle_command, load_stream_state, new_batch_id, new_job_id
from tests.support.decider_spec import given_for
from tests.support.event_examples import NOON, make_job_submitted, make_results
from tests.support.ledger_setup import Ledger

given = given_for(delivery)
HOOK = Webhook(url="https://cms.example/hook?token=1")
DOWN = Failure(code="HTTP_ERROR", message="The receiver answered 500.")
LATER = NOON + timedelta(minutes=5)

queued = DeliveryQueued(source="job-1", source_version=3, event_type="job.completed", user_id="alice", webhook=HOOK)
failed = DeliveryAttempted(attempt=1, status_code=500, error=DOWN, duration_s=1, body_sha256="a", next_attempt_at=LATER)
succeeded = DeliverySucceeded(attempt=1)
abandoned = DeliveryAbandoned(reason="gone")
requeued = DeliveryRequeued(by="bob", reason="again")


def attempt(number: int, **fields: Any) -> DeliveryAttempted:
    return DeliveryAttempted(attempt=number, duration_s=1, body_sha256="a", **fields)


def record(**fields: Any) -> RecordAttempt:
    return RecordAttempt(1, "a", **fields)


# The rules --------------------------------------------------------------------------------------------------------


def test_a_confirmed_attempt_ends_it() -> None:
    given(queued).when(record(status_code=200)).then(attempt(1, status_code=200), succeeded)


def test_a_failed_attempt_is_repeated_when_it_says() -> None:
    given(queued).when(record(status_code=500, error=DOWN, next_attempt_at=LATER)).then(failed)


def test_the_last_failed_attempt_gives_up_and_says_why() -> None:
    last = attempt(2, status_code=500, error=DOWN)
    given(queued, failed).when(record(status_code=500, error=DOWN)).then(last, DeliveryAbandoned(reason=DOWN.message))


def test_what_is_sent_after_the_end_is_on_record_and_changes_nothing() -> None:
    for ends in ([attempt(1, status_code=200), succeeded], [failed, abandoned]):
        given(queued, *ends).when(record(error=DOWN, next_attempt_at=LATER)).then(attempt(2, error=DOWN))


def test_a_receiver_that_confirms_what_was_given_up_has_it_delivered() -> None:
    given(queued, failed, abandoned).when(record(status_code=204)).then(
        attempt(2, status_code=204), DeliverySucceeded(attempt=2)
    )
    given(queued, attempt(1, status_code=200), succeeded).when(record(status_code=200)).then(
        attempt(2, status_code=200)
    )


def test_it_can_be_asked_for_again_in_every_state() -> None:
    for before in ([], [failed], [failed, abandoned], [attempt(1, status_code=200), succeeded]):
        given(queued, *before).when(RequeueDelivery("bob", "again")).then(requeued)


def test_asked_for_again_its_schedule_begins_anew_but_attempts_are_numbered_on() -> None:
    state: Delivery | None = None
    events: list[Any] = [queued, failed, abandoned, requeued]
    for event in events:
        state = delivery.evolve(state, event)
    assert state is not None
    assert (state.status, state.attempt, state.counted_attempts, state.due_at) == ("pending", 1, 0, None)


def test_only_what_is_pending_is_given_up() -> None:
    given(queued, failed).when(AbandonDelivery("gone")).then(abandoned)
    given(queued, failed, abandoned).when(AbandonDelivery("gone")).then_rejected(InvalidState)
    given().when(AbandonDelivery("gone")).then_rejected(NotFound)


def test_receivers_differ_by_user_and_by_address() -> None:
    assert endpoint_id_for("alice", "https://a") == endpoint_id_for("alice", "https://a")
    assert len({endpoint_id_for(*it) for it in (("alice", "xx"), ("alicex", "x"), ("bob", "xx"), ("alice", "xy"))}) == 4


# Ends -------------------------------------------------------------------------------------------------------------


async def do(ledger: Ledger, stream: str, *commands: Any) -> list[Event]:
    return [
        it.event
        for command in commands
        for it in (await handle_command(ledger.event_store, stream, command, meta=EventMetadata())).events
    ]


async def deliveries(ledger: Ledger, stream: str) -> list[DeliveryQueued]:
    parts = ledger.event_store.iterate_stream_batches([delivery_id_for(stream, version) for version in range(1, 12)])
    return [it.event async for events in parts for it in events if isinstance(it.event, DeliveryQueued)]


async def test_each_end_of_a_job_queues_one_delivery_of_its_own(ledger: Ledger) -> None:
    job_id = new_job_id()
    await do(
        ledger,
        job_id,
        SubmitJob(make_job_submitted(webhook=HOOK)),
        ClaimJob("w", NOON),
        CompleteJob("w", 1, make_results()),
    )
    await do(ledger, job_id, RestartJob("bob"), ClaimJob("w", NOON), FailAttempt("w", 2, DOWN, None))
    await do(ledger, job_id, RestartJob("bob"), CancelJob("bob"))
    told = await deliveries(ledger, job_id)
    assert [(it.event_type, it.source_version) for it in told] == [
        ("job.completed", 3),
        ("job.failed", 6),
        ("job.cancelled", 8),
    ]
    assert all(it.source == job_id and it.webhook == HOOK and it.user_id == "alice" for it in told)


async def test_the_end_and_its_delivery_are_written_together(ledger: Ledger) -> None:
    job_id = new_job_id()
    await do(ledger, job_id, SubmitJob(make_job_submitted(webhook=HOOK)), ClaimJob("w", NOON))
    handled = await handle_command(
        ledger.event_store, job_id, CompleteJob("w", 1, make_results()), meta=EventMetadata()
    )
    [end] = handled.events
    assert handled.stream_state.head.version == 3
    [queued_] = await ledger.event_store.read_stream(delivery_id_for(job_id, 3))
    assert queued_.position == end.position + 1


async def test_an_attempt_that_is_repeated_and_a_job_without_a_webhook_tell_nobody(ledger: Ledger) -> None:
    with_hook, without = new_job_id(), new_job_id()
    await do(
        ledger,
        with_hook,
        SubmitJob(make_job_submitted(webhook=HOOK)),
        ClaimJob("w", NOON),
        FailAttempt("w", 1, DOWN, LATER),
    )
    await do(ledger, without, SubmitJob(make_job_submitted()), CancelJob("bob"))
    assert await deliveries(ledger, with_hook) == await deliveries(ledger, without) == []


@pytest.mark.parametrize(
    ("counts", "event_type"),
    [
        (BatchCounts(completed=2), "batch.completed"),
        (BatchCounts(completed=1, failed=1), "batch.partial"),
        (BatchCounts(failed=2), "batch.failed"),
    ],
)
async def test_each_end_of_a_batch_queues_one(ledger: Ledger, counts: BatchCounts, event_type: str) -> None:
    batch_id = new_batch_id()
    batch = BatchSubmitted(total_jobs=2, job_ids=["job-1", "job-2"], user_id="alice", webhook=HOOK)
    finish = FinishBatch(counts, BatchSummary())
    await do(ledger, batch_id, SubmitBatch(batch), finish, finish, ReopenBatch(), finish)
    told = await deliveries(ledger, batch_id)
    assert [(it.event_type, it.source_version, it.batch_id) for it in told] == [
        (event_type, 2, batch_id),
        (event_type, 4, batch_id),
    ]


async def test_of_many_that_end_a_job_at_once_one_does_and_one_is_told(ledger: Ledger) -> None:
    job_id = new_job_id()
    await do(ledger, job_id, SubmitJob(make_job_submitted(webhook=HOOK)))
    known = await load_stream_state(ledger.event_store, job_id)
    await asyncio.gather(
        *(
            handle_command(
                ledger.event_store, job_id, CancelJob(f"user-{number}"), meta=EventMetadata(), stream_state=known
            )
            for number in range(8)
        ),
        return_exceptions=True,
    )
    assert [it.event_type for it in await deliveries(ledger, job_id)] == ["job.cancelled"]
