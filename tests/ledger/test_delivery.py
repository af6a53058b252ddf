"""The delivery decider, and the deliveries that the end of a job or batch queues in its own commit."""

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
    FailAttempt,
    FinishBatch,
    RecordAttempt,
    ReopenBatch,
    RequeueDelivery,
    RestartJob,
    SubmitBatch,
    SubmitJob,
)
from jobledger.ledger.domain.delivery import Delivery, build_delivery_id, build_endpoint_id
from jobledger.ledger.domain.errors import InvalidState, NotFound
from jobledger.ledger.domain.events import (
    BatchJobCounts,
    BatchSubmitted,
    BatchSummary,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliveryQueued,
    DeliveryRequeued,
    DeliverySucceeded,
    ErrorInfo,
    Event,
    EventMetadata,
    Webhook,
)
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id, handle_command, load_stream_state
from tests.support.decider_spec import given_for
from tests.support.event_examples import NOON, make_job_submitted, make_results
from tests.support.ledger_setup import Ledger
from tests.support.worker_reports import report_results

given = given_for(delivery)
WEBHOOK = Webhook(url="https://cms.example/hook?token=1")
DOWN = ErrorInfo(code="HTTP_ERROR", message="The endpoint answered 500.")
LATER = NOON + timedelta(minutes=5)

queued = DeliveryQueued(source="job-1", source_version=3, event_type="job.completed", user_id="alice", webhook=WEBHOOK)
failed = DeliveryAttempted(attempt=1, status_code=500, error=DOWN, duration_s=1, body_sha256="a", next_attempt_at=LATER)
succeeded = DeliverySucceeded(attempt=1)
abandoned = DeliveryAbandoned(reason="gone")
requeued = DeliveryRequeued(by="user:bob", reason="again")


def make_attempt(number: int, **fields: Any) -> DeliveryAttempted:
    return DeliveryAttempted(attempt=number, duration_s=1, body_sha256="a", **fields)


def make_record_command(**fields: Any) -> RecordAttempt:
    return RecordAttempt(1, "a", **fields)


# Decider ----------------------------------------------------------------------------------------------------------


def test_successful_attempt_ends_delivery() -> None:
    given(queued).when(make_record_command(status_code=200)).then(make_attempt(1, status_code=200), succeeded)


def test_failed_attempt_keeps_next_attempt_time() -> None:
    given(queued).when(make_record_command(status_code=500, error=DOWN, next_attempt_at=LATER)).then(failed)


def test_last_failed_attempt_abandons_delivery_with_reason() -> None:
    last = make_attempt(2, status_code=500, error=DOWN)
    given(queued, failed).when(make_record_command(status_code=500, error=DOWN)).then(
        last, DeliveryAbandoned(reason=DOWN.message)
    )


def test_failed_attempt_after_end_is_recorded_only() -> None:
    for ending in ([make_attempt(1, status_code=200), succeeded], [failed, abandoned]):
        given(queued, *ending).when(make_record_command(error=DOWN, next_attempt_at=LATER)).then(
            make_attempt(2, error=DOWN)
        )


def test_success_after_abandonment_marks_delivery_succeeded() -> None:
    given(queued, failed, abandoned).when(make_record_command(status_code=204)).then(
        make_attempt(2, status_code=204), DeliverySucceeded(attempt=2)
    )
    given(queued, make_attempt(1, status_code=200), succeeded).when(make_record_command(status_code=200)).then(
        make_attempt(2, status_code=200)
    )


def test_requeue_in_any_state_succeeds() -> None:
    for before in ([], [failed], [failed, abandoned], [make_attempt(1, status_code=200), succeeded]):
        given(queued, *before).when(RequeueDelivery("user:bob", "again")).then(requeued)


def test_requeue_resets_schedule_and_keeps_attempt_numbers() -> None:
    state: Delivery | None = None
    events: list[Any] = [queued, failed, abandoned, requeued]
    for event in events:
        state = delivery.evolve(state, event)
    assert state is not None
    assert (state.status, state.attempt, state.counted_attempts, state.due_at) == ("pending", 1, 0, None)


def test_abandon_is_rejected_unless_pending() -> None:
    given(queued, failed).when(AbandonDelivery("gone")).then(abandoned)
    given(queued, failed, abandoned).when(AbandonDelivery("gone")).then_rejected(InvalidState)
    given().when(AbandonDelivery("gone")).then_rejected(NotFound)


def test_endpoint_id_differs_by_user_and_url() -> None:
    assert build_endpoint_id("alice", "https://a") == build_endpoint_id("alice", "https://a")
    assert (
        len(
            {
                build_endpoint_id(*owner_and_url)
                for owner_and_url in (("alice", "xx"), ("alicex", "x"), ("bob", "xx"), ("alice", "xy"))
            }
        )
        == 4
    )


# Queueing ---------------------------------------------------------------------------------------------------------


async def run_commands(ledger: Ledger, stream: str, *commands: Any) -> list[Event]:
    return [
        recorded.event
        for command in commands
        for recorded in (await handle_command(ledger.event_store, stream, command, meta=EventMetadata())).events
    ]


async def load_deliveries(ledger: Ledger, stream: str) -> list[DeliveryQueued]:
    parts = ledger.event_store.iterate_stream_batches([build_delivery_id(stream, version) for version in range(1, 12)])
    return [
        recorded.event async for events in parts for recorded in events if isinstance(recorded.event, DeliveryQueued)
    ]


async def test_each_end_of_job_queues_one_delivery(ledger: Ledger) -> None:
    job_id = create_job_id()
    await run_commands(
        ledger,
        job_id,
        SubmitJob(make_job_submitted(webhook=WEBHOOK)),
        ClaimJob("w", NOON),
        report_results("w", 1, make_results()),
    )
    await run_commands(ledger, job_id, RestartJob("user:bob"), ClaimJob("w", NOON), FailAttempt("w", 2, DOWN, None))
    await run_commands(ledger, job_id, RestartJob("user:bob"), CancelJob("user:bob"))
    queued_deliveries = await load_deliveries(ledger, job_id)
    assert [(queued_event.event_type, queued_event.source_version) for queued_event in queued_deliveries] == [
        ("job.completed", 3),
        ("job.failed", 6),
        ("job.cancelled", 8),
    ]
    assert all(
        queued_event.source == job_id and queued_event.webhook == WEBHOOK and queued_event.user_id == "alice"
        for queued_event in queued_deliveries
    )


async def test_job_end_and_delivery_are_in_one_commit(ledger: Ledger) -> None:
    job_id = create_job_id()
    await run_commands(ledger, job_id, SubmitJob(make_job_submitted(webhook=WEBHOOK)), ClaimJob("w", NOON))
    handled = await handle_command(
        ledger.event_store, job_id, report_results("w", 1, make_results()), meta=EventMetadata()
    )
    [end] = handled.events
    assert handled.stream_state.head.version == 3
    [delivery_event] = await ledger.event_store.read_stream(build_delivery_id(job_id, 3))
    assert delivery_event.position == end.position + 1


async def test_retried_attempt_or_job_without_webhook_queues_nothing(ledger: Ledger) -> None:
    job_with_webhook, job_without_webhook = create_job_id(), create_job_id()
    await run_commands(
        ledger,
        job_with_webhook,
        SubmitJob(make_job_submitted(webhook=WEBHOOK)),
        ClaimJob("w", NOON),
        FailAttempt("w", 1, DOWN, LATER),
    )
    await run_commands(ledger, job_without_webhook, SubmitJob(make_job_submitted()), CancelJob("user:bob"))
    assert await load_deliveries(ledger, job_with_webhook) == await load_deliveries(ledger, job_without_webhook) == []


@pytest.mark.parametrize(
    ("counts", "event_type"),
    [
        (BatchJobCounts(completed=2), "batch.completed"),
        (BatchJobCounts(completed=1, failed=1), "batch.partial"),
        (BatchJobCounts(failed=2), "batch.failed"),
    ],
)
async def test_each_end_of_batch_queues_one_delivery(ledger: Ledger, counts: BatchJobCounts, event_type: str) -> None:
    batch_id = create_batch_id()
    batch = BatchSubmitted(total_jobs=2, job_ids=["job-1", "job-2"], user_id="alice", webhook=WEBHOOK)
    finish = FinishBatch(counts, BatchSummary())
    await run_commands(ledger, batch_id, SubmitBatch(batch), finish, finish, ReopenBatch(), finish)
    queued_deliveries = await load_deliveries(ledger, batch_id)
    assert [
        (queued_event.event_type, queued_event.source_version, queued_event.batch_id)
        for queued_event in queued_deliveries
    ] == [
        (event_type, 2, batch_id),
        (event_type, 4, batch_id),
    ]


async def test_concurrent_cancels_queue_one_delivery(ledger: Ledger) -> None:
    job_id = create_job_id()
    await run_commands(ledger, job_id, SubmitJob(make_job_submitted(webhook=WEBHOOK)))
    stream_state = await load_stream_state(ledger.event_store, job_id)
    await asyncio.gather(
        *(
            handle_command(
                ledger.event_store, job_id, CancelJob(f"user-{number}"), meta=EventMetadata(), stream_state=stream_state
            )
            for number in range(8)
        ),
        return_exceptions=True,
    )
    assert [queued_event.event_type for queued_event in await load_deliveries(ledger, job_id)] == ["job.cancelled"]
