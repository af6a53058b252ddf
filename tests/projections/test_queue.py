"""The view `queue` and its question: who is next."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import CancelJob, ReleaseJob
from jobledger.ledger.domain.events import truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.views import queue
from tests.support.role_runner import RunningRoles, run_roles_in_process

NOW = truncate_to_milliseconds(datetime.now(UTC))
SOON = NOW + timedelta(minutes=1)
LATER = NOW + timedelta(hours=1)


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True) as running:
        yield running


async def candidates(
    here: RunningRoles, *, without: frozenset[str] = frozenset(), now: datetime = NOW, limit: int = 100
) -> list[str]:
    await here.wait_for_views()
    found = await queue.find_candidates(
        here.checkpoint.views, job_types={"echo"}, excluded_job_ids=without, now=now, limit=limit
    )
    return [row.job_id for row in found]


async def test_the_most_urgent_come_first_and_among_equals_the_oldest(here: RunningRoles) -> None:
    low = await here.submit(priority=0)
    first, high, second = [await here.submit(priority=priority) for priority in (1, 5, 1)]
    assert await candidates(here) == [high, first, second, low]
    assert await candidates(here, limit=2) == [high, first]


async def test_who_has_to_wait_is_no_candidate_before_the_time_has_come(here: RunningRoles) -> None:
    later = await here.submit(not_before=LATER, priority=9)
    soon = await here.submit(not_before=SOON, priority=5)
    at_once = await here.submit(priority=5)
    assert await candidates(here) == [at_once]
    assert await candidates(here, now=SOON - timedelta(milliseconds=1)) == [at_once]
    assert await candidates(here, now=SOON) == [soon, at_once]
    assert await candidates(here, now=LATER) == [later, soon, at_once]
    assert await queue.get_next_due_at(here.checkpoint.views, now=NOW) == SOON
    assert await queue.get_next_due_at(here.checkpoint.views, now=SOON) == LATER
    assert await queue.get_next_due_at(here.checkpoint.views, now=LATER) is None


async def test_among_those_whose_time_has_come_the_most_urgent_come_first_too(here: RunningRoles) -> None:
    for minutes in range(3):
        await here.submit(not_before=NOW - timedelta(minutes=10 + minutes), priority=1)
    urgent = await here.submit(not_before=NOW - timedelta(minutes=1), priority=9)
    assert (await candidates(here))[0] == urgent


async def test_the_named_are_left_out_and_so_are_other_job_types(here: RunningRoles) -> None:
    one, two = await here.submit(), await here.submit()
    await here.submit(job_type="session")
    assert await candidates(here, without=frozenset({one})) == [two]
    assert await candidates(here, without=frozenset({one, two})) == []


async def test_a_job_is_in_the_queue_exactly_while_it_waits(here: RunningRoles) -> None:
    job_id, cancelled = await here.submit(), await here.submit()
    await here.claim(job_id)
    await here.handle_commands(cancelled, CancelJob("user-1"))
    assert await candidates(here) == []
    await here.handle_commands(job_id, ReleaseJob("worker-1", 1, "shutdown"))
    assert await candidates(here) == [job_id]


async def test_a_job_given_back_keeps_its_place(here: RunningRoles) -> None:
    old, young = await here.submit(), await here.submit()
    await here.claim(old)
    await here.handle_commands(old, ReleaseJob("worker-1", 1, "shutdown"))
    assert await candidates(here) == [old, young]
