"""Statistics: counters agree with the log and have the fields of the concept; only some roles may read them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, Delete, FailAttempt
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from jobledger.ledger.store.command_handler import Command, handle_command
from jobledger.projections.slots import Views
from jobledger.projections.views import statistics
from tests.api.conftest import Api

STATS = "/api/monitoring/events/stats"
NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


async def handle_commands(api: Api, stream: str, *commands: Command) -> int:
    position = 0
    for command in commands:
        position = (
            (await handle_command(api.event_store, stream, command, meta=EventMetadata("test"))).events[-1].position
        )
    return position


async def load_stats(api: Api, position: int) -> dict[str, Any]:
    response = await api.get(STATS, position)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()["stats"]
    return content


async def test_statistics_have_fields_of_the_concept(api: Api) -> None:
    batch = await api.submit_batch({"track": "A"}, {"track": "A"}, {"track": "B"})
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    cancelled = await api.submit({"track": "B"}, not_before="2099-01-01T00:00:00Z")
    stats = await load_stats(api, await handle_commands(api, cancelled, CancelJob("user:local")))
    assert stats["jobs"] == {"total": 4, "pending": 0, "processing": 0, "completed": 3, "failed": 0, "cancelled": 1}
    assert stats["batches"] == {"total": 1, "active": 0}
    assert stats["tracks"] == [
        {"_id": "A", "count": 2, "completed": 2, "failed": 0},
        {"_id": "B", "count": 2, "completed": 1, "failed": 0},
    ]
    assert 0 < stats["throughput"]["last_minute"] <= 4
    assert stats["throughput"]["last_hour"] == round(4 / 60, 2)
    durations = stats["durations"]
    assert durations["completed"] == 3
    assert 0 <= durations["p50_seconds"] <= durations["p90_seconds"] <= durations["p99_seconds"] < 30
    assert 0 <= durations["average_seconds"] < 30
    assert [(worker["slots"], worker["busy_slots"]) for worker in stats["workers"]] == [(5, 0)]
    assert stats["log"]["projection_position"] >= finished["position"]
    assert stats["log"]["lag"] == stats["log"]["head"] - stats["log"]["projection_position"]


async def test_statistics_of_an_empty_log_are_zero(api_without_worker: Api) -> None:
    stats = await load_stats(api_without_worker, 0)
    assert set(stats["jobs"].values()) | set(stats["batches"].values()) == {0}
    assert stats["tracks"] == stats["workers"] == []
    assert stats["throughput"] == {"last_minute": 0, "last_hour": 0}
    no_durations = dict.fromkeys(("average_seconds", "p50_seconds", "p90_seconds", "p99_seconds"))
    assert stats["durations"] == {"completed": 0, **no_durations}


async def test_statistics_list_active_workers_with_busy_slots(api_without_worker: Api) -> None:
    lease_until = datetime.now(UTC) + timedelta(hours=1)
    fields = {"host": "here", "slots": 4, "released": False}
    await api_without_worker.db.workers.insert_many(
        [
            {"_id": "active", "lease_until": lease_until, **fields},
            {"_id": "expired", "lease_until": NOON, **fields},
            {"_id": "released", "lease_until": lease_until, **fields, "released": True},
        ]
    )
    positions = []
    for worker_id in ("active", "active", "expired"):
        positions.append(
            await handle_commands(
                api_without_worker, await api_without_worker.submit(), ClaimJob(worker_id, lease_until)
            )
        )
    stats = await load_stats(api_without_worker, positions[-1])
    lease = stats["workers"][0].pop("lease_until")
    assert datetime.fromisoformat(lease) == lease_until.replace(microsecond=lease_until.microsecond // 1000 * 1000)
    healthy = {"problem": None, "unhealthy_since": None}
    assert stats["workers"] == [{"worker_id": "active", "host": "here", "slots": 4, "busy_slots": 2, **healthy}]


async def test_deleted_job_leaves_job_counts_but_not_throughput(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"track": "A"})
    broken = ErrorInfo(code="BROKEN", message="it broke")
    claim = ClaimJob("worker-1", datetime.now(UTC) + timedelta(hours=1))
    await handle_commands(api_without_worker, job_id, claim, FailAttempt("worker-1", 1, broken, None))
    stats = await load_stats(
        api_without_worker, await handle_commands(api_without_worker, job_id, Delete("user:local"))
    )
    assert set(stats["jobs"].values()) == {0}
    assert stats["tracks"] == []
    assert stats["throughput"]["last_hour"] == round(1 / 60, 2)
    events, _ = await statistics.load_event_and_duration_counts(Views(api_without_worker.db))
    assert events == {"JobSubmitted": 1, "JobClaimed": 1, "JobFailed": 1, "JobDeleted": 1}


async def test_statistics_read_few_documents_for_any_number_of_jobs(api_without_worker: Api) -> None:
    for number in range(30):
        await api_without_worker.submit({"track": f"track {number % 3}"})
    await api_without_worker.get(STATS, 30)
    await api_without_worker.db.command("profile", 2)
    try:
        assert (await api_without_worker.get(STATS)).status_code == 200
    finally:
        await api_without_worker.db.command("profile", 0)
    entries = [
        entry async for entry in api_without_worker.db["system.profile"].find({"op": {"$in": ["query", "command"]}})
    ]
    view_queries = [
        entry for entry in entries if entry["ns"].partition(".")[2] in ("jobs", "batches", "events", "statistics")
    ]
    assert view_queries
    assert max(entry.get("docsExamined", 0) for entry in view_queries) <= 4  # for example one per track


@pytest.mark.usefixtures("header_auth")
@pytest.mark.parametrize("path", [STATS, "/metrics"])
async def test_statistics_require_role_monitor_or_admin(api_without_worker: Api, path: str) -> None:
    cases: list[tuple[str, list[str], int]] = [
        ("mona", ["monitor"], 200),
        ("root", ["admin"], 200),
        ("bob", [], 403),
        ("eve", ["auditor"], 403),
        ("", [], 401),
    ]
    for user_id, roles, status in cases:
        response = await api_without_worker.as_user(user_id, roles=roles).get(path)
        assert response.status_code == status, (user_id, roles)


# Calculation --------------------------------------------------------------------------------------------------------


def make_completed_job(seconds: float, *, at: datetime = NOON) -> dict[str, Any]:
    started_at = at - timedelta(seconds=seconds)
    return {"status": "completed", "started_at": started_at, "completed_at": at, "updated_at": at}


def test_percentiles_are_as_exact_as_the_bucket_width() -> None:
    counters: Counter[tuple[str, str]] = Counter()
    for number in range(1, 101):
        counters.update(statistics.build_completion_increments(make_completed_job(number)))
    fields = {name: amount for (_, name), amount in counters.items()}
    summary = statistics.summarize_durations(fields)
    assert summary["completed"] == 100
    assert summary["average_seconds"] == 50.5
    assert summary["p50_seconds"] == pytest.approx(50, abs=2)
    assert summary["p90_seconds"] == pytest.approx(90, abs=20)
    assert summary["p99_seconds"] == pytest.approx(99, abs=20)
    buckets, seconds = statistics.build_duration_histogram(fields)
    assert seconds == 5050
    assert dict(buckets)[10.0] == 10
    assert buckets[-1] == (float("inf"), 100)


def test_durations_beyond_last_bucket_and_negative_ones_are_counted() -> None:
    for seconds, p50 in ((10**6, 14_400.0), (-5, 0.025)):
        counters = statistics.build_completion_increments(make_completed_job(seconds))
        fields = {name: amount for (_, name), amount in counters.items()}
        assert statistics.summarize_durations(fields)["p50_seconds"] == p50
        assert statistics.build_duration_histogram(fields)[0][-1] == (float("inf"), 1)


def test_minutes_beyond_maximum_are_dropped_oldest_first() -> None:
    recent = None
    for minute in range(500):
        recent = statistics.count_finished_job(recent, make_completed_job(1, at=NOON + timedelta(minutes=minute)))
    assert recent is not None
    assert len(recent["minutes"]) == statistics.MAX_MINUTES_STORED
    assert min(map(int, recent["minutes"])) == int(NOON.timestamp() // 60) + 500 - statistics.MAX_MINUTES_STORED
    late = statistics.count_finished_job(recent, make_completed_job(1, at=NOON))
    assert late == recent


def test_throughput_counts_partial_minute_by_its_share() -> None:
    minute = int(NOON.timestamp() // 60)
    minutes = {
        str(minute): {"completed": 2, "failed": 1},
        str(minute - 1): {"completed": 8},
        str(minute - 60): {"cancelled": 60},
    }
    throughput = statistics.compute_throughput(minutes, NOON + timedelta(seconds=15))
    assert throughput == {"last_minute": 3 + 0.75 * 8, "last_hour": round((11 + 0.75 * 60) / 60, 2)}
    assert statistics.compute_throughput(minutes, NOON + timedelta(minutes=1)) == {"last_minute": 3, "last_hour": 0.18}
