"""Statistics: what counters say is what has happened, in the concept's shape; and who may see them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, Delete, FailAttempt
from jobledger.ledger.domain.events import EventMetadata, Failure
from jobledger.ledger.store.command_handler import Command, handle_command
from jobledger.projections.slots import Views
from jobledger.projections.views import statistics
from tests.api.conftest import Api

STATS = "/api/monitoring/events/stats"
NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


async def do(api: Api, stream: str, *commands: Command) -> int:
    position = 0
    for command in commands:
        position = (
            (await handle_command(api.event_store, stream, command, meta=EventMetadata("test"))).events[-1].position
        )
    return position


async def stats(api: Api, position: int) -> dict[str, Any]:
    answer = await api.get(STATS, position)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["stats"]
    return found


async def test_statistics_have_the_shape_of_the_concept_and_more(api: Api) -> None:
    batch = await api.submit_batch({"track": "A"}, {"track": "A"}, {"track": "B"})
    ended = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    cancelled = await api.submit({"track": "B"}, not_before="2099-01-01T00:00:00Z")
    found = await stats(api, await do(api, cancelled, CancelJob("user:local")))
    assert found["jobs"] == {"total": 4, "pending": 0, "processing": 0, "completed": 3, "failed": 0, "cancelled": 1}
    assert found["batches"] == {"total": 1, "active": 0}
    assert found["tracks"] == [
        {"_id": "A", "count": 2, "completed": 2, "failed": 0},
        {"_id": "B", "count": 2, "completed": 1, "failed": 0},
    ]
    assert 0 < found["throughput"]["last_minute"] <= 4
    assert found["throughput"]["last_hour"] == round(4 / 60, 2)
    took = found["durations"]
    assert took["completed"] == 3
    assert 0 <= took["p50_seconds"] <= took["p90_seconds"] <= took["p99_seconds"] < 30
    assert 0 <= took["average_seconds"] < 30
    assert [(it["slots"], it["busy_slots"]) for it in found["workers"]] == [(5, 0)]
    assert found["log"]["projection_position"] >= ended["position"]
    assert found["log"]["lag"] == found["log"]["head"] - found["log"]["projection_position"]


async def test_before_anything_has_happened_statistics_say_so(api_without_worker: Api) -> None:
    found = await stats(api_without_worker, 0)
    assert set(found["jobs"].values()) | set(found["batches"].values()) == {0}
    assert found["tracks"] == found["workers"] == []
    assert found["throughput"] == {"last_minute": 0, "last_hour": 0}
    nothing = dict.fromkeys(("average_seconds", "p50_seconds", "p90_seconds", "p99_seconds"))
    assert found["durations"] == {"completed": 0, **nothing}


async def test_a_worker_that_runs_jobs_is_busy_and_one_that_is_gone_is_not_there(api_without_worker: Api) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    facts = {"host": "here", "slots": 4, "released": False}
    await api_without_worker.db.workers.insert_many(
        [
            {"_id": "alive", "lease_until": later, **facts},
            {"_id": "dead", "lease_until": NOON, **facts},
            {"_id": "gone", "lease_until": later, **facts, "released": True},
        ]
    )
    positions = []
    for worker_id in ("alive", "alive", "dead"):
        positions.append(await do(api_without_worker, await api_without_worker.submit(), ClaimJob(worker_id, later)))
    found = await stats(api_without_worker, positions[-1])
    lease = found["workers"][0].pop("lease_until")
    assert datetime.fromisoformat(lease) == later.replace(microsecond=later.microsecond // 1000 * 1000)
    healthy = {"problem": None, "unhealthy_since": None}
    assert found["workers"] == [{"worker_id": "alive", "host": "here", "slots": 4, "busy_slots": 2, **healthy}]


async def test_what_is_deleted_leaves_the_counts_of_jobs_but_not_what_has_happened(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"track": "A"})
    broken = Failure(code="BROKEN", message="it broke")
    claim = ClaimJob("worker-1", datetime.now(UTC) + timedelta(hours=1))
    await do(api_without_worker, job_id, claim, FailAttempt("worker-1", 1, broken, None))
    found = await stats(api_without_worker, await do(api_without_worker, job_id, Delete("user:local")))
    assert set(found["jobs"].values()) == {0}
    assert found["tracks"] == []
    assert found["throughput"]["last_hour"] == round(1 / 60, 2)
    events, _ = await statistics.load_event_and_duration_counts(Views(api_without_worker.db))
    assert events == {"JobSubmitted": 1, "JobClaimed": 1, "JobFailed": 1, "JobDeleted": 1}


async def test_statistics_read_counters_however_many_jobs_there_are(api_without_worker: Api) -> None:
    for number in range(30):
        await api_without_worker.submit({"track": f"track {number % 3}"})
    await api_without_worker.get(STATS, 30)
    await api_without_worker.db.command("profile", 2)
    try:
        assert (await api_without_worker.get(STATS)).status_code == 200
    finally:
        await api_without_worker.db.command("profile", 0)
    looked = [
        entry async for entry in api_without_worker.db["system.profile"].find({"op": {"$in": ["query", "command"]}})
    ]
    views = [entry for entry in looked if entry["ns"].partition(".")[2] in ("jobs", "batches", "events", "statistics")]
    assert views
    assert max(entry.get("docsExamined", 0) for entry in views) <= 4  # one for each track, and so on


@pytest.mark.usefixtures("header_auth")
@pytest.mark.parametrize("path", [STATS, "/metrics"])
async def test_statistics_of_everything_are_for_monitors_and_admins(api_without_worker: Api, path: str) -> None:
    asking: list[tuple[str, list[str], int]] = [
        ("mona", ["monitor"], 200),
        ("root", ["admin"], 200),
        ("bob", [], 403),
        ("eve", ["auditor"], 403),
        ("", [], 401),
    ]
    for user_id, roles, status in asking:
        answer = await api_without_worker.as_user(user_id, roles=roles).get(path)
        assert answer.status_code == status, (user_id, roles)


# The arithmetic -----------------------------------------------------------------------------------------------------


def completed(seconds: float, *, at: datetime = NOON) -> dict[str, Any]:
    begun = at - timedelta(seconds=seconds)
    return {"status": "completed", "started_at": begun, "completed_at": at, "updated_at": at}


def test_percentiles_are_as_exact_as_the_classes_are_narrow() -> None:
    counted: Counter[tuple[str, str]] = Counter()
    for number in range(1, 101):
        counted.update(statistics.counters_for_completion(completed(number)))
    fields = {name: amount for (_, name), amount in counted.items()}
    found = statistics.summarize_durations(fields)
    assert found["completed"] == 100
    assert found["average_seconds"] == 50.5
    assert found["p50_seconds"] == pytest.approx(50, abs=2)
    assert found["p90_seconds"] == pytest.approx(90, abs=20)
    assert found["p99_seconds"] == pytest.approx(99, abs=20)
    classes, seconds = statistics.duration_histogram(fields)
    assert seconds == 5050
    assert dict(classes)[10.0] == 10
    assert classes[-1] == (float("inf"), 100)


def test_a_duration_longer_than_every_class_and_one_against_the_clock_are_counted_too() -> None:
    for seconds, p50 in ((10**6, 14_400.0), (-5, 0.025)):
        counted = statistics.counters_for_completion(completed(seconds))
        fields = {name: amount for (_, name), amount in counted.items()}
        assert statistics.summarize_durations(fields)["p50_seconds"] == p50
        assert statistics.duration_histogram(fields)[0][-1] == (float("inf"), 1)


def test_only_so_many_minutes_are_kept_and_the_oldest_goes_first() -> None:
    recent = None
    for minute in range(500):
        recent = statistics.count_finished_job(recent, completed(1, at=NOON + timedelta(minutes=minute)))
    assert recent is not None
    assert len(recent["minutes"]) == statistics.MAX_MINUTES_STORED
    assert min(map(int, recent["minutes"])) == int(NOON.timestamp() // 60) + 500 - statistics.MAX_MINUTES_STORED
    late = statistics.count_finished_job(recent, completed(1, at=NOON))
    assert late == recent


def test_throughput_counts_the_minute_that_began_earlier_by_its_share() -> None:
    at = int(NOON.timestamp() // 60)
    minutes = {str(at): {"completed": 2, "failed": 1}, str(at - 1): {"completed": 8}, str(at - 60): {"cancelled": 60}}
    found = statistics.compute_throughput(minutes, NOON + timedelta(seconds=15))
    assert found == {"last_minute": 3 + 0.75 * 8, "last_hour": round((11 + 0.75 * 60) / 60, 2)}
    assert statistics.compute_throughput(minutes, NOON + timedelta(minutes=1)) == {"last_minute": 3, "last_hour": 0.18}
