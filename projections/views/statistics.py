"""View `statistics`: counters, maintained with each event.

The documents `jobs`, `batches`, `deliveries` and `track/…` count what exists: each object is added, and subtracted
when it changes or is deleted. The documents `events`, `durations` and `finished_by_minute` count what has
happened, and never decrease. All counters follow from the log alone. Times are those of the events.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Final

from pymongo import IndexModel

from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "statistics"
INDEXES: Final[list[IndexModel]] = []
CounterFields = tuple[tuple[str, str], ...]
"""Counter documents and their fields to increment by one."""
EVENTS: Final = "events"
"""The document with the number of events by type."""
UNKNOWN: Final = "unknown"
"""Counts the events of all types that this program does not know."""
FINISHED_BY_MINUTE: Final = "finished_by_minute"
"""The document with the number of finished jobs by minute."""
_DURATIONS: Final = "durations"
"""The document with the histogram of the run times of completed jobs."""
_DELIVERIES: Final = "deliveries"
_TRACK_PREFIX: Final = "track/"
_MAX_TRACK_CHARACTERS: Final = 200
MAX_TRACKS: Final = 1000
MAX_MINUTES_STORED: Final = 120
MINUTES_SHOWN: Final = 60
_BOUNDS_MS: Final = tuple(
    int(seconds * 1000)
    for seconds in (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400)
)
"""Upper bounds of the histogram's buckets. One more bucket counts longer run times."""
_MAX_DURATION_MS: Final = 366 * 86_400_000
_NO_FINISHED_JOBS: Final = {"completed": 0, "failed": 0, "cancelled": 0, "duration_ms": 0}
_ERROR_CONTEXT: Final = "reading the statistics"


# Counting -----------------------------------------------------------------------------------------------------------


def get_job_counters(job: Document | None) -> CounterFields:
    """Return the counter fields that count a job."""
    if job is None:
        return ()
    status, track = job["status"], job["parameters"].get("track")
    if isinstance(track, str):
        counter = _build_track_key(track)
        return ("jobs", "total"), ("jobs", status), (counter, "count"), (counter, status)
    return ("jobs", "total"), ("jobs", status)


def _build_track_key(track: str) -> str:
    """Return the key of a track's counter: the track's name, a long one shortened and with a digest."""
    if len(track) <= _MAX_TRACK_CHARACTERS:
        return _TRACK_PREFIX + track
    digest = blake2b(track.encode(), digest_size=8).hexdigest()
    return f"{_TRACK_PREFIX}{track[:_MAX_TRACK_CHARACTERS]}… {digest}"


def get_batch_counters(batch: Document | None) -> CounterFields:
    """Return the counter fields that count a batch."""
    if batch is None:
        return ()
    return (("batches", "total"), ("batches", "active")) if batch["status"] == "processing" else (("batches", "total"),)


def get_delivery_counters(delivery: Document | None) -> CounterFields:
    """Return the counter fields that count a delivery."""
    return () if delivery is None else ((_DELIVERIES, "total"), (_DELIVERIES, delivery["status"]))


def has_just_finished(before: Document | None, after: Document | None) -> bool:
    """Return whether a job has finished between two states of its document."""
    return _is_finished(after) and not _is_finished(before)


def _is_finished(job: Document | None) -> bool:
    return job is not None and job["status"] in TERMINAL_STATUSES


def build_completion_increments(job: Document) -> dict[tuple[str, str], int]:
    """Return the increments of the histogram for a job that has just finished; empty unless it is completed."""
    if (duration_ms := _compute_duration_ms(job)) is None:
        return {}
    index = bisect_left(_BOUNDS_MS, duration_ms)
    bucket = _get_bucket_name(_BOUNDS_MS[index] if index < len(_BOUNDS_MS) else None)
    return {(_DURATIONS, "count"): 1, (_DURATIONS, "total_ms"): duration_ms, (_DURATIONS, bucket): 1}


def _compute_duration_ms(job: Document) -> int | None:
    """Return the run time of a job that has just finished; None unless it is completed.

    The run time is that from the first claim since the last restart to the end, in whole milliseconds. Sums of
    fractions would depend on the order of addition.
    """
    if job["status"] != "completed" or job["started_at"] is None:
        return None
    duration_ms: int = round((job["completed_at"] - job["started_at"]) / timedelta(milliseconds=1))
    return max(0, min(duration_ms, _MAX_DURATION_MS))  # the clocks may have been wrong


def _get_bucket_name(bound_ms: int | None) -> str:
    return "le_inf" if bound_ms is None else f"le_{bound_ms}"


def count_finished_job(document: Document | None, job: Document) -> Document:
    """Return the document `finished_by_minute` with one more finished job.

    It contains the last `MAX_MINUTES_STORED` minutes with finished jobs: their number by status, and the sum of the run
    times of the completed ones (`duration_ms`).
    """
    minutes = dict(document["minutes"]) if document else {}
    minute = str(int(job["updated_at"].timestamp() // 60))
    minutes[minute] = {**_NO_FINISHED_JOBS, **minutes.get(minute, {})}
    minutes[minute][job["status"]] += 1
    minutes[minute]["duration_ms"] += _compute_duration_ms(job) or 0
    if len(minutes) > MAX_MINUTES_STORED:
        del minutes[min(minutes, key=int)]
    return {"_id": FINISHED_BY_MINUTE, "minutes": minutes}


# Queries ------------------------------------------------------------------------------------------------------------


async def count_jobs(views: Views, *, status: str | None, track: str | None) -> int:
    """Return the number of jobs, optionally only with a status or in a track."""
    counter = "jobs" if track is None else _build_track_key(track)
    return await _read_counter(views, counter, status or ("total" if track is None else "count"))


async def count_batches(views: Views) -> int:
    """Return the number of batches."""
    return await _read_counter(views, "batches", "total")


async def _read_counter(views: Views, counter: str, field: str) -> int:
    with translate_errors(_ERROR_CONTEXT):
        document = await views[NAME].find_one({"_id": counter}, {field: 1})
    return int((document or {}).get(field, 0))


async def load_statistics(views: Views, now: datetime) -> dict[str, Any]:
    """Return the statistics in the form of konzept.md: jobs, batches and tracks, and in addition:

    webhooks: Deliveries by status.
    throughput: Finished jobs per minute.
    durations: Run times of completed jobs in seconds.
    minutes: Finished jobs in each of the last `MINUTES_SHOWN` minutes.

    Only the first `MAX_TRACKS` tracks by name are included.
    """
    with translate_errors(_ERROR_CONTEXT):
        keys = ["jobs", "batches", _DURATIONS, FINISHED_BY_MINUTE, _DELIVERIES]
        documents = {document["_id"]: document async for document in views[NAME].find({"_id": {"$in": keys}})}
        tracks_in_use = {"_id": {"$gte": _TRACK_PREFIX, "$lt": _TRACK_PREFIX[:-1] + "0"}, "count": {"$gt": 0}}
        tracks = await views[NAME].find(tracks_in_use, sort=[("_id", 1)], limit=MAX_TRACKS).to_list()
    minutes = documents.get(FINISHED_BY_MINUTE, {}).get("minutes", {})

    def select(key: str, *fields: str) -> dict[str, int]:
        return {field: documents.get(key, {}).get(field, 0) for field in fields}

    return {
        "jobs": select("jobs", "total", "pending", "processing", "completed", "failed", "cancelled"),
        "batches": select("batches", "total", "active"),
        "webhooks": select(_DELIVERIES, "total", "pending", "delivered", "abandoned"),
        "tracks": [
            {
                "_id": track["_id"].removeprefix(_TRACK_PREFIX),
                **{field: track.get(field, 0) for field in ("count", "completed", "failed")},
            }
            for track in tracks
        ],
        "throughput": compute_throughput(minutes, now),
        "durations": summarize_durations(documents.get(_DURATIONS, {})),
        "minutes": list_finished_per_minute(minutes, now),
    }


async def load_event_and_duration_counts(views: Views) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of events by type, and the document for `build_duration_histogram`."""
    with translate_errors(_ERROR_CONTEXT):
        cursor = views[NAME].find({"_id": {"$in": [EVENTS, _DURATIONS]}})
        documents = {document.pop("_id"): document async for document in cursor}
    return documents.get(EVENTS, {}), documents.get(_DURATIONS, {})


def compute_throughput(minutes: Mapping[str, Mapping[str, int]], now: datetime) -> dict[str, float]:
    """Return the number of finished jobs per minute: in the last minute, and on average in the last hour.

    The calendar minute in which the period begins counts by the share that lies within the period.
    """
    minute, seconds = divmod(now.timestamp(), 60)
    share = 1 - seconds / 60
    totals = {int(name): sum(counts.get(status, 0) for status in TERMINAL_STATUSES) for name, counts in minutes.items()}

    def count_within(length: int) -> float:
        complete = sum(total for at, total in totals.items() if minute - length < at <= minute)
        return complete + share * totals.get(int(minute) - length, 0)

    return {"last_minute": round(count_within(1), 2), "last_hour": round(count_within(60) / 60, 2)}


def list_finished_per_minute(minutes: Mapping[str, Mapping[str, int]], now: datetime) -> list[dict[str, Any]]:
    """Return the finished jobs and their average run time in each of the last `MINUTES_SHOWN` minutes, oldest first."""
    current = int(now.timestamp() // 60)
    rows = []
    for minute in range(current - MINUTES_SHOWN + 1, current + 1):
        counts = {**_NO_FINISHED_JOBS, **minutes.get(str(minute), {})}
        duration_ms, completed = counts.pop("duration_ms"), counts["completed"]
        average = round(duration_ms / completed / 1000, 3) if completed else None
        started_at = datetime.fromtimestamp(minute * 60, now.tzinfo)
        rows.append({"started_at": started_at, **counts, "average_seconds": average})
    return rows


def summarize_durations(counts: Mapping[str, int]) -> dict[str, float | int | None]:
    """Return the number, average and percentiles of run times in seconds.

    The precision of the percentiles is that of the buckets.
    """
    number = counts.get("count", 0)
    return {
        "completed": number,
        "average_seconds": round(counts["total_ms"] / number / 1000, 3) if number else None,
        **{f"p{percent}_seconds": _compute_percentile(counts, percent / 100) for percent in (50, 90, 99)},
    }


def _compute_percentile(counts: Mapping[str, int], share: float) -> float | None:
    """Return the run time in seconds that this share of the jobs does not exceed, with linear interpolation."""
    rank, below, lower_ms = counts.get("count", 0) * share, 0, 0
    for bound_ms in _BOUNDS_MS:
        in_bucket = counts.get(_get_bucket_name(bound_ms), 0)
        if in_bucket and below + in_bucket >= rank:
            return round((lower_ms + (bound_ms - lower_ms) * (rank - below) / in_bucket) / 1000, 3)
        below, lower_ms = below + in_bucket, bound_ms
    return lower_ms / 1000 if counts.get(_get_bucket_name(None)) else None


def build_duration_histogram(counts: Mapping[str, int]) -> tuple[list[tuple[float, int]], float]:
    """Return the cumulative histogram of run times (upper bound in seconds, number of jobs), and their sum."""
    numbers = accumulate(counts.get(_get_bucket_name(bound_ms), 0) for bound_ms in _BOUNDS_MS)
    buckets = [(bound_ms / 1000, number) for bound_ms, number in zip(_BOUNDS_MS, numbers, strict=True)]
    return [*buckets, (math.inf, counts.get("count", 0))], counts.get("total_ms", 0) / 1000
