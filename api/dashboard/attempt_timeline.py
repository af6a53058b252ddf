"""api: a job's events told as attempts, each with its steps, on one line of time. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

WIDTH: Final = 1000
"""Of the drawing, in its own units."""
_ENDS: Final = {
    "JobCompleted": "completed",
    "JobFailed": "failed",
    "JobAttemptFailed": "failed",
    "JobCancelled": "cancelled",
    "JobReleased": "released",
    "JobLeaseExpired": "lost",
}


@dataclass(slots=True)
class Step:
    """A step that was done, from `x` on so `wide` in the drawing."""

    name: str
    seconds: float
    ended: datetime
    reused: bool
    x: float = 0
    wide: float = 0


@dataclass(slots=True)
class Attempt:
    """One attempt. `outcome` is None while it goes on; `why` says what went wrong, `retry_at` when the next is due."""

    number: int
    worker: str
    began: datetime
    ended: datetime | None = None
    outcome: str | None = None
    why: str | None = None
    retry_at: str | None = None
    steps: list[Step] = field(default_factory=list)
    x: float = 0
    wide: float = 0

    @property
    def seconds(self) -> float | None:
        return None if self.ended is None else (self.ended - self.began).total_seconds()


def attempts_of(events: Sequence[dict[str, Any]], now: datetime) -> list[Attempt]:
    """Return the attempts that the events of a job tell of, placed on the line from its submission until its end."""
    attempts: list[Attempt] = []
    for event in events:
        data, time = event["data"], datetime.fromisoformat(event["time"])
        if event["type"] == "JobClaimed":
            attempts.append(Attempt(data["attempt"], data["worker_id"], time))
        elif not attempts or attempts[-1].ended is not None:
            continue
        elif event["type"] == "StepCompleted":
            reused = data.get("reused_from") is not None
            attempts[-1].steps.append(Step(data["step"], float(data["duration_s"]), time, reused))
        elif event["type"] in _ENDS:
            last = attempts[-1]
            last.ended, last.outcome = time, _ENDS[event["type"]]
            last.why = (data.get("error") or {}).get("message") or data.get("reason")
            last.retry_at = data.get("retry_at")
    _place(events, attempts, now)
    return attempts


def _place(events: Sequence[dict[str, Any]], attempts: Sequence[Attempt], now: datetime) -> None:
    if not attempts:
        return
    begin = datetime.fromisoformat(events[0]["time"])
    end = max(attempt.ended or now for attempt in attempts)
    whole = max((end - begin).total_seconds(), 0.001)

    def at(time: datetime) -> float:
        return round(min(max((time - begin).total_seconds() / whole, 0), 1) * WIDTH, 1)

    for attempt in attempts:
        attempt.x = at(attempt.began)
        attempt.wide = max(at(attempt.ended or now) - attempt.x, 2)
        for step in attempt.steps:
            step.x = max(at(step.ended - timedelta(seconds=step.seconds)), attempt.x)
            step.wide = max(at(step.ended) - step.x, 2)
