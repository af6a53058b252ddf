"""workers: gather the log lines of an attempt, and leave out what is too much.

A job may log as often as it likes. The log stays readable and memory bounded: beyond a large burst and a steady rate,
lines are counted and left out, but for the last ones before the flood ends. A line says how much was left out. All
lines of a job together are bounded, too, because whoever decides on a job reads its whole stream.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Final

from jobledger.ledger.domain.events import LogEntry
from jobledger.ledger.domain.limits import LOG_ENTRY_OVERHEAD_BYTES, MAX_JOB_LOG_BYTES
from jobledger.workers.child.messages import LogLine

BURST_LINES: Final = 10_000
LINES_PER_SECOND: Final = 200
BURST_BYTES: Final = 4 * 1024 * 1024
BYTES_PER_SECOND: Final = 64 * 1024
FLOOD_TAIL_LINES: Final = 100  # of a flood, that are kept in any case
MIN_ATTEMPT_BYTES: Final = 256 * 1024
"""What an attempt may log at least, however much earlier ones have."""
MAX_EVENT_LINES: Final = 2000
MAX_EVENT_BYTES: Final = 512 * 1024


class LogBuffer:
    """Log lines on their way to the event log. The rate is that of a token bucket.

    `logged_bytes` is what earlier attempts of the job have logged (`jobledger.ledger.domain.job.Job.log_bytes`).
    """

    def __init__(self, logged_bytes: int = 0) -> None:
        self._left = max(MIN_ATTEMPT_BYTES, MAX_JOB_LOG_BYTES - logged_bytes)
        self._lines: list[LogLine] = []
        self._bytes = 0
        self._last: deque[LogLine] = deque()
        self._last_bytes = 0
        self._left_out = 0
        self._left_out_bytes = 0
        self._free_lines = float(BURST_LINES)
        self._free_bytes = float(BURST_BYTES)
        self._refilled = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take, now or later."""
        return not self._lines and not self._last

    def add(self, line: LogLine) -> None:
        """Add a line, or count it as left out."""
        size = len(line[2])
        free = min(self._free_bytes, self._left - LOG_ENTRY_OVERHEAD_BYTES)
        if not self._last and self._free_lines >= 1 and free >= size and self._bytes <= BURST_BYTES:
            self._keep(line, size)
            return
        self._last.append(line)
        self._last_bytes += size
        if len(self._last) > FLOOD_TAIL_LINES:
            size = len(self._last.popleft()[2])
            self._last_bytes -= size
            self._left_out += 1
            self._left_out_bytes += size

    def take(self, *, final: bool = False) -> list[tuple[LogEntry, ...]]:
        """Return the lines so far, in parts that each fit into an event.

        Args:
            final: There will be no more lines, so also the last ones of a flood are returned.
        """
        self._refill()
        free = min(self._free_bytes, self._left - (FLOOD_TAIL_LINES + 1) * LOG_ENTRY_OVERHEAD_BYTES)
        enough = self._free_lines >= FLOOD_TAIL_LINES and free >= self._last_bytes
        if self._last and (final or enough):
            self._end_flood()
        lines, self._lines, self._bytes = self._lines, [], 0
        return _parts(lines)

    def _refill(self) -> None:
        now = time.monotonic()
        passed, self._refilled = now - self._refilled, now
        self._free_lines = min(BURST_LINES, self._free_lines + passed * LINES_PER_SECOND)
        self._free_bytes = min(BURST_BYTES, self._free_bytes + passed * BYTES_PER_SECOND)

    def _end_flood(self) -> None:
        if self._left_out:
            text = (
                f"{self._left_out:,} log lines ({_size(self._left_out_bytes)}) were left out here. A job may log "
                f"{BURST_LINES:,} lines or {_size(BURST_BYTES)} at once, {LINES_PER_SECOND} lines or "
                f"{_size(BYTES_PER_SECOND)} per second, and {_size(MAX_JOB_LOG_BYTES)} in all."
            )
            self._keep((self._last[0][0], "warning", text), len(text))
            self._left_out = self._left_out_bytes = 0
        for line in self._last:
            self._keep(line, len(line[2]))
        self._last.clear()
        self._last_bytes = 0

    def _keep(self, line: LogLine, size: int) -> None:
        self._lines.append(line)
        self._bytes += size + LOG_ENTRY_OVERHEAD_BYTES
        self._left -= size + LOG_ENTRY_OVERHEAD_BYTES
        self._free_lines -= 1
        self._free_bytes -= size


def _parts(lines: list[LogLine]) -> list[tuple[LogEntry, ...]]:
    parts: list[tuple[LogEntry, ...]] = []
    part: list[LogEntry] = []
    size = 0
    for at, level, message in lines:
        if part and (len(part) >= MAX_EVENT_LINES or size + len(message) > MAX_EVENT_BYTES):
            parts.append(tuple(part))
            part, size = [], 0
        part.append(LogEntry(timestamp=_moment(at), level=level, message=message))
        size += len(message)
    return [*parts, tuple(part)] if part else parts


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{max(1, count // 1024)} KiB"


def _moment(seconds: float) -> datetime:
    """Return a time that a job process has sent; if it is impossible, the time now."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.now(UTC)
