"""Statuses of jobs, batches and deliveries. Imports nothing, so the command line loads it immediately."""

from __future__ import annotations

from typing import Final, Literal

JobStatus = Literal["pending", "processing", "completed", "failed", "cancelled"]
BatchStatus = Literal["processing", "completed", "partial", "failed"]
DeliveryStatus = Literal["pending", "delivered", "abandoned"]
RestartScope = Literal["failed", "cancelled", "completed", "all"]
"""Which finished jobs of a batch a restart affects, by their status."""
TERMINAL_STATUSES: Final[frozenset[JobStatus]] = frozenset({"completed", "failed", "cancelled"})
"""A job with one of these statuses is finished."""
