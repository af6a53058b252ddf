"""Tests of the log buffer: it limits the size of a job's log and keeps its last lines."""

from __future__ import annotations

import pytest

from jobledger.ledger.domain.limits import LOG_ENTRY_OVERHEAD_BYTES, MAX_JOB_LOG_BYTES
from jobledger.workers.attempts.log_buffer import BURST_BYTES, FLOOD_TAIL_ENTRIES, MIN_ATTEMPT_BYTES, LogBuffer

WIDTH = 1000
DAY = 24 * 3600


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("jobledger.workers.attempts.log_buffer.time.monotonic", lambda: self.now)


def log_lines(buffer: LogBuffer, clock: Clock, *, lines: int, seconds: float) -> list[str]:
    """Log lines at a steady rate. Return the lines that are kept."""
    kept = []
    for number in range(lines):
        clock.now += seconds / lines
        buffer.add((0.0, "info", f"{number} ".ljust(WIDTH, "x"), ""))
        if number % 50 == 0:
            kept += buffer.take()
    kept += buffer.take(is_last=True)
    return [line.message for part in kept for line in part]


def count_bytes(lines: list[str]) -> int:
    return sum(len(line) + LOG_ENTRY_OVERHEAD_BYTES for line in lines)


def test_log_of_a_day_is_bounded_and_keeps_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lines = log_lines(LogBuffer(), clock, lines=100_000, seconds=DAY)
    assert (
        MAX_JOB_LOG_BYTES - BURST_BYTES
        < count_bytes(lines)
        < MAX_JOB_LOG_BYTES + 2 * FLOOD_TAIL_ENTRIES * (WIDTH + LOG_ENTRY_OVERHEAD_BYTES)
    )
    notices = [line for line in lines if "were dropped here" in line]
    assert len(notices) == 1
    assert "16.0 MiB in total" in notices[0]
    assert [int(line.split()[0]) for line in lines[-FLOOD_TAIL_ENTRIES:]] == list(
        range(100_000 - FLOOD_TAIL_ENTRIES, 100_000)
    )


def test_log_of_many_attempts_is_bounded_and_each_keeps_some_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, total = Clock(monkeypatch), 0
    for _ in range(8):
        lines = log_lines(LogBuffer(total), clock, lines=10_000, seconds=DAY)
        assert count_bytes(lines) >= MIN_ATTEMPT_BYTES / 2
        assert lines[-1].startswith("9999 ")
        total += count_bytes(lines)
    assert total < MAX_JOB_LOG_BYTES + 8 * (
        MIN_ATTEMPT_BYTES + 2 * FLOOD_TAIL_ENTRIES * (WIDTH + LOG_ENTRY_OVERHEAD_BYTES)
    )


def test_log_of_usual_size_is_kept_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lines = log_lines(LogBuffer(), clock, lines=3000, seconds=600)
    assert [int(line.split()[0]) for line in lines] == list(range(3000))
