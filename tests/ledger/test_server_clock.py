"""The estimate of the server's clock. It uses a boot-time clock, so changes of the local clock do not matter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from jobledger.ledger.mongo import server_clock
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.server_clock import MAX_SLEEP_SECONDS, TOLERANCE_SECONDS, ServerClock, get_server_clock
from jobledger.ledger.store.event_store import EventStore

START = 1_800_000_000.0


class BootTimeClock:
    """A boot-time clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 500.0
        monkeypatch.setattr(server_clock, "_read_boot_time_clock", lambda: self.seconds)


class FakeServer:
    """Responds to `hello` with its own time. Each response takes some time."""

    def __init__(
        self, boot_time_clock: BootTimeClock, *, time: float, response_seconds: list[float] | None = None
    ) -> None:
        self.boot_time_clock = boot_time_clock
        self.ahead = time - boot_time_clock.seconds
        self.response_seconds = response_seconds or []
        self.requests = 0
        self.admin = self

    @property
    def time(self) -> float:
        return self.boot_time_clock.seconds + self.ahead

    async def command(self, _name: str) -> dict[str, Any]:
        server_seconds = self.time
        self.requests += 1
        self.boot_time_clock.seconds += self.response_seconds.pop(0) if self.response_seconds else 0.001
        return {"localTime": datetime.fromtimestamp(server_seconds, UTC).replace(tzinfo=None)}  # as the driver does


@pytest.fixture
def boot_time_clock(monkeypatch: pytest.MonkeyPatch) -> BootTimeClock:
    return BootTimeClock(monkeypatch)


def estimate_error(clock: ServerClock, server: FakeServer) -> float:
    """Return how far the estimate is ahead of the server."""
    return clock.estimate().timestamp() - server.time


async def test_estimate_follows_server_without_request(boot_time_clock: BootTimeClock) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.observe(server.time, "a")
    for _ in range(10):
        boot_time_clock.seconds += 1000
        assert abs(estimate_error(clock, server)) < 1e-3
        await clock.now(server)  # type: ignore[arg-type]
    assert server.requests == 0


async def test_estimate_ignores_local_clock(boot_time_clock: BootTimeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.observe(server.time, "a")

    class FailingDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            raise AssertionError("the local clock was read")

    monkeypatch.setattr(server_clock, "datetime", FailingDatetime)
    assert abs(estimate_error(clock, server)) < 1e-3


@pytest.mark.parametrize("step", [3600.0, -3600.0, 1.0, -1.0])
async def test_server_clock_step_is_adopted_with_next_heartbeat(boot_time_clock: BootTimeClock, step: float) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.observe(server.time, "a")
    server.ahead += step
    clock.observe(server.time, "a")
    await clock.now(server)  # type: ignore[arg-type]
    assert abs(estimate_error(clock, server)) < 0.01
    assert server.requests == (1 if step < 0 else 0), "a request is needed only if the server seems to be behind"
    assert not clock.is_uncertain


@pytest.mark.parametrize("ahead", [120.0, -120.0, 0.05])
async def test_new_primary_is_queried_for_its_time(boot_time_clock: BootTimeClock, ahead: float) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.observe(server.time, "a")
    other = FakeServer(boot_time_clock, time=START + ahead)
    clock.observe(other.time, "b")
    assert clock.is_uncertain
    await clock.now(other)  # type: ignore[arg-type]
    assert abs(estimate_error(clock, other)) < 0.01
    assert not clock.is_uncertain


async def test_late_heartbeat_is_verified_and_does_not_set_clock_back(boot_time_clock: BootTimeClock) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.observe(server.time, "a")
    server_seconds = server.time
    boot_time_clock.seconds += 5  # this process was busy
    clock.observe(server_seconds, "a")
    assert abs(estimate_error(clock, server)) < 1e-3
    await clock.now(server)  # type: ignore[arg-type]
    assert (server.requests, clock.is_uncertain) == (1, False)
    clock.observe(server.time - TOLERANCE_SECONDS / 2, "a")
    assert not clock.is_uncertain


@pytest.mark.parametrize("step", [-3600.0, -1.0])
async def test_attached_client_follows_clock_that_was_set_back(boot_time_clock: BootTimeClock, step: float) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.attach_client(server)  # type: ignore[arg-type]
    clock.observe(server.time, "a")
    server.ahead += step
    clock.observe(server.time, "a")
    await run_ready_tasks()
    assert abs(estimate_error(clock, server)) < 0.01
    assert (server.requests, clock.is_uncertain) == (1, False)
    clock.observe(server.time, "a")
    await run_ready_tasks()
    assert server.requests == 1, "only a contradiction causes a request"


async def test_failed_measurement_is_retried_with_next_heartbeat(boot_time_clock: BootTimeClock) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START)
    clock.attach_client(server)  # type: ignore[arg-type]
    clock.observe(server.time, "a")
    response, failures = server.command, [AutoReconnect("away"), AutoReconnect("away")]

    async def failing(name: str) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return await response(name)

    server.command = failing  # type: ignore[method-assign, assignment]
    server.ahead -= 3600
    for _ in range(3):
        clock.observe(server.time, "a")
        await run_ready_tasks()
    assert abs(estimate_error(clock, server)) < 0.01


async def run_ready_tasks() -> None:
    """Let tasks run that need no I/O."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slow_responses_yield_best_estimate_never_ahead(boot_time_clock: BootTimeClock) -> None:
    clock, server = ServerClock(), FakeServer(boot_time_clock, time=START, response_seconds=[3.0, 0.5, 2.0])
    await clock.now(server)  # type: ignore[arg-type]
    assert server.requests == 3
    assert -0.5 - 1e-3 < estimate_error(clock, server) <= 1e-3


def test_sleep_seconds_are_bounded_and_never_negative(boot_time_clock: BootTimeClock) -> None:
    clock = ServerClock()
    clock.observe(START, "a")
    due = clock.estimate()
    assert clock.compute_sleep_seconds(due + timedelta(days=1)) == MAX_SLEEP_SECONDS
    assert clock.compute_sleep_seconds(due + timedelta(seconds=2)) == pytest.approx(2)
    assert (
        clock.compute_sleep_seconds(due - timedelta(days=1))
        == clock.compute_seconds_until(due - timedelta(days=1))
        == 0
    )


@pytest.fixture
async def event_store(connection: Connection) -> AsyncIterator[EventStore]:
    client = connection.create_client()
    yield EventStore(client[connection.db_name])
    await client.close()


async def test_first_response_of_real_server_sets_clock(event_store: EventStore) -> None:
    await event_store.read_head_position()
    response = await event_store.db.client.admin.command("hello")
    assert abs((event_store.clock.estimate() - response["localTime"].replace(tzinfo=UTC)).total_seconds()) < 1
    assert get_server_clock(event_store.db.client) is event_store.clock
    assert not event_store.clock.is_uncertain


async def test_unreachable_server_keeps_last_estimate(event_store: EventStore) -> None:
    await event_store.read_head_position()
    event_store.clock.is_uncertain = True
    await event_store.db.client.close()
    before = event_store.clock.estimate()
    assert timedelta(0) <= await event_store.read_server_time() - before < timedelta(seconds=5)
    await asyncio.sleep(0)
