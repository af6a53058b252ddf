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
from jobledger.ledger.domain.errors import AlreadyExists, InvalidEvent, NotFound, VersionConflict, WrongState
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    Meta,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import Known, handle, handle_new, load, new_batch_id, new_job_id, rules_of
from jobledger.ledger.store.envelope import Head
from jobledger.ledger.store.event_store import EventLog
from tests.support.examples import ACCESS, NOON, a_job, some_results
from tests.support.ledgers import META, Ledger, check_log, stored

CLOCK_ERROR = timedelta(seconds=1)
"""Events carry the estimated time of the server's clock. Its error is half a round trip, long on a busy machine."""


async def submitted(log: EventLog, max_attempts: int = 3) -> tuple[str, Known]:
    job_id = new_job_id()
    return job_id, (await handle(log, job_id, SubmitJob(a_job(max_attempts=max_attempts)), meta=META)).known


async def test_a_command_answers_with_its_events_and_what_the_stream_is_now(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log)
    before = datetime.now(UTC)
    handled = await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=Meta("worker:w1"), known=known)
    [event] = handled.events
    assert event.event == JobClaimed(worker_id="w1", attempt=1)
    assert (event.position, event.version, event.meta.actor) == (2, 2, "worker:w1")
    assert before - CLOCK_ERROR <= event.time <= datetime.now(UTC) + CLOCK_ERROR
    assert handled.known == await load(quiet.log, job_id)
    assert handled.known.head == Head(2, 2, event.hash)
    assert isinstance(handled.known.state, Job)
    assert handled.known.state.status == "processing"


async def test_a_command_that_changes_nothing_writes_nothing(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log)
    handled = await handle(quiet.log, job_id, ExpireLease("w1", 1), meta=META)
    assert handled.events == []
    assert handled.known == known
    assert await quiet.log.head() == 1


async def test_a_refused_command_writes_nothing(quiet: Ledger) -> None:
    job_id, _ = await submitted(quiet.log)
    with pytest.raises(AlreadyExists):
        await handle(quiet.log, job_id, SubmitJob(a_job()), meta=META)
    with pytest.raises(NotFound):
        await handle(quiet.log, new_job_id(), CancelJob("alice"), meta=META)
    assert await quiet.log.head() == 1


async def test_a_lost_race_is_decided_again_on_what_is_true_now(quiet: Ledger) -> None:
    job_id, stale = await submitted(quiet.log)
    await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META)
    cancelled = await handle(quiet.log, job_id, CancelJob("alice"), meta=META, known=stale)
    assert [event.event for event in cancelled.events] == [JobCancelRequested(by="alice")]
    assert cancelled.known == await load(quiet.log, job_id)
    with pytest.raises(WrongState):
        await handle(quiet.log, job_id, ClaimJob("w2", NOON), meta=META, known=stale)
    check_log(await stored(quiet.db))


async def test_a_second_submission_under_an_id_is_refused_even_if_the_first_was_not_known(quiet: Ledger) -> None:
    job_id, _ = await submitted(quiet.log)
    with pytest.raises(AlreadyExists):
        await handle(quiet.log, job_id, SubmitJob(a_job()), meta=META, known=Known())


async def test_of_many_claims_one_wins_and_the_others_are_refused(quiet: Ledger) -> None:
    for _ in range(5):
        job_id, known = await submitted(quiet.log)
        claims = [
            handle(quiet.log, job_id, ClaimJob(f"w{n}", NOON), meta=META, known=known if n % 2 else None)
            for n in range(12)
        ]
        answers = await asyncio.gather(*claims, return_exceptions=True)
        assert sum(isinstance(answer, WrongState) for answer in answers) == 11
        assert [event.type for event in await quiet.log.read_stream(job_id)] == ["JobSubmitted", "JobClaimed"]


async def test_an_expired_lease_has_one_effect_however_many_notice(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log, max_attempts=1)
    await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)
    noticed = await asyncio.gather(*(handle(quiet.log, job_id, ExpireLease("w1", 1), meta=META) for _ in range(8)))
    assert sorted(len(handled.events) for handled in noticed) == [0] * 7 + [2]
    types = [event.type for event in await quiet.log.read_stream(job_id)]
    assert types == ["JobSubmitted", "JobClaimed", "JobLeaseExpired", "JobFailed"]
    assert {handled.known.head.version for handled in noticed} == {4}


async def test_a_worker_that_does_not_know_it_was_replaced_is_fenced_and_that_is_on_record(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log)
    zombie = (await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)).known
    await handle(quiet.log, job_id, ExpireLease("w1", 1), meta=META)
    await handle(quiet.log, job_id, ClaimJob("w2", NOON), meta=META)
    late = await handle(quiet.log, job_id, CompleteJob("w1", 1, some_results()), meta=META, known=zombie)
    assert [event.event for event in late.events] == [WorkerFenced(worker_id="w1", attempt=1, refused="JobCompleted")]
    done = await handle(quiet.log, job_id, CompleteJob("w2", 2, some_results()), meta=META)
    assert [event.type for event in done.events] == ["JobCompleted"]
    check_log(await stored(quiet.db))


async def test_completing_and_losing_the_lease_at_the_same_moment_has_one_outcome(quiet: Ledger) -> None:
    for _ in range(10):
        job_id, known = await submitted(quiet.log)
        known = (await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)).known
        complete = handle(quiet.log, job_id, CompleteJob("w1", 1, some_results()), meta=META, known=known)
        expire = handle(quiet.log, job_id, ExpireLease("w1", 1), meta=META, known=known)
        await asyncio.gather(complete, expire)
        types = [event.type for event in await quiet.log.read_stream(job_id)][2:]
        assert types in (["JobCompleted"], ["JobLeaseExpired", "WorkerFenced"])


async def test_a_cancellation_and_a_claim_at_the_same_moment_both_count(quiet: Ledger) -> None:
    for _ in range(10):
        job_id, known = await submitted(quiet.log)
        claim = handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)
        cancel = handle(quiet.log, job_id, CancelJob("alice"), meta=META, known=known)
        claimed, _ = await asyncio.gather(claim, cancel, return_exceptions=True)
        events = [event.event for event in await quiet.log.read_stream(job_id)][1:]
        if isinstance(claimed, WrongState):
            assert events == [JobCancelled(by="alice")]
        else:
            assert events == [JobClaimed(worker_id="w1", attempt=1), JobCancelRequested(by="alice")]


async def test_whoever_follows_a_stream_need_not_read_it_again(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log)
    known = (await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)).known
    for percent in range(5):
        report = ReportProgress("w1", 1, "page", float(percent), "")
        known = (await handle(quiet.log, job_id, report, meta=META, known=known)).known
    assert known.head.version == 7
    assert known == await load(quiet.log, job_id)
    check_log(await stored(quiet.db))


async def test_an_invalid_event_is_the_caller_s_error(quiet: Ledger) -> None:
    job_id, known = await submitted(quiet.log)
    known = (await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META, known=known)).known
    with pytest.raises(InvalidEvent):
        await handle(quiet.log, job_id, ReportProgress("w1", 1, "page", float("nan"), ""), meta=META, known=known)


async def test_a_batch_and_its_jobs_begin_together_in_the_order_given(quiet: Ledger) -> None:
    batch_id, job_ids = new_batch_id(), [new_job_id() for _ in range(300)]
    batch = BatchSubmitted(total_jobs=300, job_ids=job_ids, user_id="alice")
    jobs = [(job_id, SubmitJob(a_job(batch_id=batch_id))) for job_id in job_ids]
    recorded = await handle_new(quiet.log, [(batch_id, SubmitBatch(batch)), *jobs], meta=META)
    assert [event.stream for event in recorded] == [batch_id, *job_ids]
    assert [event.position for event in recorded] == list(range(1, 302))
    paused = await handle(quiet.log, batch_id, PauseBatch("alice"), meta=META)
    assert [event.type for event in paused.events] == ["BatchPaused"]
    check_log(await stored(quiet.db))


async def test_nothing_begins_if_one_of_the_commands_is_refused_or_an_id_is_taken(quiet: Ledger) -> None:
    job_id, _ = await submitted(quiet.log)
    with pytest.raises(NotFound):
        await handle_new(quiet.log, [(new_job_id(), SubmitJob(a_job())), (new_job_id(), Archive("a"))], meta=META)
    fresh = new_job_id()
    with pytest.raises(VersionConflict):
        await handle_new(quiet.log, [(fresh, SubmitJob(a_job())), (job_id, SubmitJob(a_job()))], meta=META)
    assert await quiet.log.read_stream(fresh) == []


async def test_new_ids_name_their_kind_of_stream_and_differ() -> None:
    ids = {new_job_id() for _ in range(100)} | {new_batch_id() for _ in range(100)}
    assert len(ids) == 200
    assert {rules_of(name).__name__ for name in ids} == {"jobledger.ledger.domain.job", "jobledger.ledger.domain.batch"}  # type: ignore[attr-defined]  # modules


def test_a_stream_of_an_unknown_kind_has_no_rules() -> None:
    for name in ("void", "invoice-1", ""):
        with pytest.raises(LookupError):
            rules_of(name)


async def test_what_was_changed_by_many_at_once_is_all_there(quiet: Ledger) -> None:
    job_id, _ = await submitted(quiet.log)
    await asyncio.gather(*(handle(quiet.log, job_id, ChangeAccess(f"user:{n}", ACCESS), meta=META) for n in range(12)))
    events = await quiet.log.read_stream(job_id)
    assert [event.version for event in events] == list(range(1, 14))


async def test_a_refusal_or_nothing_to_do_is_looked_at_again_when_what_was_known_may_be_old(quiet: Ledger) -> None:
    job_id, waiting = await submitted(quiet.log)
    await handle(quiet.log, job_id, CancelJob("user:me"), meta=META)
    restarted = await handle(
        quiet.log, job_id, RestartJob("user:me"), meta=META, known=waiting
    )  # a waiting one cannot be
    assert [event.type for event in restarted.events] == ["JobRestarted"]
    claimed = await handle(quiet.log, job_id, ClaimJob("w1", NOON), meta=META)
    expired = await handle(quiet.log, job_id, ExpireLease("w1", 1), meta=META, known=waiting)  # a waiting one has none
    assert [event.type for event in expired.events] == ["JobLeaseExpired"]
    assert expired.events[0].version == claimed.known.head.version + 1
    with pytest.raises(WrongState):
        await handle(quiet.log, job_id, RestartJob("user:me"), meta=META, known=waiting)
