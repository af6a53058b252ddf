"""projections: the view `statistics`, counters that are kept, never counted.

Each job and batch adds its share to what there is now (`jobs`, `batches`, tracks), and takes it away when it is gone.
What has happened stays counted: events by type, how long completed jobs took, and how many ended in each of the last
minutes. All of it follows from the log alone; times are those of the events.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, Final

from pymongo import IndexModel

from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "statistics"
INDEXES: Final[list[IndexModel]] = []
_TRACK: Final = "track/"
_MAX_TRACK_CHARACTERS: Final = 200
CounterFields = tuple[tuple[str, str], ...]
"""To which field of which counter document one is added, for each."""
EVENTS: Final = "events"
"""The document that says how many events of which type have happened."""
UNKNOWN: Final = "unknown"
"""Stands for all types that this program does not know, in streams of kinds that it does not know."""
_DURATIONS: Final = "durations"
_DELIVERIES: Final = "deliveries"
FINISHED_BY_MINUTE: Final = "finished_by_minute"
"""The document that says how many jobs ended in which minute."""
MAX_MINUTES_STORED: Final = 120
_BOUNDS_MS: Final = tuple(
    int(seconds * 1000)
    for seconds in (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400)
)
"""Upper bounds of the classes in which durations are counted; longer ones have a class of their own."""
MAX_TRACKS: Final = 1000
_LONGEST_MS: Final = 366 * 86_400_000


def counters_for_job(job: Document | None) -> CounterFields:
    """Return what one job adds to the counters."""
    if job is None:
        return ()
    status, track = job["status"], job["parameters"].get("track")
    if isinstance(track, str):
        counter = _counter_of(track)
        return ("jobs", "total"), ("jobs", status), (counter, "count"), (counter, status)
    return ("jobs", "total"), ("jobs", status)


def _counter_of(track: str) -> str:
    """Return the key of a track's counter. Of a very long name it holds the beginning and a digest."""
    if len(track) <= _MAX_TRACK_CHARACTERS:
        return _TRACK + track
    return f"{_TRACK}{track[:_MAX_TRACK_CHARACTERS]}… {blake2b(track.encode(), digest_size=8).hexdigest()}"


def counters_for_batch(batch: Document | None) -> CounterFields:
    """Return what one batch adds to the counters."""
    if batch is None:
        return ()
    return (("batches", "total"), ("batches", "active")) if batch["status"] == "processing" else (("batches", "total"),)


def counters_for_delivery(delivery: Document | None) -> CounterFields:
    """Return what one delivery adds to the counters."""
    return () if delivery is None else ((_DELIVERIES, "total"), (_DELIVERIES, delivery["status"]))


def has_just_finished(before: Document | None, after: Document | None) -> bool:
    """Return whether a job has ended between these two states of its document."""
    return (
        after is not None
        and after["status"] in TERMINAL_STATUSES
        and (before is None or before["status"] not in TERMINAL_STATUSES)
    )


def counters_for_completion(job: Document) -> Counter[tuple[str, str]]:
    """Return how much a job that has just ended adds to the counters: how long it took, if it is completed.

    From its first claim (of those since it was last restarted) to its end, in whole milliseconds: sums of fractions
    would depend on the order in which they are made.
    """
    if job["status"] != "completed" or job["started_at"] is None:
        return Counter()
    duration_ms = round((job["completed_at"] - job["started_at"]) / timedelta(milliseconds=1))
    duration_ms = max(0, min(duration_ms, _LONGEST_MS))  # times are those of the writers' clocks, which may be wrong
    bound = next((bound for bound in _BOUNDS_MS if duration_ms <= bound), None)
    return Counter({(_DURATIONS, "count"): 1, (_DURATIONS, "total_ms"): duration_ms, (_DURATIONS, _bucket(bound)): 1})


def _bucket(bound_ms: int | None) -> str:
    return "le_inf" if bound_ms is None else f"le_{bound_ms}"


def count_finished_job(recent: Document | None, job: Document) -> Document:
    """Return how many jobs ended in which minute, when one more has; the last `MINUTES_KEPT` minutes with an end.

    `duration_ms` is how long those that were completed took, all together.
    """
    minutes = dict(recent["minutes"]) if recent else {}
    minute = str(int(job["updated_at"].timestamp() // 60))
    minutes[minute] = {**_NO_FINISHED_JOBS, **minutes.get(minute, {})}
    minutes[minute][job["status"]] += 1
    minutes[minute]["duration_ms"] += counters_for_completion(job)[_DURATIONS, "total_ms"]
    if len(minutes) > MAX_MINUTES_STORED:
        del minutes[min(minutes, key=int)]
    return {"_id": FINISHED_BY_MINUTE, "minutes": minutes}


_NO_FINISHED_JOBS: Final = {"completed": 0, "failed": 0, "cancelled": 0, "duration_ms": 0}
MINUTES_SHOWN: Final = 60


# Questions --------------------------------------------------------------------------------------------------------


async def count_jobs(views: Views, *, status: str | None, track: str | None) -> int:
    """Return how many jobs there are, with this status and in this track, if these are named."""
    counter = "jobs" if track is None else _counter_of(track)
    field = status or ("total" if track is None else "count")
    with translate_errors("reading the statistics"):
        found = await views[NAME].find_one({"_id": counter}, {field: 1})
    return int((found or {}).get(field, 0))


async def count_batches(views: Views) -> int:
    """Return how many batches there are."""
    with translate_errors("reading the statistics"):
        found = await views[NAME].find_one({"_id": "batches"}, {"total": 1})
    return int((found or {}).get("total", 0))


async def load_statistics(views: Views, now: datetime) -> dict[str, Any]:
    """Return the counters in the concept's shape: jobs, batches, tracks (`_id`, count, completed, failed), and more.

    `throughput` is how many jobs ended a minute, `durations` are in seconds. Of the tracks the first thousand by name.
    """
    with translate_errors("reading the statistics"):
        names = ["jobs", "batches", _DURATIONS, FINISHED_BY_MINUTE, _DELIVERIES]
        found = {document["_id"]: document async for document in views[NAME].find({"_id": {"$in": names}})}
        in_use = {"_id": {"$gte": _TRACK, "$lt": _TRACK[:-1] + "0"}, "count": {"$gt": 0}}
        tracks = await views[NAME].find(in_use, sort=[("_id", 1)], limit=MAX_TRACKS).to_list()
    jobs, batches, told = found.get("jobs", {}), found.get("batches", {}), found.get(_DELIVERIES, {})
    return {
        "jobs": {
            name: jobs.get(name, 0) for name in ("total", "pending", "processing", "completed", "failed", "cancelled")
        },
        "batches": {name: batches.get(name, 0) for name in ("total", "active")},
        "webhooks": {name: told.get(name, 0) for name in ("total", "pending", "delivered", "abandoned")},
        "tracks": [
            {
                "_id": track["_id"].removeprefix(_TRACK),
                **{field: track.get(field, 0) for field in ("count", "completed", "failed")},
            }
            for track in tracks
        ],
        "throughput": compute_throughput(found.get(FINISHED_BY_MINUTE, {}).get("minutes", {}), now),
        "durations": summarize_durations(found.get(_DURATIONS, {})),
        "minutes": finished_per_minute(found.get(FINISHED_BY_MINUTE, {}).get("minutes", {}), now),
    }


async def load_event_and_duration_counts(views: Views) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many events of which type there are, and the classes of durations, for `histogram`."""
    with translate_errors("reading the statistics"):
        found = {it.pop("_id"): it async for it in views[NAME].find({"_id": {"$in": [EVENTS, _DURATIONS]}})}
    return found.get(EVENTS, {}), found.get(_DURATIONS, {})


def compute_throughput(minutes: Mapping[str, Mapping[str, int]], now: datetime) -> dict[str, float]:
    """Return how many jobs ended a minute: in the last minute and, on average, in the last hour.

    The minute in which either begins counts by the share that lies within.
    """
    minute, seconds = divmod(now.timestamp(), 60)
    share = 1 - seconds / 60
    totals = {int(name): sum(counts.get(status, 0) for status in TERMINAL_STATUSES) for name, counts in minutes.items()}

    def within(length: int) -> float:
        whole = sum(total for at, total in totals.items() if minute - length < at <= minute)
        return whole + share * totals.get(int(minute) - length, 0)

    return {"last_minute": round(within(1), 2), "last_hour": round(within(60) / 60, 2)}


def finished_per_minute(minutes: Mapping[str, Mapping[str, int]], now: datetime) -> list[dict[str, Any]]:
    """Return what ended in each of the last `MINUTES_SHOWN` minutes, the oldest first, and how long it took."""
    this = int(now.timestamp() // 60)
    shown = []
    for minute in range(this - MINUTES_SHOWN + 1, this + 1):
        counts = {**_NO_FINISHED_JOBS, **minutes.get(str(minute), {})}
        duration_ms, completed = counts.pop("duration_ms"), counts["completed"]
        average = round(duration_ms / completed / 1000, 3) if completed else None
        begin = datetime.fromtimestamp(minute * 60, now.tzinfo)
        shown.append({"started_at": begin, **counts, "average_seconds": average})
    return shown


def summarize_durations(counted: Mapping[str, int]) -> dict[str, float | int | None]:
    """Return how long completed jobs took, in seconds. Percentiles are as exact as the classes are narrow."""
    number = counted.get("count", 0)
    return {
        "completed": number,
        "average_seconds": round(counted["total_ms"] / number / 1000, 3) if number else None,
        **{f"p{percent}_seconds": _percentile(counted, percent / 100) for percent in (50, 90, 99)},
    }


def _percentile(counted: Mapping[str, int], share: float) -> float | None:
    """Return the duration in seconds that so large a share does not exceed, as if a class were filled evenly."""
    wanted, below, begin = counted.get("count", 0) * share, 0, 0
    for bound in _BOUNDS_MS:
        here = counted.get(_bucket(bound), 0)
        if here and below + here >= wanted:
            return round((begin + (bound - begin) * (wanted - below) / here) / 1000, 3)
        below, begin = below + here, bound
    return begin / 1000 if counted.get(_bucket(None)) else None


def duration_histogram(counted: Mapping[str, int]) -> tuple[list[tuple[float, int]], float]:
    """Return how many completed jobs took at most so many seconds, the last class being all, and the sum of seconds."""
    found: list[tuple[float, int]] = []
    below = 0
    for bound in _BOUNDS_MS:
        below += counted.get(_bucket(bound), 0)
        found.append((bound / 1000, below))
    return [*found, (math.inf, counted.get("count", 0))], counted.get("total_ms", 0) / 1000
