"""Leases: one holder at a time by the server's clock, whatever the holder's event loop or network does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest
from pymongo.collection import Collection

from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, OVERDUE_LEASE_FILTER, Lease, LeaseObservation
from jobledger.ledger.system.loop_ticker import LoopTicker
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.tcp_proxy import TcpProxy

LEASE_SECONDS = 0.9


@pytest.fixture
def leases(connection: Connection) -> Iterator[Collection[Document]]:
    with connection.create_blocking_client() as client:
        yield client[connection.db_name].leases


@pytest.fixture
async def lease(connection: Connection) -> AsyncIterator[Lease]:
    lease = create_lease(connection)
    yield lease
    await lease.release()


def create_lease(connection: Connection, seconds: float = LEASE_SECONDS) -> Lease:
    return Lease(connection, "leases", "the-lease", seconds=seconds)


def matches_document(leases: Collection[Document], condition: Document) -> bool:
    return leases.find_one({"_id": "the-lease", **condition}) is not None


def make_lease_overdue(leases: Collection[Document]) -> None:
    """Make the lease overdue now, as if heartbeats had not arrived."""
    leases.update_one({"_id": "the-lease"}, [{"$set": {"lease_until": {"$subtract": ["$$NOW", 1]}}}])


def expire_overdue_lease(leases: Collection[Document]) -> bool:
    return leases.update_one({"_id": "the-lease", **OVERDUE_LEASE_FILTER}, EXPIRE_LEASE_UPDATE).matched_count == 1


def expire_lease(leases: Collection[Document]) -> None:
    while not expire_overdue_lease(leases):  # a heartbeat may extend the lease in between
        make_lease_overdue(leases)


async def wait_until_extended(leases: Collection[Document]) -> None:
    await poll_until(lambda: not matches_document(leases, OVERDUE_LEASE_FILTER), "a heartbeat extends the lease")


async def acquire(lease: Lease, **facts: Any) -> bool:
    return await asyncio.wait_for(lease.acquire(facts), DEADLINE_SECONDS)


async def acquire_when_free(lease: Lease) -> bool:
    """Retry until the lease is free, as standby processes do."""
    await poll_until(lambda: lease.acquire({}), "the lease is free")
    return True


async def test_lease_has_one_holder_at_a_time(connection: Connection, lease: Lease) -> None:
    other_leases = [create_lease(connection) for _ in range(5)]
    assert await acquire(lease, host="a")
    assert lease.is_held
    assert not any(await asyncio.gather(*(acquire(other, host="b") for other in other_leases)))
    assert not any(other.is_held for other in other_leases)


async def test_concurrent_acquire_succeeds_once(connection: Connection) -> None:
    leases_to_acquire = [create_lease(connection) for _ in range(8)]
    results = await asyncio.gather(*(acquire(lease) for lease in leases_to_acquire))
    assert sum(results) == 1
    assert [lease.is_held for lease in leases_to_acquire] == results
    await asyncio.gather(*(lease.release() for lease in leases_to_acquire))


async def test_lease_document_has_holder_facts_with_special_characters(
    lease: Lease, leases: Collection[Document]
) -> None:
    facts = {"host": "$weird.host", "slots": 4, "nested": {"$literal": 1}, "none": None}
    assert await acquire(lease, **facts)
    document = leases.find_one({"_id": "the-lease"})
    assert document is not None
    assert {name: document[name] for name in facts} == facts
    assert (document["fencing_token"], document["seconds"], document["released"]) == (1, LEASE_SECONDS, False)


async def test_heartbeats_extend_lease_beyond_its_duration(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquire(lease)
    first = leases.find_one({"_id": "the-lease"})
    assert first is not None
    waiting_for_loss = asyncio.create_task(lease.wait_lost())
    extended = {"lease_until": {"$gte": first["lease_until"] + timedelta(seconds=2 * LEASE_SECONDS)}}
    await poll_until(lambda: matches_document(leases, extended), "heartbeats extend the lease")
    assert not matches_document(leases, OVERDUE_LEASE_FILTER)
    assert lease.is_held
    assert not waiting_for_loss.done()
    waiting_for_loss.cancel()


async def test_release_frees_lease_and_next_fencing_token_is_higher(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    for fencing_token in range(1, 4):
        assert await acquire(lease)
        assert lease.fencing_token == fencing_token
        await lease.release()
        assert not lease.is_held
        assert matches_document(leases, {**OVERDUE_LEASE_FILTER, "released": True, "fencing_token": fencing_token})
    long_lease = create_lease(connection, 60)
    assert await acquire(long_lease)
    assert long_lease.fencing_token == 4
    await asyncio.wait_for(long_lease.release(), DEADLINE_SECONDS)
    assert await acquire(lease)


async def test_release_of_lease_not_held_has_no_effect(connection: Connection, lease: Lease) -> None:
    await lease.release()
    assert await acquire(lease)
    other = create_lease(connection)
    assert not await acquire(other)
    await other.release()
    assert lease.is_held
    await lease.release()
    await lease.release()


async def test_overdue_lease_is_extended_if_not_taken(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquire(lease)
    await poll_until(lambda: lease.uninterrupted_seconds > 0.9 * LEASE_SECONDS)
    make_lease_overdue(leases)
    await wait_until_extended(leases)
    assert matches_document(leases, {"fencing_token": 1})
    assert lease.is_held
    assert not expire_overdue_lease(leases), "the lease is not overdue"


async def test_expired_lease_is_lost_to_its_holder(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquire(lease)
    expire_lease(leases)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert not lease.is_held
    assert matches_document(leases, {**OVERDUE_LEASE_FILTER, "fencing_token": 2, "released": False})
    other = create_lease(connection)
    assert await acquire(other)
    assert other.fencing_token == 3
    await lease.release()
    assert matches_document(leases, {"fencing_token": 3, "released": False})
    assert other.is_held
    await other.release()


async def test_taken_lease_is_not_released_by_former_holder(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquire(lease)
    other = create_lease(connection)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await other.acquire({}):  # a heartbeat may extend the lease in between
            make_lease_overdue(leases)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert (lease.is_held, other.is_held) == (False, True)
    await lease.release()
    assert not matches_document(leases, OVERDUE_LEASE_FILTER)
    await other.release()


async def test_lost_lease_can_be_acquired_again(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquire(lease)
    expire_lease(leases)
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    await lease.release()
    assert await acquire(lease)
    assert (lease.is_held, lease.fencing_token) == (True, 3)


async def test_deleted_lease_is_lost(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquire(lease)
    leases.delete_one({"_id": "the-lease"})
    await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
    assert not lease.is_held


async def test_short_block_of_event_loop_keeps_lease(lease: Lease, leases: Collection[Document]) -> None:
    assert await acquire(lease)
    time.sleep(LEASE_SECONDS)  # noqa: ASYNC251 - blocks the event loop
    assert not matches_document(leases, OVERDUE_LEASE_FILTER)
    await asyncio.sleep(0)
    assert lease.is_held


async def test_lease_of_crashed_holder_is_free_after_its_duration(
    connection: Connection, leases: Collection[Document]
) -> None:
    class LeaseWithoutHeartbeat(Lease):
        def _extend_until_stopped(self, *_: Any) -> bool:
            return True  # no heartbeat is sent

    dead_holder_lease = LeaseWithoutHeartbeat(connection, "leases", "the-lease", seconds=LEASE_SECONDS)
    started = time.monotonic()
    assert await acquire(dead_holder_lease)
    next_lease = create_lease(connection)
    is_acquired = await acquire(next_lease)
    assert not is_acquired or time.monotonic() - started > LEASE_SECONDS - 0.05
    assert is_acquired or await acquire_when_free(next_lease)
    assert time.monotonic() - started > LEASE_SECONDS - 0.05
    assert next_lease.fencing_token == 2
    await next_lease.release()


async def test_lease_after_network_silence_continues_unless_expired(
    mongodb_uri: str, db_name: str, leases: Collection[Document]
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = create_lease(Connection(proxy.uri, db_name))
        assert await acquire(lease)
        proxy.suspend()
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert matches_document(leases, {**OVERDUE_LEASE_FILTER, "fencing_token": 1})
        assert lease.is_held
        assert lease.uninterrupted_seconds == 0
        resumed = time.monotonic()
        proxy.resume()
        await wait_until_extended(leases)
        assert lease.is_held
        assert lease.uninterrupted_seconds < time.monotonic() - resumed

        proxy.suspend()
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert expire_overdue_lease(leases)
        proxy.resume()
        await asyncio.wait_for(lease.wait_lost(), DEADLINE_SECONDS)
        await lease.release()
        assert matches_document(leases, {**OVERDUE_LEASE_FILTER, "fencing_token": 2, "released": False})


async def test_lease_over_slow_network_is_extended_after_an_outage(
    mongodb_uri: str, db_name: str, leases: Collection[Document]
) -> None:
    """To open a connection takes longer than the lease: about five round trips."""
    with TcpProxy(mongodb_uri) as proxy:
        lease = create_lease(Connection(proxy.uri, db_name))
        assert await acquire(lease)
        proxy.suspend()
        await asyncio.sleep(2 * LEASE_SECONDS)
        proxy.close_connections()
        proxy.delay_seconds = LEASE_SECONDS / 8
        proxy.resume()
        await wait_until_extended(leases)
        assert lease.is_held
        proxy.delay_seconds = 0.0
        await lease.release()


@pytest.mark.parametrize("silent_seconds", [0.0, 2 * LEASE_SECONDS], ids=["valid lease", "overdue lease"])
async def test_release_over_silent_network_ends_in_time(mongodb_uri: str, db_name: str, silent_seconds: float) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = create_lease(Connection(proxy.uri, db_name))
        assert await acquire(lease)
        proxy.suspend()
        await asyncio.sleep(silent_seconds)
        started = time.monotonic()
        await asyncio.wait_for(lease.release(), DEADLINE_SECONDS)
        assert time.monotonic() - started < 6 * LEASE_SECONDS


async def test_broken_connections_do_not_lose_lease(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        lease = create_lease(Connection(proxy.uri, db_name))
        assert await acquire(lease)
        for _ in range(3):
            await asyncio.sleep(LEASE_SECONDS / 2)
            proxy.close_connections()
        await asyncio.sleep(LEASE_SECONDS)
        assert lease.is_held
        await lease.release()


async def test_acquire_without_database_fails_within_timeout(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        pass
    lease = create_lease(Connection(proxy.uri, db_name, connect_timeout_ms=300))
    with pytest.raises(LedgerUnavailable):
        await acquire(lease)
    assert not lease.is_held


async def test_error_in_acquire_is_raised(connection: Connection) -> None:
    class FailingLease(Lease):
        def _try_acquire(self, *_: Any) -> int | None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await acquire(FailingLease(connection, "leases", "the-lease", seconds=LEASE_SECONDS))


async def test_cancelled_acquire_does_not_keep_lease(connection: Connection, leases: Collection[Document]) -> None:
    class SlowLease(Lease):
        taken, may_continue = threading.Event(), threading.Event()

        def _try_acquire(
            self, leases: Collection[Document], attributes: Mapping[str, Any], observation: LeaseObservation
        ) -> int | None:
            fencing_token = super()._try_acquire(leases, attributes, observation)
            self.taken.set()
            self.may_continue.wait(DEADLINE_SECONDS)
            return fencing_token

    lease = SlowLease(connection, "leases", "the-lease", seconds=LEASE_SECONDS)
    acquiring = asyncio.create_task(lease.acquire({}))
    await asyncio.to_thread(lease.taken.wait, DEADLINE_SECONDS)
    acquiring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await acquiring
    second_acquire = asyncio.create_task(lease.acquire({}))  # while the thread of the first call still runs
    await asyncio.sleep(0)
    lease.may_continue.set()
    if not await asyncio.wait_for(second_acquire, DEADLINE_SECONDS):
        assert await acquire_when_free(lease)
    assert lease.is_held
    await lease.release()
    assert matches_document(leases, OVERDUE_LEASE_FILTER)


async def test_blocked_event_loop_makes_lease_overdue_until_it_continues(
    connection: Connection, lease: Lease, leases: Collection[Document]
) -> None:
    assert await acquire(lease)
    await asyncio.sleep(0.1)
    time.sleep(2.5 * LEASE_SECONDS)  # noqa: ASYNC251 - the injected fault
    assert matches_document(leases, OVERDUE_LEASE_FILTER)
    assert lease.is_held, "no other process has taken the lease"
    await wait_until_extended(leases)


async def test_loop_ticker_counts_checks_not_seconds() -> None:
    ticker = LoopTicker(0.01)
    await asyncio.sleep(0.03)
    assert ticker.count_missed() == 0
    time.sleep(1)  # noqa: ASYNC251 - like a suspended machine
    assert ticker.count_missed() == 1
    assert ticker.count_missed() == 2
    assert "test_loop_ticker" in ticker.format_stack()
    await asyncio.sleep(0.03)
    assert ticker.count_missed() == 0
    ticker.stop()
