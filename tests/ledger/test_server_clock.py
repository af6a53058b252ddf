"""The server's clock: estimated on a steady clock, whatever this machine's clock says or does."""

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


class Steady:
    """A steady clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 500.0
        monkeypatch.setattr(server_clock, "_steady", lambda: self.seconds)


class Server:
    """Answers `hello` with its own time; each answer takes a while."""

    def __init__(self, steady: Steady, *, time: float, takes: list[float] | None = None) -> None:
        self.steady = steady
        self.ahead = time - steady.seconds
        self.takes = takes or []
        self.asked = 0
        self.admin = self

    @property
    def time(self) -> float:
        return self.steady.seconds + self.ahead

    async def command(self, _name: str) -> dict[str, Any]:
        said = self.time
        self.asked += 1
        self.steady.seconds += self.takes.pop(0) if self.takes else 0.001
        return {"localTime": datetime.fromtimestamp(said, UTC).replace(tzinfo=None)}  # as the driver does


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Steady:
    return Steady(monkeypatch)


def wrong_by(clock: ServerClock, server: Server) -> float:
    """Return how far the estimate is ahead of the server."""
    return clock.estimate().timestamp() - server.time


async def test_estimate_follows_the_server_without_asking(steady: Steady) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.observe(server.time, "a")
    for _ in range(10):
        steady.seconds += 1000
        assert abs(wrong_by(clock, server)) < 1e-3
        await clock.now(server)  # type: ignore[arg-type]
    assert server.asked == 0


async def test_estimate_does_not_follow_this_machines_clock(steady: Steady, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.observe(server.time, "a")

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            raise AssertionError("this machine's clock was read")

    monkeypatch.setattr(server_clock, "datetime", Wrong)
    assert abs(wrong_by(clock, server)) < 1e-3


@pytest.mark.parametrize("step", [3600.0, -3600.0, 1.0, -1.0])
async def test_step_of_the_servers_clock_is_taken_over_with_its_next_heartbeat(steady: Steady, step: float) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.observe(server.time, "a")
    server.ahead += step
    clock.observe(server.time, "a")
    await clock.now(server)  # type: ignore[arg-type]
    assert abs(wrong_by(clock, server)) < 0.01
    assert server.asked == (1 if step < 0 else 0), "only a clock that seems to be behind has to be asked"
    assert not clock.is_uncertain


@pytest.mark.parametrize("ahead", [120.0, -120.0, 0.05])
async def test_another_primary_is_asked(steady: Steady, ahead: float) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.observe(server.time, "a")
    other = Server(steady, time=START + ahead)
    clock.observe(other.time, "b")
    assert clock.is_uncertain
    await clock.now(other)  # type: ignore[arg-type]
    assert abs(wrong_by(clock, other)) < 0.01
    assert not clock.is_uncertain


async def test_late_heartbeat_neither_sets_the_clock_back_nor_stays_unchecked(steady: Steady) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.observe(server.time, "a")
    said = server.time
    steady.seconds += 5  # this process was busy
    clock.observe(said, "a")
    assert abs(wrong_by(clock, server)) < 1e-3
    await clock.now(server)  # type: ignore[arg-type]
    assert (server.asked, clock.is_uncertain) == (1, False)
    clock.observe(server.time - TOLERANCE_SECONDS / 2, "a")
    assert not clock.is_uncertain


@pytest.mark.parametrize("step", [-3600.0, -1.0])
async def test_estimate_follows_a_clock_set_back_in_a_process_that_only_estimates(steady: Steady, step: float) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.attach_client(server)  # type: ignore[arg-type]
    clock.observe(server.time, "a")
    server.ahead += step
    clock.observe(server.time, "a")
    await settled()
    assert abs(wrong_by(clock, server)) < 0.01
    assert (server.asked, clock.is_uncertain) == (1, False)
    clock.observe(server.time, "a")
    await settled()
    assert server.asked == 1, "only a contradiction costs a question"


async def test_measurement_without_an_answer_is_repeated_with_the_next_heartbeat(steady: Steady) -> None:
    clock, server = ServerClock(), Server(steady, time=START)
    clock.attach_client(server)  # type: ignore[arg-type]
    clock.observe(server.time, "a")
    answer, failures = server.command, [AutoReconnect("away"), AutoReconnect("away")]

    async def failing(name: str) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return await answer(name)

    server.command = failing  # type: ignore[method-assign, assignment]
    server.ahead -= 3600
    for _ in range(3):
        clock.observe(server.time, "a")
        await settled()
    assert abs(wrong_by(clock, server)) < 0.01


async def settled() -> None:
    """Let tasks run that need no I/O."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_of_slow_answers_the_best_counts_and_none_is_ahead(steady: Steady) -> None:
    clock, server = ServerClock(), Server(steady, time=START, takes=[3.0, 0.5, 2.0])
    await clock.now(server)  # type: ignore[arg-type]
    assert server.asked == 3
    assert -0.5 - 1e-3 < wrong_by(clock, server) <= 1e-3


def test_timer_naps_are_short_and_never_negative(steady: Steady) -> None:
    clock = ServerClock()
    clock.observe(START, "a")
    due = clock.estimate()
    assert clock.sleep_seconds_until(due + timedelta(days=1)) == MAX_SLEEP_SECONDS
    assert clock.sleep_seconds_until(due + timedelta(seconds=2)) == pytest.approx(2)
    assert clock.sleep_seconds_until(due - timedelta(days=1)) == clock.seconds_until(due - timedelta(days=1)) == 0


@pytest.fixture
async def log(connection: Connection) -> AsyncIterator[EventStore]:
    client = connection.client()
    yield EventStore(client[connection.db_name])
    await client.close()


async def test_clock_of_a_real_server_is_known_with_the_first_answer(log: EventStore) -> None:
    await log.head_position()
    told = await log._db.client.admin.command("hello")
    assert abs((log.clock.estimate() - told["localTime"].replace(tzinfo=UTC)).total_seconds()) < 1
    assert get_server_clock(log._db.client) is log.clock
    assert not log.clock.is_uncertain


async def test_unreachable_server_leaves_the_last_estimate(log: EventStore) -> None:
    await log.head_position()
    log.clock.is_uncertain = True
    await log._db.client.close()
    before = log.clock.estimate()
    assert timedelta(0) <= await log.server_time() - before < timedelta(seconds=5)
    await asyncio.sleep(0)
