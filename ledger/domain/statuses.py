"""Statuses of jobs, batches and deliveries. Imports nothing, so the command line loads it immediately."""

from __future__ import annotations

from typing import Final, Literal

JobStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]
BatchStatus = Literal["processing", "completed", "partial", "failed"]
DeliveryStatus = Literal["pending", "delivered", "abandoned"]
WaitingFor = Literal["worker", "due_time", "retry", "batch_paused"]
"""What a pending job waits for: a worker, its earliest start, its next attempt after an error, or its paused batch."""
RestartScope = Literal["failed", "cancelled", "completed", "all"]
"""Which finished jobs of a batch a restart affects, by their status."""
TERMINAL_STATUSES: Final[frozenset[JobStatus]] = frozenset({"completed", "failed", "cancelled"})
"""A job with one of these statuses is finished."""
