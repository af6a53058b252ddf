"""Leases: one holder at a time, by the server's clock, whatever the holder's event loop or network does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pymongo.collection import Collection

from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, EXPIRED_LEASE_FILTER, Lease, LeaseObservation
from jobledger.ledger.system.loop_progress import LoopProgress
from tests.support.ledger_setup import DEADLINE_SECONDS
from tests.support.tcp_proxy import TcpProxy

SECONDS = 0.9


@pytest.fixture
def leases(connection: Connection) -> Iterator[Collection[Document]]:
    with connection.blocking_client() as client:
        yield client[connection.db_name].leases


@pytest.fixture
async def lease(connection: Connection) -> AsyncIterator[Lease]:
    lease = lease_of(connection)
    yield lease
    await lease.release()


def lease_of(connection: Connection, seconds: float = SECONDS) -> Lease:
    return Lease(connection, "leases", "the-lease", seconds=seconds)


def by_the_server(leases: Collection[Document], condition: Document) -> bool:
    return leases.find_one({"_id": "the-lease", **condition}) is not None


def run_out(leases: Collection[Document]) -> None:
    """Let the lease have run out now, as if the heartbeats had not come through."""
    leases.update_one({"_id": "the-lease"}, [{"$set": {"lease_until": {"$subtract": ["$$NOW", 1]}}}])


def declare_over(leases: Collection[Document]) -> bool:
    return leases.update_one({"_id": "the-lease", **EXPIRED_LEASE_FILTER}, EXPIRE_LEASE_UPDATE).matched_count == 1


async def beats_again(leases: Collection[Document]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while by_the_server(leases, EXPIRED_LEASE_FILTER):  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.02)


async def acquired(lease: Lease, **facts: Any) -> bool:
    return await asyncio.wait_for(lease.acquire(facts), DEADLINE_SECONDS)


async def acquired_at_last(lease: Lease) -> bool:
    """Try until it is free, as those who stand by do."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await lease.acquire({}):  # noqa: ASYNC110 - passing time makes no event
            await asyncio.sleep(0.05)
    return True


async def test_one_at_a_time_holds_a_lease(connection: Connection, lease: Lease) -> None:
    others = [lease_of(connection) for _ in range(5)]
    assert await acquired(lease, host="a")
    assert lease.is_held
    assert not any(await asyncio.gather(*(acquired(other, host="b") for other in others)))
    assert not any(other.is_held for other in others)


async def test_of_many_that_want_it_at_once_one_gets_it(connection: Connection) -> None:
    wanting = [lease_of(connection) for _ in range(8)]
    got = await asyncio.gather(*(acquired(lease) for lease in wanting))
    assert sum(got) == 1
    assert [lease.is_held for lease in wanting] == got
    await asyncio.gather(*(lease.release() for lease in wanting))


async def test_it_says_who_holds_it_whatever_characters_that_needs(lease: Lease, leases: Collection[Document]) -> None:
    facts = {"host": "$weird.host", "slots": 4, "nested": {"$literal": 1}, "none": None}
    assert await acquired(lease, **facts)
    document = leases.find_one({"_id": "the-lease"})
    assert document is not None
    assert {name: document[name] for name in facts} == facts
    assert (document["fencing_token"], document["seconds"], document["released"]) == (1, SECONDS, False)


async def test_it_is_kept_alive_far_longer_than_its_time(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquired(lease)
    first = leases.find_one({"_id": "the-lease"})
    assert first is not None
    lost = asyncio.create_task(lease.wait_lost())
    done, _ = await asyncio.wait({lost}, timeout=2 * SECONDS)
    assert not done
    assert lease.is_held
    later = leases.find_one({"_id": "the-lease"})
    assert later is not None
    assert later["lease_until"] > first["lease_until"]
    assert not by_the_server(leases, EXPIRED_LEASE_FILTER)
    lost.cancel()


async def test_releasing_frees_it_at_once_and_the_next_holder_has_a_higher_epoch(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    for fencing_token in range(1, 4):
        assert await acquired(lease)
        assert lease.fencing_token == fencing_token
        await lease.release()
        assert not lease.is_held
        assert by_the_server(leases, {**EXPIRED_LEASE_FILTER, "released": True, "fencing_token": fencing_token})
    long = lease_of(connection, 60)
    assert await acquired(long)
    assert long.fencing_token == 4
    await asyncio.wait_for(long.release(), 5)
    assert await acquired(lease)


async def test_releasing_twice_or_what_was_never_held_is_harmless(connection: Connection, lease: Lease) -> None:
    await lease.release()
    assert await acquired(lease)
    other = lease_of(connection)
    assert not await acquired(other)
    await other.release()
    assert lease.is_held
    await lease.release()
    await lease.release()


async def test_one_that_ran_out_goes_on_as_long_as_nobody_has_taken_it(
    lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquired(lease)
    await asyncio.sleep(SECONDS)
    assert lease.uninterrupted_seconds > 0.9 * SECONDS, "no beat has been missed"
    run_out(leases)
    await beats_again(leases)
    assert by_the_server(leases, {"fencing_token": 1})
    assert lease.is_held
    assert not declare_over(leases), "it has not run out"


async def test_one_that_was_declared_over_cannot_be_extended_and_its_holder_notices(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquired(lease)
    run_out(leases)
    assert declare_over(leases)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert not lease.is_held
    assert by_the_server(leases, {**EXPIRED_LEASE_FILTER, "fencing_token": 2, "released": False})
    other = lease_of(connection)
    assert await acquired(other)
    assert other.fencing_token == 3
    await lease.release()
    assert by_the_server(leases, {"fencing_token": 3, "released": False})
    assert other.is_held
    await other.release()


async def test_what_another_has_taken_over_is_lost_and_not_given_back_by_the_former_holder(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquired(lease)
    run_out(leases)
    other = lease_of(connection)
    assert await acquired(other)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert (lease.is_held, other.is_held) == (False, True)
    await lease.release()
    assert not by_the_server(leases, EXPIRED_LEASE_FILTER)
    await other.release()


async def test_a_lost_lease_can_be_acquired_again(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquired(lease)
    run_out(leases)
    assert declare_over(leases)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    await lease.release()
    assert await acquired(lease)
    assert (lease.is_held, lease.fencing_token) == (True, 3)


async def test_one_that_was_deleted_is_lost_too(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquired(lease)
    leases.delete_one({"_id": "the-lease"})
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert not lease.is_held


async def test_an_event_loop_frozen_for_a_moment_does_not_lose_the_lease(
    lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquired(lease)
    time.sleep(SECONDS)  # noqa: ASYNC251 - to freeze the event loop is the point
    assert not by_the_server(leases, EXPIRED_LEASE_FILTER)
    await asyncio.sleep(0)
    assert lease.is_held


async def test_a_dead_holder_s_lease_is_free_after_its_time_and_not_before(
    connection: Connection, leases: Collection[Document]
) -> None:
    class Mortal(Lease):
        def _beat(self, *_: Any) -> bool:
            return True  # dead

    dead = Mortal(connection, "leases", "the-lease", seconds=SECONDS)
    begun = time.monotonic()
    assert await acquired(dead)
    heir = lease_of(connection)
    assert not await acquired(heir)
    assert await acquired_at_last(heir)
    assert time.monotonic() - begun > SECONDS - 0.05
    assert heir.fencing_token == 2
    await heir.release()


async def test_a_holder_whose_network_is_silent_goes_on_when_it_is_back_unless_it_was_declared_over(
    mongodb_uri: str, db_name: str, leases: Collection[Document]
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = lease_of(Connection(proxy.uri, db_name))
        assert await acquired(lease)
        proxy.suspend()
        await asyncio.sleep(2 * SECONDS)
        assert by_the_server(leases, {**EXPIRED_LEASE_FILTER, "fencing_token": 1})
        assert lease.is_held
        assert lease.uninterrupted_seconds == 0
        proxy.resume()
        await beats_again(leases)
        assert lease.is_held
        assert lease.uninterrupted_seconds < SECONDS

        proxy.suspend()
        await asyncio.sleep(2 * SECONDS)
        assert declare_over(leases)
        proxy.resume()
        await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
        await lease.release()
        assert by_the_server(leases, {**EXPIRED_LEASE_FILTER, "fencing_token": 2, "released": False})


@pytest.mark.parametrize("silent_for", [0.0, 2 * SECONDS], ids=["running", "run out"])
async def test_letting_go_over_a_silent_network_does_not_take_for_ever(
    mongodb_uri: str, db_name: str, silent_for: float
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = lease_of(Connection(proxy.uri, db_name))
        assert await acquired(lease)
        proxy.suspend()
        await asyncio.sleep(silent_for)
        begun = time.monotonic()
        await asyncio.wait_for(lease.release(), DEADLINE_SECONDS)
        assert time.monotonic() - begun < 3 * SECONDS


async def test_a_holder_whose_network_broke_for_a_moment_goes_on(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = lease_of(Connection(proxy.uri, db_name))
        assert await acquired(lease)
        for _ in range(3):
            await asyncio.sleep(SECONDS / 2)
            proxy.close_connections()
        await asyncio.sleep(SECONDS)
        assert lease.is_held
        await lease.release()


async def test_without_a_database_acquiring_fails_within_the_timeout(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        pass
    lease = lease_of(Connection(proxy.uri, db_name, connect_timeout_ms=300))
    with pytest.raises(LedgerUnavailable):
        await acquired(lease)
    assert not lease.is_held


async def test_a_fault_while_acquiring_is_raised_and_not_waited_for(connection: Connection) -> None:
    class Faulty(Lease):
        def _take(self, *_: Any) -> int | None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await acquired(Faulty(connection, "leases", "the-lease", seconds=SECONDS))


async def test_whoever_is_cancelled_while_acquiring_holds_nothing_afterwards(
    connection: Connection, leases: Collection[Document]
) -> None:
    class Slow(Lease):
        taken, go_on = threading.Event(), threading.Event()

        def _take(self, leases: Collection[Document], facts: Document, seen: LeaseObservation) -> int | None:
            fencing_token = super()._take(leases, facts, seen)
            self.taken.set()
            self.go_on.wait(DEADLINE_SECONDS)
            return fencing_token

    lease = Slow(connection, "leases", "the-lease", seconds=SECONDS)
    acquiring = asyncio.create_task(lease.acquire({}))
    await asyncio.to_thread(lease.taken.wait, DEADLINE_SECONDS)
    acquiring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await acquiring
    again = asyncio.create_task(lease.acquire({}))  # at once, while the first try's thread is still at it
    await asyncio.sleep(0)
    lease.go_on.set()
    if not await asyncio.wait_for(again, DEADLINE_SECONDS):
        assert await acquired_at_last(lease)
    assert lease.is_held
    await lease.release()
    assert by_the_server(leases, EXPIRED_LEASE_FILTER)


async def test_lease_of_a_blocked_loop_expires_and_is_extended_when_the_loop_goes_on(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquired(lease)
    await asyncio.sleep(0.1)
    time.sleep(2.5 * SECONDS)  # noqa: ASYNC251 - the fault
    assert by_the_server(leases, EXPIRED_LEASE_FILTER)
    assert lease.is_held, "until somebody takes it"
    await beats_again(leases)


async def test_loop_progress_counts_looks_and_not_seconds() -> None:
    progress = LoopProgress(0.01)
    await asyncio.sleep(0.03)
    assert progress.count_missed() == 0
    time.sleep(1)  # noqa: ASYNC251 - as long as a suspended machine sleeps
    assert progress.count_missed() == 1
    assert progress.count_missed() == 2
    assert "test_loop_progress" in progress.format_stack()
    await asyncio.sleep(0.03)
    assert progress.count_missed() == 0
    progress.stop()
