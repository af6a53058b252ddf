"""The attempts of a job and their steps, built from the job's events and placed on one time axis. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

TIMELINE_WIDTH: Final = 1000
"""Width of the drawing, in SVG user units."""
_MIN_WIDTH: Final = 2
OUTCOMES: Final = {
    "JobCompleted": "completed",
    "JobFailed": "failed",
    "JobAttemptFailed": "failed",
    "JobCancelled": "cancelled",
    "JobReleased": "released",
    "JobLeaseExpired": "lease_expired",
}
"""Maps the type of an event that ends an attempt to the attempt's outcome."""


@dataclass(slots=True)
class TimelineStep:
    """A completed step. `x` and `width` are in SVG user units."""

    name: str
    duration_seconds: float
    finished_at: datetime
    is_reused: bool
    x: float = 0
    width: float = 0


@dataclass(slots=True)
class TimelineAttempt:
    """One attempt. `x` and `width` are in SVG user units.

    Attributes:
        outcome: One of `OUTCOMES`, or None while the attempt is running.
        reason: The error message, or the reason given by a user.
        retry_at: Start of the next attempt, as an ISO 8601 timestamp.
    """

    number: int
    worker_id: str
    started_at: datetime
    finished_at: datetime | None = None
    outcome: str | None = None
    reason: str | None = None
    retry_at: str | None = None
    steps: list[TimelineStep] = field(default_factory=list)
    x: float = 0
    width: float = 0

    @property
    def duration_seconds(self) -> float | None:
        return None if self.finished_at is None else (self.finished_at - self.started_at).total_seconds()


def build_attempt_timeline(events: Sequence[dict[str, Any]], now: datetime) -> list[TimelineAttempt]:
    """Return the attempts in the events of a job, placed on the time axis from its submission to its end.

    Args:
        events: The history of the job, as the API returns it.
        now: End of an attempt that is running.

    Raises:
        LookupError, TypeError, ValueError: An event is damaged.
    """
    attempts: list[TimelineAttempt] = []
    for event in events:
        data, time = event["data"], datetime.fromisoformat(event["time"])
        if event["type"] == "JobClaimed":
            attempts.append(TimelineAttempt(data["attempt"], data["worker_id"], time))
        elif not attempts or attempts[-1].finished_at is not None:
            continue
        elif event["type"] == "StepCompleted":
            is_reused = data.get("reused_from") is not None
            attempts[-1].steps.append(TimelineStep(data["step"], float(data["duration_s"]), time, is_reused))
        elif event["type"] in OUTCOMES:
            last = attempts[-1]
            last.finished_at, last.outcome = time, OUTCOMES[event["type"]]
            last.reason = (data.get("error") or {}).get("message") or data.get("reason")
            last.retry_at = data.get("retry_at")
    _set_positions(events, attempts, now)
    return attempts


def _set_positions(events: Sequence[dict[str, Any]], attempts: Sequence[TimelineAttempt], now: datetime) -> None:
    if not attempts:
        return
    begin = datetime.fromisoformat(events[0]["time"])
    end = max(attempt.finished_at or now for attempt in attempts)
    total_seconds = max((end - begin).total_seconds(), 0.001)

    def to_x(time: datetime) -> float:
        return round(min(max((time - begin).total_seconds() / total_seconds, 0), 1) * TIMELINE_WIDTH, 1)

    for attempt in attempts:
        attempt.x = to_x(attempt.started_at)
        attempt.width = max(to_x(attempt.finished_at or now) - attempt.x, _MIN_WIDTH)
        for step in attempt.steps:
            step.x = max(to_x(step.finished_at - timedelta(seconds=step.duration_seconds)), attempt.x)
            step.width = max(to_x(step.finished_at) - step.x, _MIN_WIDTH)
