"""Buffer the log entries of an attempt and limit their number and size.

The log stays readable and memory bounded. Beyond a large burst and a constant rate (a token bucket), entries are
counted and dropped, except for the last ones before the flood ends. An entry states how much was dropped. All entries
of a job together are bounded as well, because each command on a job reads its whole stream.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Final

from jobledger.ledger.domain.events import LogEntry
from jobledger.ledger.domain.limits import LOG_ENTRY_OVERHEAD_BYTES, MAX_JOB_LOG_BYTES
from jobledger.workers.child.messages import RawLogEntry

BURST_ENTRIES: Final = 10_000
ENTRIES_PER_SECOND: Final = 200
BURST_BYTES: Final = 4 * 1024 * 1024
BYTES_PER_SECOND: Final = 64 * 1024
FLOOD_TAIL_ENTRIES: Final = 100
"""Number of entries at the end of a flood that are always kept."""
MIN_ATTEMPT_BYTES: Final = 256 * 1024
"""Every attempt may log this much, regardless of earlier attempts."""
MAX_EVENT_ENTRIES: Final = 2000
MAX_EVENT_BYTES: Final = 512 * 1024


class LogBuffer:
    """Log entries that have not been written to the event store yet.

    Args:
        logged_bytes: Size of the entries of earlier attempts (`jobledger.ledger.domain.job.Job.log_bytes`).
    """

    def __init__(self, logged_bytes: int = 0) -> None:
        self._remaining_bytes = max(MIN_ATTEMPT_BYTES, MAX_JOB_LOG_BYTES - logged_bytes)
        self._entries: list[RawLogEntry] = []
        self._bytes = 0
        self._tail: deque[RawLogEntry] = deque()
        self._dropped = 0
        self._dropped_bytes = 0
        self._entry_tokens = float(BURST_ENTRIES)
        self._byte_tokens = float(BURST_BYTES)
        self._refilled = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether no entries are left for `take`, now or later."""
        return not self._entries and not self._tail

    def add(self, entry: RawLogEntry) -> None:
        """Add an entry, or count it as dropped."""
        size = len(entry[2])
        free = min(self._byte_tokens, self._remaining_bytes - LOG_ENTRY_OVERHEAD_BYTES)
        if not self._tail and self._entry_tokens >= 1 and free >= size and self._bytes <= BURST_BYTES:
            self._keep(entry, size)
            return
        self._tail.append(entry)
        if len(self._tail) > FLOOD_TAIL_ENTRIES:
            self._dropped += 1
            self._dropped_bytes += len(self._tail.popleft()[2])

    def take(self, *, is_last: bool = False) -> list[list[LogEntry]]:
        """Return and remove the entries, in chunks that each fit into an event.

        Args:
            is_last: Whether no more entries will come. If so, the last entries of a flood are returned as well.
        """
        self._refill()
        free = min(self._byte_tokens, self._remaining_bytes - (FLOOD_TAIL_ENTRIES + 1) * LOG_ENTRY_OVERHEAD_BYTES)
        is_flood_over = self._entry_tokens >= FLOOD_TAIL_ENTRIES and free >= sum(len(entry[2]) for entry in self._tail)
        if self._tail and (is_last or is_flood_over):
            self._end_flood()
        entries, self._entries, self._bytes = self._entries, [], 0
        return _split_into_chunks(entries)

    def _refill(self) -> None:
        now = time.monotonic()
        elapsed, self._refilled = now - self._refilled, now
        self._entry_tokens = min(BURST_ENTRIES, self._entry_tokens + elapsed * ENTRIES_PER_SECOND)
        self._byte_tokens = min(BURST_BYTES, self._byte_tokens + elapsed * BYTES_PER_SECOND)

    def _end_flood(self) -> None:
        if self._dropped:
            text = (
                f"{self._dropped:,} log entries ({_format_size(self._dropped_bytes)}) were dropped here. A job may log "
                f"{BURST_ENTRIES:,} entries or {_format_size(BURST_BYTES)} in a burst, {ENTRIES_PER_SECOND} entries or "
                f"{_format_size(BYTES_PER_SECOND)} per second, and {_format_size(MAX_JOB_LOG_BYTES)} in total."
            )
            self._keep((self._tail[0][0], "warning", text, ""), len(text))
            self._dropped = self._dropped_bytes = 0
        for entry in self._tail:
            self._keep(entry, len(entry[2]))
        self._tail.clear()

    def _keep(self, entry: RawLogEntry, size: int) -> None:
        self._entries.append(entry)
        self._bytes += size + LOG_ENTRY_OVERHEAD_BYTES
        self._remaining_bytes -= size + LOG_ENTRY_OVERHEAD_BYTES
        self._entry_tokens -= 1
        self._byte_tokens -= size


def _split_into_chunks(entries: list[RawLogEntry]) -> list[list[LogEntry]]:
    chunks: list[list[LogEntry]] = []
    chunk: list[LogEntry] = []
    size = 0
    for at, level, message, logger in entries:
        if chunk and (len(chunk) >= MAX_EVENT_ENTRIES or size + len(message) > MAX_EVENT_BYTES):
            chunks.append(chunk)
            chunk, size = [], 0
        chunk.append(LogEntry(timestamp=_to_datetime(at), level=level, message=message, logger=logger or None))
        size += len(message)
    return [*chunks, chunk] if chunk else chunks


def _format_size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{max(1, count // 1024)} KiB"


def _to_datetime(seconds: float) -> datetime:
    """Convert a timestamp from a job process. If it is out of range, return the current time."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.now(UTC)
