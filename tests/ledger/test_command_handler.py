"""The one road: decided on what is true, and decided again when somebody else was first."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    ExpireLease,
    PauseBatch,
    ReportProgress,
    RestartJob,
    SubmitBatch,
    SubmitJob,
)
from jobledger.ledger.domain.errors import AlreadyExists, InvalidEvent, InvalidState, NotFound, VersionConflict
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    EventMetadata,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import (
    StreamState,
    create_streams,
    decider_for,
    handle_command,
    load_stream_state,
    new_batch_id,
    new_job_id,
)
from jobledger.ledger.store.envelope import StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import ACCESS, NOON, make_job_submitted, make_results
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_log, load_event_documents

CLOCK_ERROR = timedelta(seconds=1)
"""Events carry the estimated time of the server's clock. Its error is half a round trip, long on a busy machine."""


async def submitted(log: EventStore, max_attempts: int = 3) -> tuple[str, StreamState]:
    job_id = new_job_id()
    return job_id, (
        await handle_command(log, job_id, SubmitJob(make_job_submitted(max_attempts=max_attempts)), meta=EVENT_METADATA)
    ).stream_state


async def test_a_command_answers_with_its_events_and_what_the_stream_is_now(unstreamed_ledger: Ledger) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store)
    before = datetime.now(UTC)
    handled = await handle_command(
        unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EventMetadata("worker:w1"), stream_state=known
    )
    [event] = handled.events
    assert event.event == JobClaimed(worker_id="w1", attempt=1)
    assert (event.position, event.version, event.meta.actor) == (2, 2, "worker:w1")
    assert before - CLOCK_ERROR <= event.time <= datetime.now(UTC) + CLOCK_ERROR
    assert handled.stream_state == await load_stream_state(unstreamed_ledger.event_store, job_id)
    assert handled.stream_state.head == StreamHead(2, 2, event.hash)
    assert isinstance(handled.stream_state.state, Job)
    assert handled.stream_state.state.status == "processing"


async def test_a_command_that_changes_nothing_writes_nothing(unstreamed_ledger: Ledger) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store)
    handled = await handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
    assert handled.events == []
    assert handled.stream_state == known
    assert await unstreamed_ledger.event_store.head_position() == 1


async def test_a_refused_command_writes_nothing(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submitted(unstreamed_ledger.event_store)
    with pytest.raises(AlreadyExists):
        await handle_command(
            unstreamed_ledger.event_store, job_id, SubmitJob(make_job_submitted()), meta=EVENT_METADATA
        )
    with pytest.raises(NotFound):
        await handle_command(unstreamed_ledger.event_store, new_job_id(), CancelJob("alice"), meta=EVENT_METADATA)
    assert await unstreamed_ledger.event_store.head_position() == 1


async def test_a_lost_race_is_decided_again_on_what_is_true_now(unstreamed_ledger: Ledger) -> None:
    job_id, stale = await submitted(unstreamed_ledger.event_store)
    await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    cancelled = await handle_command(
        unstreamed_ledger.event_store, job_id, CancelJob("alice"), meta=EVENT_METADATA, stream_state=stale
    )
    assert [event.event for event in cancelled.events] == [JobCancelRequested(by="alice")]
    assert cancelled.stream_state == await load_stream_state(unstreamed_ledger.event_store, job_id)
    with pytest.raises(InvalidState):
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w2", NOON), meta=EVENT_METADATA, stream_state=stale
        )
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_a_second_submission_under_an_id_is_refused_even_if_the_first_was_not_known(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, _ = await submitted(unstreamed_ledger.event_store)
    with pytest.raises(AlreadyExists):
        await handle_command(
            unstreamed_ledger.event_store,
            job_id,
            SubmitJob(make_job_submitted()),
            meta=EVENT_METADATA,
            stream_state=StreamState(),
        )


async def test_of_many_claims_one_wins_and_the_others_are_refused(unstreamed_ledger: Ledger) -> None:
    for _ in range(5):
        job_id, known = await submitted(unstreamed_ledger.event_store)
        claims = [
            handle_command(
                unstreamed_ledger.event_store,
                job_id,
                ClaimJob(f"w{n}", NOON),
                meta=EVENT_METADATA,
                stream_state=known if n % 2 else None,
            )
            for n in range(12)
        ]
        answers = await asyncio.gather(*claims, return_exceptions=True)
        assert sum(isinstance(answer, InvalidState) for answer in answers) == 11
        assert [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)] == [
            "JobSubmitted",
            "JobClaimed",
        ]


async def test_an_expired_lease_has_one_effect_however_many_notice(unstreamed_ledger: Ledger) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store, max_attempts=1)
    await handle_command(
        unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
    )
    noticed = await asyncio.gather(
        *(
            handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
            for _ in range(8)
        )
    )
    assert sorted(len(handled.events) for handled in noticed) == [0] * 7 + [2]
    types = [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)]
    assert types == ["JobSubmitted", "JobClaimed", "JobLeaseExpired", "JobFailed"]
    assert {handled.stream_state.head.version for handled in noticed} == {4}


async def test_a_worker_that_does_not_know_it_was_replaced_is_fenced_and_that_is_on_record(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store)
    zombie = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
        )
    ).stream_state
    await handle_command(unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA)
    await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w2", NOON), meta=EVENT_METADATA)
    late = await handle_command(
        unstreamed_ledger.event_store,
        job_id,
        CompleteJob("w1", 1, make_results()),
        meta=EVENT_METADATA,
        stream_state=zombie,
    )
    assert [event.event for event in late.events] == [
        WorkerFenced(worker_id="w1", attempt=1, rejected_event="JobCompleted")
    ]
    done = await handle_command(
        unstreamed_ledger.event_store, job_id, CompleteJob("w2", 2, make_results()), meta=EVENT_METADATA
    )
    assert [event.type for event in done.events] == ["JobCompleted"]
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_completing_and_losing_the_lease_at_the_same_moment_has_one_outcome(unstreamed_ledger: Ledger) -> None:
    for _ in range(10):
        job_id, known = await submitted(unstreamed_ledger.event_store)
        known = (
            await handle_command(
                unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
            )
        ).stream_state
        complete = handle_command(
            unstreamed_ledger.event_store,
            job_id,
            CompleteJob("w1", 1, make_results()),
            meta=EVENT_METADATA,
            stream_state=known,
        )
        expire = handle_command(
            unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA, stream_state=known
        )
        await asyncio.gather(complete, expire)
        types = [event.type for event in await unstreamed_ledger.event_store.read_stream(job_id)][2:]
        assert types in (["JobCompleted"], ["JobLeaseExpired", "WorkerFenced"])


async def test_a_cancellation_and_a_claim_at_the_same_moment_both_count(unstreamed_ledger: Ledger) -> None:
    for _ in range(10):
        job_id, known = await submitted(unstreamed_ledger.event_store)
        claim = handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
        )
        cancel = handle_command(
            unstreamed_ledger.event_store, job_id, CancelJob("alice"), meta=EVENT_METADATA, stream_state=known
        )
        claimed, _ = await asyncio.gather(claim, cancel, return_exceptions=True)
        events = [event.event for event in await unstreamed_ledger.event_store.read_stream(job_id)][1:]
        if isinstance(claimed, InvalidState):
            assert events == [JobCancelled(by="alice")]
        else:
            assert events == [JobClaimed(worker_id="w1", attempt=1), JobCancelRequested(by="alice")]


async def test_whoever_follows_a_stream_need_not_read_it_again(unstreamed_ledger: Ledger) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store)
    known = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
        )
    ).stream_state
    for percent in range(5):
        report = ReportProgress("w1", 1, "page", float(percent), "")
        known = (
            await handle_command(unstreamed_ledger.event_store, job_id, report, meta=EVENT_METADATA, stream_state=known)
        ).stream_state
    assert known.head.version == 7
    assert known == await load_stream_state(unstreamed_ledger.event_store, job_id)
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_an_invalid_event_is_the_caller_s_error(unstreamed_ledger: Ledger) -> None:
    job_id, known = await submitted(unstreamed_ledger.event_store)
    known = (
        await handle_command(
            unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=known
        )
    ).stream_state
    with pytest.raises(InvalidEvent):
        await handle_command(
            unstreamed_ledger.event_store,
            job_id,
            ReportProgress("w1", 1, "page", float("nan"), ""),
            meta=EVENT_METADATA,
            stream_state=known,
        )


async def test_a_batch_and_its_jobs_begin_together_in_the_order_given(unstreamed_ledger: Ledger) -> None:
    batch_id, job_ids = new_batch_id(), [new_job_id() for _ in range(300)]
    batch = BatchSubmitted(total_jobs=300, job_ids=job_ids, user_id="alice")
    jobs = [(job_id, SubmitJob(make_job_submitted(batch_id=batch_id))) for job_id in job_ids]
    recorded = await create_streams(
        unstreamed_ledger.event_store, [(batch_id, SubmitBatch(batch)), *jobs], meta=EVENT_METADATA
    )
    assert [event.stream for event in recorded] == [batch_id, *job_ids]
    assert [event.position for event in recorded] == list(range(1, 302))
    paused = await handle_command(unstreamed_ledger.event_store, batch_id, PauseBatch("alice"), meta=EVENT_METADATA)
    assert [event.type for event in paused.events] == ["BatchPaused"]
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_nothing_begins_if_one_of_the_commands_is_refused_or_an_id_is_taken(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submitted(unstreamed_ledger.event_store)
    with pytest.raises(NotFound):
        await create_streams(
            unstreamed_ledger.event_store,
            [(new_job_id(), SubmitJob(make_job_submitted())), (new_job_id(), Archive("a"))],
            meta=EVENT_METADATA,
        )
    fresh = new_job_id()
    with pytest.raises(VersionConflict):
        await create_streams(
            unstreamed_ledger.event_store,
            [(fresh, SubmitJob(make_job_submitted())), (job_id, SubmitJob(make_job_submitted()))],
            meta=EVENT_METADATA,
        )
    assert await unstreamed_ledger.event_store.read_stream(fresh) == []


async def test_new_ids_name_their_kind_of_stream_and_differ() -> None:
    ids = {new_job_id() for _ in range(100)} | {new_batch_id() for _ in range(100)}
    assert len(ids) == 200
    assert {decider_for(name).__name__ for name in ids} == {  # type: ignore[attr-defined]  # modules
        "jobledger.ledger.domain.job",
        "jobledger.ledger.domain.batch",
    }


def test_a_stream_of_an_unknown_kind_has_no_rules() -> None:
    for name in ("void", "invoice-1", ""):
        with pytest.raises(LookupError):
            decider_for(name)


async def test_what_was_changed_by_many_at_once_is_all_there(unstreamed_ledger: Ledger) -> None:
    job_id, _ = await submitted(unstreamed_ledger.event_store)
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


async def test_a_refusal_or_nothing_to_do_is_looked_at_again_when_what_was_known_may_be_old(
    unstreamed_ledger: Ledger,
) -> None:
    job_id, waiting = await submitted(unstreamed_ledger.event_store)
    await handle_command(unstreamed_ledger.event_store, job_id, CancelJob("user:me"), meta=EVENT_METADATA)
    restarted = await handle_command(
        unstreamed_ledger.event_store, job_id, RestartJob("user:me"), meta=EVENT_METADATA, stream_state=waiting
    )  # a waiting one cannot be
    assert [event.type for event in restarted.events] == ["JobRestarted"]
    claimed = await handle_command(unstreamed_ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA)
    expired = await handle_command(
        unstreamed_ledger.event_store, job_id, ExpireLease("w1", 1), meta=EVENT_METADATA, stream_state=waiting
    )  # a waiting one has none
    assert [event.type for event in expired.events] == ["JobLeaseExpired"]
    assert expired.events[0].version == claimed.stream_state.head.version + 1
    with pytest.raises(InvalidState):
        await handle_command(
            unstreamed_ledger.event_store, job_id, RestartJob("user:me"), meta=EVENT_METADATA, stream_state=waiting
        )
