"""Test the pacing of frequent work. The clock of the event loop is simulated."""

from __future__ import annotations

import asyncio

import pytest

from jobledger.ledger.system.pacing import BURST, PACE_SECONDS, Pacer
from tests.support.event_loop_clock import advance_clock
from tests.support.polling import DEADLINE_SECONDS


@pytest.fixture
async def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the pacer. They pass at once."""
    paused: list[float] = []

    async def sleep(_pacer: Pacer, seconds: float) -> None:
        paused.append(seconds)
        advance_clock(seconds)

    monkeypatch.setattr(Pacer, "_sleep", sleep)
    loop = asyncio.get_running_loop()
    loop.time = lambda: 1000.0  # type: ignore[method-assign]
    return paused


async def test_rare_turns_start_at_once(pauses: list[float]) -> None:
    pacer = Pacer()
    for _ in range(10 * BURST):
        await pacer.wait()
        advance_clock(PACE_SECONDS)
    assert pauses == []


async def test_frequent_turns_are_paced_after_a_burst(pauses: list[float]) -> None:
    pacer = Pacer()
    for _ in range(BURST + 10):
        await pacer.wait()
    assert pauses == pytest.approx([PACE_SECONDS] * 10)


async def test_burst_is_saved_up_again_in_a_pause(pauses: list[float]) -> None:
    pacer = Pacer()
    for _ in range(BURST + 3):
        await pacer.wait()
    advance_clock(100.0)
    pauses.clear()
    for _ in range(BURST):
        await pacer.wait()
    assert pauses == []
    await pacer.wait()
    assert pauses == pytest.approx([PACE_SECONDS])


async def test_urgent_turns_start_at_once_and_delay_none_afterwards(pauses: list[float]) -> None:
    is_urgent = True
    pacer = Pacer(lambda: 0.0 if is_urgent else PACE_SECONDS)
    for _ in range(1000):
        await pacer.wait()
    assert pauses == []
    is_urgent = False
    await pacer.wait()
    assert sum(pauses) <= PACE_SECONDS


async def test_hurry_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.ledger.system.pacing.PACE_SECONDS", 3600.0)
    pacer = Pacer()
    for _ in range(BURST):
        await pacer.wait()
    waiting = asyncio.create_task(pacer.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    pacer.hurry()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await waiting
