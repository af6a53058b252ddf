"""api: a job's events told as attempts, each with its steps, on one line of time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

TIMELINE_WIDTH: Final = 1000
"""Of the drawing, in its own units."""
_OUTCOMES: Final = {
    "JobCompleted": "completed",
    "JobFailed": "failed",
    "JobAttemptFailed": "failed",
    "JobCancelled": "cancelled",
    "JobReleased": "released",
    "JobLeaseExpired": "lost",
}


@dataclass(slots=True)
class TimelineStep:
    """A step that was done, from `x` on so `wide` in the drawing."""

    name: str
    duration_seconds: float
    finished_at: datetime
    is_reused: bool
    x: float = 0
    width: float = 0


@dataclass(slots=True)
class TimelineAttempt:
    """One attempt. `outcome` is None while it goes on; `why` says what went wrong, `retry_at` when the next is due."""

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
    """Return the attempts that the events of a job tell of, placed on the line from its submission until its end."""
    attempts: list[TimelineAttempt] = []
    for event in events:
        data, time = event["data"], datetime.fromisoformat(event["time"])
        if event["type"] == "JobClaimed":
            attempts.append(TimelineAttempt(data["attempt"], data["worker_id"], time))
        elif not attempts or attempts[-1].finished_at is not None:
            continue
        elif event["type"] == "StepCompleted":
            reused = data.get("reused_from") is not None
            attempts[-1].steps.append(TimelineStep(data["step"], float(data["duration_s"]), time, reused))
        elif event["type"] in _OUTCOMES:
            last = attempts[-1]
            last.finished_at, last.outcome = time, _OUTCOMES[event["type"]]
            last.reason = (data.get("error") or {}).get("message") or data.get("reason")
            last.retry_at = data.get("retry_at")
    _set_positions(events, attempts, now)
    return attempts


def _set_positions(events: Sequence[dict[str, Any]], attempts: Sequence[TimelineAttempt], now: datetime) -> None:
    if not attempts:
        return
    begin = datetime.fromisoformat(events[0]["time"])
    end = max(attempt.finished_at or now for attempt in attempts)
    whole = max((end - begin).total_seconds(), 0.001)

    def at(time: datetime) -> float:
        return round(min(max((time - begin).total_seconds() / whole, 0), 1) * TIMELINE_WIDTH, 1)

    for attempt in attempts:
        attempt.x = at(attempt.started_at)
        attempt.width = max(at(attempt.finished_at or now) - attempt.x, 2)
        for step in attempt.steps:
            step.x = max(at(step.finished_at - timedelta(seconds=step.duration_seconds)), attempt.x)
            step.width = max(at(step.finished_at) - step.x, 2)
