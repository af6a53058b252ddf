"""The command handler: it decides on current state, and decides again after a version conflict."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    ExpireLease,
    PauseBatch,
    ReportEvent,
    RestartJob,
    SubmitBatch,
    SubmitJob,
)
from jobledger.ledger.domain.errors import (
    AlreadyExists,
    InvalidEvent,
    InvalidState,
    LedgerUnavailable,
    NotFound,
    StreamBusy,
    VersionConflict,
)
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    EventMetadata,
    JobAccessChanged,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    RecordedEvent,
    Webhook,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import (
    Command,
    CommandRequest,
    CommandResult,
    StreamState,
    create_batch_id,
    create_job_id,
    create_streams,
    decider_for,
    handle_command,
    handle_command_with_retries,
    handle_commands,
    load_stream_state,
)
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import ACCESS, NOON, make_job_submitted, make_results
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_log, collect_outcomes, load_event_documents
from tests.support.worker_reports import report_progress, report_results

CLOCK_ERROR = timedelta(seconds=1)
"""Events have the estimated server time. Its error is up to half a round trip, which is long on a busy machine."""


async def submit_job(event_store: EventStore, max_attempts: int = 3) -> tuple[str, StreamState]:
    job_id = create_job_id()
    return job_id, (
        await handle_command(
            event_store, job_id, SubmitJob(make_job_submitted(max_attempts=max_attempts)), meta=EVENT_METADATA
        )
    ).stream_state


async def test_handle_command_returns_events_and_new_stream_state(unstreamed_ledger: Ledger) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
    before = datetime.now(UTC)
    handled = await handle_command(
        unstreamed_ledger.event_store,
        job_id,
        ClaimJob("w1", NOON),
        meta=EventMetadata("worker:w1"),
        stream_state=stream_state,
    )
    [event] = handled.events
    assert event.event == JobClaimed(worker_id="w1", attempt=1)
    assert (event.position, event.version, event.meta.actor) == (2, 2, "worker:w1")
    assert before - CLOCK_ERROR <= event.time <= datetime.now(UTC) + CLOCK_ERROR
    assert handled.stream_state == await load_stream_state(unstreamed_ledger.event_store, job_id)
    assert handled.stream_state.head == StreamHead(2, 2, event.hash)
    assert isinstance(handled.stream_state.aggregate, Job)
    assert handled.stream_state.aggregate.status == "processing"


async def test_command_without_events_appends_nothing(unstreamed_ledger: Ledger) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
    handled = await handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
    assert handled.events == []
    assert handled.stream_state == stream_state
    assert await unstreamed_ledger.event_store.read_head_position() == 1


async def test_rejected_command_appends_nothing(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submit_job(unstreamed_ledger.event_store)
    with pytest.raises(AlreadyExists):
        await handle_command(
            unstreamed_ledger.event_store, job_id, SubmitJob(make_job_submitted()), meta=EVENT_METADATA
        )
    with pytest.raises(NotFound):
        await handle_command(
            unstreamed_ledger.event_store, create_job_id(), CancelJob("user:alice"), meta=EVENT_METADATA
        )
    assert await unstreamed_ledger.event_store.read_head_position() == 1


async def test_version_conflict_is_decided_again_on_current_state(unstreamed_ledger: Ledger) -> None:
    job_id, stale_state = await submit_job(unstreamed_ledger.event_store)
    await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    cancelled = await handle_command(
        unstreamed_ledger.event_store, job_id, CancelJob("user:alice"), meta=EVENT_METADATA, stream_state=stale_state
    )
    assert [event.event for event in cancelled.events] == [JobCancelRequested(by="user:alice")]
    assert cancelled.stream_state == await load_stream_state(unstreamed_ledger.event_store, job_id)
    with pytest.raises(InvalidState):
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w2", NOON), meta=EVENT_METADATA, stream_state=stale_state
        )
    check_log(await load_event_documents(unstreamed_ledger.db))


async def handle_with_retries(
    event_store: EventStore, stream: str, command: Command, stream_state: StreamState
) -> tuple[CommandResult, list[Exception]]:
    """Handle a command with immediate retries. Return its result and the error before each retry."""
    errors: list[Exception] = []
    result = await handle_command_with_retries(
        event_store,
        stream,
        command,
        meta=EVENT_METADATA,
        stream_state=stream_state,
        retry_seconds=0,
        on_retry=errors.append,
    )
    return result, errors


async def test_command_for_a_busy_stream_is_retried_later(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody who may change a job can make its stream busy. That must not cost its worker an event."""
    event_store = unstreamed_ledger.event_store
    job_id, _ = await submit_job(event_store)
    claimed = await handle_command(event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    append, changes = event_store.append, 0

    async def append_after_another(*appends: StreamAppend) -> list[RecordedEvent]:
        nonlocal changes
        if changes < 65:
            changes += 1
            current = await load_stream_state(event_store, job_id)
            change = JobAccessChanged(by=f"user:{changes}", access_control=ACCESS)
            await append(StreamAppend(job_id, current.head, [change], EVENT_METADATA, NOON))
        return await append(*appends)

    monkeypatch.setattr(event_store, "append", append_after_another)
    command = report_results("w1", 1, make_results())
    with pytest.raises(StreamBusy, match=f"appended to {job_id} first, 20 times"):
        await handle_command(event_store, job_id, command, meta=EVENT_METADATA)
    result, retries = await handle_with_retries(event_store, job_id, command, claimed.stream_state)
    assert [type(error) for error in retries] == [StreamBusy, StreamBusy]
    assert [event.type for event in result.events] == ["JobCompleted"]
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_second_submission_with_stale_state_is_rejected(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, _ = await submit_job(unstreamed_ledger.event_store)
    with pytest.raises(AlreadyExists):
        await handle_command(
            unstreamed_ledger.event_store,
            job_id,
            SubmitJob(make_job_submitted()),
            meta=EVENT_METADATA,
            stream_state=StreamState(),
        )


async def test_concurrent_claims_succeed_once(unstreamed_ledger: Ledger) -> None:
    for _ in range(5):
        job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
        claims = [
            handle_command(
                unstreamed_ledger.event_store,
                job_id,
                ClaimJob(f"w{n}", NOON),
                meta=EVENT_METADATA,
                stream_state=stream_state if n % 2 else None,
            )
            for n in range(12)
        ]
        results = await asyncio.gather(*claims, return_exceptions=True)
        assert sum(isinstance(answer, InvalidState) for answer in results) == 11
        assert [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)] == [
            "JobSubmitted",
            "JobClaimed",
        ]


async def test_concurrent_lease_expiries_take_effect_once(unstreamed_ledger: Ledger) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store, max_attempts=1)
    await handle_command(
        unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=stream_state
    )
    results = await asyncio.gather(
        *(
            handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
            for _ in range(8)
        )
    )
    assert sorted(len(handled.events) for handled in results) == [0] * 7 + [2]
    types = [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)]
    assert types == ["JobSubmitted", "JobClaimed", "JobLeaseExpired", "JobFailed"]
    assert {handled.stream_state.head.version for handled in results} == {4}


async def test_report_of_replaced_worker_is_recorded_as_fenced(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
    replaced_state = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=stream_state
        )
    ).stream_state
    await handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
    await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w2", NOON), meta=EVENT_METADATA)
    late_report = await handle_command(
        unstreamed_ledger.event_store,
        job_id,
        report_results("w1", 1, make_results()),
        meta=EVENT_METADATA,
        stream_state=replaced_state,
    )
    assert [event.event for event in late_report.events] == [
        WorkerFenced(worker_id="w1", attempt=1, rejected_event="JobCompleted")
    ]
    completed = await handle_command(
        unstreamed_ledger.event_store, job_id, report_results("w2", 2, make_results()), meta=EVENT_METADATA
    )
    assert [event.type for event in completed.events] == ["JobCompleted"]
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_concurrent_completion_and_expiry_have_one_outcome(unstreamed_ledger: Ledger) -> None:
    for _ in range(10):
        job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
        stream_state = (
            await handle_command(
                unstreamed_ledger.event_store,
                job_id,
                ClaimJob("w1", NOON),
                meta=EVENT_METADATA,
                stream_state=stream_state,
            )
        ).stream_state
        complete = handle_command(
            unstreamed_ledger.event_store,
            job_id,
            report_results("w1", 1, make_results()),
            meta=EVENT_METADATA,
            stream_state=stream_state,
        )
        expire = handle_command(
            unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA, stream_state=stream_state
        )
        await asyncio.gather(complete, expire)
        types = [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)][2:]
        assert types in (["JobCompleted"], ["JobLeaseExpired", "WorkerFenced"])


async def test_concurrent_cancel_and_claim_both_take_effect(unstreamed_ledger: Ledger) -> None:
    for _ in range(10):
        job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
        claim = handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=stream_state
        )
        cancel = handle_command(
            unstreamed_ledger.event_store,
            job_id,
            CancelJob("user:alice"),
            meta=EVENT_METADATA,
            stream_state=stream_state,
        )
        claimed, _ = await asyncio.gather(claim, cancel, return_exceptions=True)
        events = [event.event for event in await unstreamed_ledger.event_store.read_stream(job_id)][1:]
        if isinstance(claimed, InvalidState):
            assert events == [JobCancelled(by="user:alice")]
        else:
            assert events == [JobClaimed(worker_id="w1", attempt=1), JobCancelRequested(by="user:alice")]


async def test_returned_stream_states_equal_stored_state(unstreamed_ledger: Ledger) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
    stream_state = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=stream_state
        )
    ).stream_state
    for percent in range(5):
        report = report_progress("w1", 1, "page", float(percent), "")
        stream_state = (
            await handle_command(
                unstreamed_ledger.event_store, job_id, report, meta=EVENT_METADATA, stream_state=stream_state
            )
        ).stream_state
    assert stream_state.head.version == 7
    assert stream_state == await load_stream_state(unstreamed_ledger.event_store, job_id)
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_invalid_event_raises_to_caller(unstreamed_ledger: Ledger) -> None:
    job_id, stream_state = await submit_job(unstreamed_ledger.event_store)
    stream_state = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=stream_state
        )
    ).stream_state
    with pytest.raises(InvalidEvent):
        await handle_command(
            unstreamed_ledger.event_store,
            job_id,
            report_progress("w1", 1, "page", float("nan"), ""),
            meta=EVENT_METADATA,
            stream_state=stream_state,
        )


async def test_create_streams_appends_batch_and_jobs_in_given_order(unstreamed_ledger: Ledger) -> None:
    batch_id, job_ids = create_batch_id(), [create_job_id() for _ in range(300)]
    batch = BatchSubmitted(total_jobs=300, job_ids=job_ids, user_id="alice")
    jobs = [(job_id, SubmitJob(make_job_submitted(batch_id=batch_id))) for job_id in job_ids]
    recorded = await create_streams(
        unstreamed_ledger.event_store, [(batch_id, SubmitBatch(batch)), *jobs], meta=EVENT_METADATA
    )
    assert [event.stream for event in recorded] == [batch_id, *job_ids]
    assert [event.position for event in recorded] == list(range(1, 302))
    paused = await handle_command(
        unstreamed_ledger.event_store, batch_id, PauseBatch("user:alice"), meta=EVENT_METADATA
    )
    assert [event.type for event in paused.events] == ["BatchPaused"]
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_create_streams_with_rejection_or_conflict_appends_nothing(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submit_job(unstreamed_ledger.event_store)
    with pytest.raises(NotFound):
        await create_streams(
            unstreamed_ledger.event_store,
            [(create_job_id(), SubmitJob(make_job_submitted())), (create_job_id(), Archive("user:a"))],
            meta=EVENT_METADATA,
        )
    fresh = create_job_id()
    with pytest.raises(VersionConflict):
        await create_streams(
            unstreamed_ledger.event_store,
            [(fresh, SubmitJob(make_job_submitted())), (job_id, SubmitJob(make_job_submitted()))],
            meta=EVENT_METADATA,
        )
    assert await unstreamed_ledger.event_store.read_stream(fresh) == []


async def test_new_ids_are_unique_and_select_their_decider() -> None:
    ids = {create_job_id() for _ in range(100)} | {create_batch_id() for _ in range(100)}
    assert len(ids) == 200
    assert {decider_for(name).__name__ for name in ids} == {  # type: ignore[attr-defined]  # modules
        "jobledger.ledger.domain.job",
        "jobledger.ledger.domain.batch",
    }


def test_decider_for_unknown_stream_raises() -> None:
    for name in ("void", "invoice-1", ""):
        with pytest.raises(LookupError):
            decider_for(name)


async def test_concurrent_changes_are_all_recorded(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submit_job(unstreamed_ledger.event_store)
    await asyncio.gather(
        *(
            handle_command(
                unstreamed_ledger.event_store, job_id, ChangeAccess(f"user:{n}", ACCESS), meta=EVENT_METADATA
            )
            for n in range(12)
        )
    )
    events = await unstreamed_ledger.event_store.read_stream(job_id)
    assert [event.version for event in events] == list(range(1, 14))


async def test_rejection_on_stale_state_is_decided_again(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, pending_state = await submit_job(unstreamed_ledger.event_store)
    await handle_command(unstreamed_ledger.event_store, job_id, CancelJob("user:me"), meta=EVENT_METADATA)
    restarted = await handle_command(
        unstreamed_ledger.event_store, job_id, RestartJob("user:me"), meta=EVENT_METADATA, stream_state=pending_state
    )  # a pending job cannot be restarted
    assert [event.type for event in restarted.events] == ["JobRestarted"]
    claimed = await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    expired = await handle_command(
        unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA, stream_state=pending_state
    )  # a pending job has no lease
    assert [event.type for event in expired.events] == ["JobLeaseExpired"]
    assert expired.events[0].version == claimed.stream_state.head.version + 1
    with pytest.raises(InvalidState):
        await handle_command(
            unstreamed_ledger.event_store,
            job_id,
            RestartJob("user:me"),
            meta=EVENT_METADATA,
            stream_state=pending_state,
        )


@pytest.mark.parametrize("is_stale", [False, True], ids=["current state", "after a version conflict"])
@pytest.mark.parametrize("written", ["never", "before the retry", "during the retry"])
@pytest.mark.parametrize(
    "command",
    [report_progress("w1", 1, "read", 50, "half"), report_results("w1", 1, make_results())],
    ids=["report", "end"],
)
async def test_command_with_lost_response_takes_effect_once(
    unstreamed_ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    command: ReportEvent,
    written: str,
    is_stale: bool,
) -> None:
    event_store = unstreamed_ledger.event_store
    job_id, _ = await submit_job(event_store)
    claimed = await handle_command(event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    if is_stale:
        await handle_command(event_store, job_id, ChangeAccess("user:me", ACCESS), meta=EVENT_METADATA)
    append = event_store.append
    lost_responses: list[tuple[StreamAppend, ...]] = []

    async def lose_first_response(*appends: StreamAppend) -> list[RecordedEvent]:
        if not lost_responses and (not is_stale or appends[0].head.version > claimed.stream_state.head.version):
            lost_responses.append(appends)
            if written == "before the retry":
                await append(*appends)
            raise LedgerUnavailable("the connection was lost")
        if lost_responses and written == "during the retry":
            with suppress(VersionConflict):
                await append(*lost_responses[0])  # the server has still been executing it
        return await append(*appends)

    monkeypatch.setattr(event_store, "append", lose_first_response)
    result, retries = await handle_with_retries(event_store, job_id, command, claimed.stream_state)
    assert len(retries) == len(lost_responses) == 1
    stored = await event_store.read_stream(job_id, after_version=claimed.stream_state.head.version)
    expected = type(command.event).__name__
    assert [event.type for event in stored] == ["JobAccessChanged"] * is_stale + [expected]
    assert result.events == stored[-1:]
    assert result.stream_state == await load_stream_state(event_store, job_id)


async def test_command_with_lost_response_waits_until_its_outcome_can_be_read(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the command were repeated first, its worker would be fenced: the job has ended."""
    event_store = unstreamed_ledger.event_store
    job_id, _ = await submit_job(event_store)
    claimed = await handle_command(event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    append, read_stream = event_store.append, event_store.read_stream

    async def lose_response(*appends: StreamAppend) -> list[RecordedEvent]:
        await append(*appends)
        monkeypatch.setattr(event_store, "append", append)
        raise LedgerUnavailable("the connection was lost")

    async def fail_once(*arguments: Any, **options: Any) -> list[RecordedEvent]:
        monkeypatch.setattr(event_store, "read_stream", read_stream)
        raise LedgerUnavailable("the connection was lost")

    monkeypatch.setattr(event_store, "append", lose_response)
    monkeypatch.setattr(event_store, "read_stream", fail_once)
    result, retries = await handle_with_retries(
        event_store, job_id, report_results("w1", 1, make_results()), claimed.stream_state
    )
    stored = await event_store.read_stream(job_id)
    assert [event.type for event in stored] == ["JobSubmitted", "JobClaimed", "JobCompleted"]
    assert result.events == stored[-1:]
    assert len(retries) == 2


# Many commands --------------------------------------------------------------------------------------------------------


async def test_handle_commands_handles_each_command_independently(unstreamed_ledger: Ledger) -> None:
    store = unstreamed_ledger.event_store
    jobs = [await submit_job(store) for _ in range(4)]
    claimed = await handle_command(store, jobs[1][0], ClaimJob("w2", NOON), meta=EVENT_METADATA)
    await handle_command(store, jobs[2][0], ClaimJob("w2", NOON), meta=EVENT_METADATA)
    requests = [
        CommandRequest(jobs[0][0], ClaimJob("w1", NOON), jobs[0][1]),
        CommandRequest(jobs[1][0], ClaimJob("w1", NOON), claimed.stream_state),
        CommandRequest(jobs[2][0], ClaimJob("w1", NOON), jobs[2][1]),
        CommandRequest(jobs[3][0], ClaimJob("w1", NOON), jobs[3][1]),
    ]
    first, rejected, conflict, last = await collect_outcomes(handle_commands(store, requests, meta=EVENT_METADATA))
    assert rejected is None
    assert isinstance(conflict, VersionConflict)
    for result, (job_id, _) in ((first, jobs[0]), (last, jobs[3])):
        assert isinstance(result, CommandResult)
        assert [event.event for event in result.events] == [JobClaimed(worker_id="w1", attempt=1)]
        assert result.stream_state == await load_stream_state(store, job_id)
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_handle_commands_leaves_commands_with_deliveries_to_the_caller(unstreamed_ledger: Ledger) -> None:
    store = unstreamed_ledger.event_store
    job = make_job_submitted(webhook=Webhook(url="https://example.org/hook"))
    job_id = (await unstreamed_ledger.submit_job(job)).events[0].stream
    claimed = await handle_command(store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    request = CommandRequest(job_id, report_results("w1", 1, make_results()), claimed.stream_state)
    assert await collect_outcomes(handle_commands(store, [request], meta=EVENT_METADATA)) == [None]
    assert len(await store.read_stream(job_id)) == 2


@pytest.mark.parametrize("is_written", [True, False])
async def test_retry_after_unknown_outcome_of_handle_commands_takes_effect_once(
    unstreamed_ledger: Ledger, is_written: bool
) -> None:
    store = unstreamed_ledger.event_store
    job_id, stream_state = await submit_job(store)
    command = ClaimJob("w1", NOON)
    if is_written:
        request = CommandRequest(job_id, command, stream_state)
        await collect_outcomes(handle_commands(store, [request], meta=EVENT_METADATA))
    errors: list[Exception] = []
    result = await handle_command_with_retries(
        store,
        job_id,
        command,
        meta=EVENT_METADATA,
        stream_state=stream_state,
        retry_seconds=0,
        on_retry=errors.append,
        previous_error=LedgerUnavailable("no response"),
    )
    assert [str(error) for error in errors] == ["no response"]
    assert [event.event for event in result.events] == [JobClaimed(worker_id="w1", attempt=1)]
    assert result.events == (await store.read_stream(job_id))[1:]
