"""The view `queue` and its query for the jobs that can be claimed next."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from jobledger.ledger.domain.commands import (
    CancelJob,
    FailAttempt,
    PauseBatch,
    ReleaseJob,
    RestartJob,
    ResumeBatch,
    UpdateJob,
)
from jobledger.ledger.domain.events import ErrorInfo, truncate_to_milliseconds
from jobledger.ledger.store.command_handler import Command
from jobledger.projections.views import queue
from tests.support.role_runner import RunningRoles

NOW = truncate_to_milliseconds(datetime.now(UTC))
SOON = NOW + timedelta(minutes=1)
LATER = NOW + timedelta(hours=1)


async def find_rows(
    roles: RunningRoles, *, excluded: frozenset[str] = frozenset(), now: datetime = NOW, limit: int = 100
) -> list[str]:
    await roles.wait_for_views()
    rows = await queue.find_rows(
        roles.checkpoint.views, job_types={"echo"}, excluded_job_ids=excluded, now=now, limit=limit
    )
    return [row.job_id for row in rows]


async def test_find_rows_sorts_by_priority_and_then_by_age(roles: RunningRoles) -> None:
    low = await roles.submit(priority=0)
    first, high, second = [await roles.submit(priority=priority) for priority in (1, 5, 1)]
    assert await find_rows(roles) == [high, first, second, low]
    assert await find_rows(roles, limit=2) == [high, first]


async def test_find_rows_before_not_before_leaves_the_job_out(roles: RunningRoles) -> None:
    later = await roles.submit(not_before=LATER, priority=9)
    soon = await roles.submit(not_before=SOON, priority=5)
    due = await roles.submit(priority=5)
    assert await find_rows(roles) == [due]
    assert await find_rows(roles, now=SOON - timedelta(milliseconds=1)) == [due]
    assert await find_rows(roles, now=SOON) == [soon, due]
    assert await find_rows(roles, now=LATER) == [later, soon, due]
    assert await queue.get_next_due_at(roles.checkpoint.views, now=NOW) == SOON
    assert await queue.get_next_due_at(roles.checkpoint.views, now=SOON) == LATER
    assert await queue.get_next_due_at(roles.checkpoint.views, now=LATER) is None


async def test_find_rows_with_due_jobs_sorts_by_priority(roles: RunningRoles) -> None:
    for minutes in range(3):
        await roles.submit(not_before=NOW - timedelta(minutes=10 + minutes), priority=1)
    urgent = await roles.submit(not_before=NOW - timedelta(minutes=1), priority=9)
    assert (await find_rows(roles))[0] == urgent


async def test_find_rows_leaves_out_excluded_jobs_and_other_job_types(roles: RunningRoles) -> None:
    first, second = await roles.submit(), await roles.submit()
    await roles.submit(job_type="session")
    assert await find_rows(roles, excluded=frozenset({first})) == [second]
    assert await find_rows(roles, excluded=frozenset({first, second})) == []


async def test_queue_contains_a_job_exactly_while_it_is_pending(roles: RunningRoles) -> None:
    job_id, cancelled = await roles.submit(), await roles.submit()
    await roles.claim(job_id)
    await roles.handle_commands(cancelled, CancelJob("user-1"))
    assert await find_rows(roles) == []
    await roles.handle_commands(job_id, ReleaseJob("worker-1", 1, "shutdown"))
    assert await find_rows(roles) == [job_id]


async def test_released_job_keeps_its_place_in_the_queue(roles: RunningRoles) -> None:
    older, newer = await roles.submit(), await roles.submit()
    await roles.claim(older)
    await roles.handle_commands(older, ReleaseJob("worker-1", 1, "shutdown"))
    assert await find_rows(roles) == [older, newer]


async def test_shares_of_the_rows_are_disjoint_and_complete(roles: RunningRoles) -> None:
    _, job_ids = await roles.submit_batch(*({} for _ in range(40)))
    await roles.wait_for_views()
    shares = [
        await queue.find_rows(
            roles.checkpoint.views,
            job_types={"echo"},
            excluded_job_ids=(),
            now=NOW,
            limit=100,
            share=queue.Share(3, remainder),
        )
        for remainder in range(3)
    ]
    assert all(shares)
    assert sorted(row.job_id for rows in shares for row in rows) == sorted(job_ids)
    for remainder, rows in enumerate(shares):
        assert {queue.compute_hash(row.job_id) % 3 for row in rows} == {remainder}


async def test_rows_of_excluded_batches_are_left_out(roles: RunningRoles) -> None:
    batch_id, _ = await roles.submit_batch({}, {})
    single = await roles.submit()
    await roles.wait_for_views()
    rows = await queue.find_rows(
        roles.checkpoint.views,
        job_types={"echo"},
        excluded_job_ids=(),
        excluded_batch_ids=[batch_id],
        now=NOW,
        limit=10,
    )
    assert [row.job_id for row in rows] == [single]


async def test_server_reads_only_the_rows_of_a_share(roles: RunningRoles) -> None:
    await roles.submit_batch(*({} for _ in range(80)))
    await roles.wait_for_views()
    share = queue.Share(4, 1)
    views = roles.checkpoint.views
    await roles.db.create_collection("system.profile", capped=True, size=2**20)
    await roles.db.command({"profile": 2})
    try:
        rows = await queue.find_rows(views, job_types={"echo"}, excluded_job_ids=(), now=NOW, limit=100, share=share)
    finally:
        await roles.db.command({"profile": 0})
    query = {"op": "query", "ns": f"{roles.db.name}.{views[queue.NAME].name}"}
    profiled = await roles.db["system.profile"].find(query).to_list()
    assert 0 < len(rows) < 40
    assert sum(entry["docsExamined"] for entry in profiled) == len(rows)


async def find_oldest(roles: RunningRoles, now: datetime | None = None) -> datetime | None:
    await roles.wait_for_views()
    return await queue.find_oldest_claimable_at(roles.checkpoint.views, now=now or datetime.now(UTC))


async def apply(roles: RunningRoles, stream: str, *commands: Command) -> datetime:
    """Handle commands and return the time of the last event."""
    return (await roles.handle_commands(stream, *commands))[-1].time


async def test_oldest_claimable_at_begins_again_whenever_a_job_can_run_again(roles: RunningRoles) -> None:
    job_id = await roles.submit()
    submitted = await find_oldest(roles)
    attempt = await roles.claim(job_id)
    assert await find_oldest(roles) is None, "it runs"
    released = await apply(roles, job_id, ReleaseJob("worker-1", attempt, "shutdown"))
    assert submitted is not None
    assert submitted < released
    assert await find_oldest(roles) == released
    await roles.claim(job_id)
    await apply(roles, job_id, FailAttempt("worker-1", 2, ErrorInfo(code="BROKEN", message="it broke"), LATER))
    assert await find_oldest(roles) is None, "it waits for its retry"
    assert await find_oldest(roles, LATER) == LATER
    await apply(roles, job_id, CancelJob("user:alice"))
    assert await find_oldest(roles, LATER) is None
    restarted = await apply(roles, job_id, RestartJob("user:alice"))
    assert await find_oldest(roles) == restarted


async def test_oldest_claimable_at_of_a_batch_begins_when_it_is_resumed(roles: RunningRoles) -> None:
    batch_id, _ = await roles.submit_batch({}, {})
    assert await find_oldest(roles) is not None
    await apply(roles, batch_id, PauseBatch("user:alice"))
    assert await find_oldest(roles) is None
    resumed = await apply(roles, batch_id, ResumeBatch("user:alice"))
    assert await find_oldest(roles) == resumed
    paused_again = await apply(roles, batch_id, PauseBatch("user:alice"))
    assert paused_again > resumed
    assert await find_oldest(roles) is None
    resumed_again = await apply(roles, batch_id, ResumeBatch("user:alice"))
    assert await find_oldest(roles) == resumed_again > resumed


async def test_oldest_claimable_at_of_an_advanced_job_is_the_time_of_the_change(roles: RunningRoles) -> None:
    job_id = await roles.submit(not_before=LATER)
    assert await find_oldest(roles) is None
    advanced = await apply(roles, job_id, UpdateJob("user:alice", not_before=NOW - timedelta(days=1)))
    assert await find_oldest(roles) == advanced
    assert await apply(roles, job_id, UpdateJob("user:alice", not_before=NOW - timedelta(days=2))) > advanced
    assert await find_oldest(roles) == advanced, "it could run before"
