"""Test lists of jobs and batches: filters, totals, paging and the use of indexes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.slots import Views
from jobledger.projections.views import job_list, jobs, paging
from jobledger.projections.views.list_index import ListQuery
from tests.api.conftest import Api
from tests.support.header_auth import principal_header

ADMIN = Principal("ann", roles=frozenset({"admin"}))
ALICE = Principal("alice", frozenset({"team-a"}))
STRANGER = Principal("zoe")
TRACKS = ("Main", "Databases", "Web")


async def list_jobs(api: Api, position: int | str | None = None, **query: Any) -> Any:
    headers = {} if position is None else {"Ledger-Position": str(position)}
    response = await api.http.get("/api/events/jobs", params=query, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


async def create_jobs(api: Api) -> str:
    """Submit 30 jobs of three tracks, two languages and two users, five of them cancelled; return the position."""
    for number in range(30):
        await api.post(
            "/api/events/jobs",
            {
                "job_type": "echo",
                "job_name": f"Talk {number} on Gödel/Escher",
                "parameters": {
                    "track": TRACKS[number % 3],
                    "event": f"Conf {number % 2}",
                    "day": "Saturday",
                    "target_language": "de" if number % 2 else "fr",
                    "session": "All about B-trees",
                    "speakers": ["Ada Lovelace", "Bob"] if number == 7 else None,
                },
            },
            **principal_header("alice" if number < 20 else "bob"),
        )
    jobs = (await list_jobs(api, await api.event_store.read_head_position()))["jobs"]
    for job in jobs[:5]:
        await api.post(f"/api/events/jobs/{job['job_id']}/cancel")
    return str(await api.event_store.read_head_position())


async def test_job_list_filter_returns_matches_and_total(header_auth_api: Api) -> None:
    position = await create_jobs(header_auth_api)
    for query, number in [
        ({}, 30),
        ({"status": "cancelled"}, 5),
        ({"status": "failed"}, 0),
        ({"track": "Main"}, 10),
        ({"track": "Main", "status": "pending"}, 9),
        ({"track": "Main", "event": "Conf 0"}, 5),
        ({"track": "Nowhere"}, 0),
        ({"event": "Conf 1"}, 15),
        ({"day": "Saturday"}, 30),
        ({"language": "de"}, 15),
        ({"job_type": "echo"}, 30),
        ({"user_id": "bob"}, 10),
        ({"user_id": "bob", "status": "pending"}, 5),
        ({"q": "gödel escher"}, 30),
        ({"q": "TALK 7"}, 1),
        ({"q": "lovelace"}, 1),
        ({"q": "trees", "track": "Web"}, 10),
        ({"q": "no such job"}, 0),
        ({"archived": "false"}, 30),
        ({"archived": "true"}, 0),
        ({"created_after": "2001-01-01T00:00:00Z"}, 30),
        ({"created_before": "2001-01-01T00:00:00Z"}, 0),
    ]:
        content = await list_jobs(header_auth_api, position, **query)
        assert (content["total"], len(content["jobs"])) == (number, number), query


async def test_job_list_id_prefix_returns_matching_jobs_of_the_caller(header_auth_api: Api) -> None:
    position = await create_jobs(header_auth_api)
    jobs = (await list_jobs(header_auth_api, position))["jobs"]
    job_id = jobs[4]["job_id"]
    expected = [job["job_id"] for job in jobs if job["job_id"].startswith(job_id[:-1])]
    for query, ids in [
        ({"id_prefix": job_id}, [job_id]),
        ({"id_prefix": job_id[:-1]}, expected),
        ({"id_prefix": job_id[:-1], "sort": "created_at"}, expected[::-1]),
        ({"id_prefix": job_id, "status": jobs[4]["status"], "q": "trees"}, [job_id]),
        ({"id_prefix": job_id, "status": "completed"}, []),
        ({"id_prefix": "job-zzzzzzzz"}, []),
    ]:
        content = await list_jobs(header_auth_api, position, **query)
        assert ([job["job_id"] for job in content["jobs"]], content["total"]) == (ids, len(ids)), query
    stranger = await header_auth_api.http.get(
        "/api/events/jobs", params={"id_prefix": job_id}, headers=principal_header("zoe")
    )
    assert stranger.json()["jobs"] == []
    short = await header_auth_api.http.get("/api/events/jobs", params={"id_prefix": "job-1234567"})
    assert (short.status_code, "id_prefix" in short.text) == (422, True)


async def test_job_list_filters_by_error_code(api: Api) -> None:
    job_id = await api.submit({"fail": "permanent"})
    failed = await api.wait_until_finished(job_id)
    await api.submit()
    assert failed["status"] == "failed"
    content = await list_jobs(api, failed["position"], error_code=failed["error"]["code"])
    assert [job["job_id"] for job in content["jobs"]] == [job_id]
    assert (await list_jobs(api, error_code="OTHER"))["jobs"] == []


@pytest.mark.parametrize("sort", ["-created_at", "created_at"])
async def test_job_list_pages_are_stable_while_jobs_change(header_auth_api: Api, sort: str) -> None:
    position = await create_jobs(header_auth_api)
    existing = [job["job_id"] for job in (await list_jobs(header_auth_api, position, sort=sort))["jobs"]]
    listed: list[str] = []
    query: dict[str, Any] = {"limit": 7, "sort": sort}
    while True:
        content = await list_jobs(header_auth_api, position, **query)
        listed += [job["job_id"] for job in content["jobs"]]
        if "next_cursor" not in content:
            break
        query |= {"cursor": content["next_cursor"]}
        await header_auth_api.http.delete(f"/api/events/jobs/{listed[0]}")
        position = (await header_auth_api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})).headers[
            "ledger-position"
        ]
    assert [job_id for job_id in listed if job_id in existing] == existing
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "query", [{"cursor": "nonsense"}, {"cursor": "MTIz", "skip": 1}, {"limit": 0}, {"limit": 1001}, {"sort": "colour"}]
)
async def test_job_list_with_invalid_paging_is_rejected(shared_api: Api, query: dict[str, Any]) -> None:
    response = await shared_api.http.get("/api/events/jobs", params=query)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_content")


async def test_jobs_of_batch_are_paged_with_total(shared_api: Api) -> None:
    batch = await shared_api.submit_batch(*({"number": number} for number in range(12)))
    await shared_api.submit()
    position = await shared_api.event_store.read_head_position()
    path = f"/api/events/batches/{batch['batch_id']}/jobs"
    first = (await shared_api.get(f"{path}?limit=10&sort=created_at", position)).json()
    rest = (await shared_api.get(f"{path}?limit=10&sort=created_at&cursor={first['next_cursor']}")).json()
    assert first["total"] == rest["total"] == 12
    assert sorted(job["job_id"] for job in first["jobs"] + rest["jobs"]) == sorted(batch["job_ids"])
    assert "next_cursor" not in rest
    missing = await shared_api.get("/api/events/batches/batch-000000000000000000000000/jobs")
    assert (missing.status_code, missing.json()["code"]) == (404, "batch_not_found")


async def test_batch_list_filters_by_status_user_and_name(header_auth_api: Api) -> None:
    for user, name in (("alice", "FOSDEM main track"), ("bob", "FOSDEM other"), ("alice", "PyCon")):
        content = {"batch_name": name, "jobs": [{"job_type": "echo", "parameters": {}}]}
        await header_auth_api.post("/api/events/batches", content, **principal_header(user))
    position = await header_auth_api.event_store.read_head_position()

    async def list_names(**query: Any) -> list[str]:
        headers = {"Ledger-Position": str(position)}
        response = await header_auth_api.http.get("/api/events/batches", params=query, headers=headers)
        assert response.json()["total"] == len(response.json()["batches"])
        return [batch["batch_name"] for batch in response.json()["batches"]]

    assert await list_names() == ["PyCon", "FOSDEM other", "FOSDEM main track"]
    assert await list_names(sort="created_at") == ["FOSDEM main track", "FOSDEM other", "PyCon"]
    assert await list_names(q="fosdem") == ["FOSDEM other", "FOSDEM main track"]
    assert await list_names(user_id="alice", status="processing") == ["PyCon", "FOSDEM main track"]
    assert await list_names(status="failed") == []


async def test_total_with_several_filters_is_counted_up_to_a_lower_limit(
    header_auth_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "MAX_COUNT", 20)
    monkeypatch.setattr(paging, "MAX_COMBINED_COUNT", 7)
    position = await create_jobs(header_auth_api)
    for query, total in [
        ({"language": "de"}, 15),
        ({"event": "Conf 0", "language": "fr"}, 7),
        ({"event": "Conf 0", "day": "Saturday", "track": "Main"}, 5),
        ({"day": "Saturday"}, 20),
    ]:
        page = await list_jobs(header_auth_api, position, **query)
        assert (page["total"], page.get("total_is_lower_bound", False)) == (total, total in (7, 20)), query


def test_admin_finds_jobs_of_a_user_whose_name_is_too_long_for_a_principal() -> None:
    job = make_job_document(1) | {"user_id": "x" * 300, "status": "failed"}
    query = job_list.JobFilter(user_id="x" * 300, status="failed").build_query(ADMIN)
    keys = set(job_list.build_row(job)["list_keys"])
    assert all(keys & set(condition["list_keys"]["$in"]) for condition in query.filter["$and"])


# Use of indexes -----------------------------------------------------------------------------------------------------


def make_job_document(number: int) -> Document:
    owner = ("alice", "bob", "carol")[number % 3]
    status = ("completed", "completed", "completed", "failed", "pending")[number % 5]
    job: Document = {
        "_id": f"job-{number:024x}",
        "job_id": f"job-{number:024x}",
        "job_name": f"Talk {number}",
        "job_type": "echo" if number % 2 else "session",
        "status": status,
        "error": {"code": f"E{number % 7}"} if status == "failed" else None,
        "batch_id": f"batch-{number % 20}",
        "user_id": owner,
        "teams": ["team-a"] if number % 2 else [],
        "access_control": {
            "visibility": ("private", "team", "public")[number % 11 % 3],
            "read_access": ["alice"] if number % 13 == 0 else [],
            "write_access": [],
            "admin_access": [],
        },
        "parameters": {
            "track": f"Track {number % 17}",
            "event": f"Event {number % 4}",
            "day": f"Day {number % 3}",
            "target_language": f"l{number % 5}",
        },
        "archived": False,
        "due_at": None,
        "due_reason": "due_time",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
    }
    jobs._set_search_keys(job)
    return job


def test_filter_with_unknown_field_is_rejected() -> None:
    fields: dict[str, Any] = {"batch": "batch-7"}
    with pytest.raises(ValidationError, match="batch"):
        job_list.JobFilter(**fields)


@pytest.mark.parametrize("principal", [ADMIN, ALICE, STRANGER], ids=["admin", "alice", "stranger"])
async def test_every_job_list_query_examines_few_index_keys(api_without_worker: Api, principal: Principal) -> None:
    documents = [make_job_document(number) for number in range(3000)]
    await api_without_worker.db.jobs.insert_many(documents)
    await api_without_worker.db.job_list.insert_many([job_list.build_row(job) for job in documents])
    cursor = paging.PageCursor(datetime(2026, 1, 1, 0, 20, tzinfo=UTC), "job-1")
    for job_filter in [
        job_list.JobFilter(),
        job_list.JobFilter(status="failed"),
        job_list.JobFilter(batch_id="batch-7"),
        job_list.JobFilter(batch_id="batch-7", status="completed"),
        job_list.JobFilter(user_id="alice"),
        job_list.JobFilter(user_id="alice", status="failed"),
        job_list.JobFilter(track="Track 3"),
        job_list.JobFilter(track="Track 3", status="pending"),
        job_list.JobFilter(event="Event 1", status="failed"),
        job_list.JobFilter(day="Day 2"),
        job_list.JobFilter(language="l4"),
        job_list.JobFilter(error_code="E3"),
        job_list.JobFilter(job_type="echo"),
        job_list.JobFilter(created_after=datetime(2026, 1, 1, 0, 30, tzinfo=UTC)),
        job_list.JobFilter(q="talk"),
        job_list.JobFilter(archived=False),
    ]:
        for after in (None, cursor):
            for newest_first in (True, False):
                await check_query_plan(
                    api_without_worker, job_filter.build_query(principal), after, newest_first=newest_first
                )


async def check_query_plan(api: Api, query: ListQuery, after: paging.PageCursor | None, *, newest_first: bool) -> None:
    """Check that a page is read from an index without a sort, and how many keys are examined.

    For a single facet or word, these are few more than returned. For several, they are at most the keys of the rarest.
    """
    page_query, order = paging.build_page_query(query.filter, after, newest_first=newest_first)
    command = {"find": query.view, "filter": page_query, "sort": dict(order), "limit": 50, "hint": dict(query.hint)}
    explanation = await api.db.command({"explain": command, "verbosity": "executionStats"})
    stats = explanation["executionStats"]
    assert "COLLSCAN" not in str(explanation["queryPlanner"]["winningPlan"]), query
    assert "'stage': 'SORT'" not in str(explanation["queryPlanner"]["winningPlan"]), query
    most_keys = stats["nReturned"]
    if len(query.filter["$and"]) > 1:
        collection = api.db[query.view]
        most_keys = min([await collection.count_documents(condition) for condition in query.filter["$and"]])
    # Each scope of the principal is a range of the index, and one additional key ends each range.
    assert stats["totalKeysExamined"] <= 2 * most_keys + 8, (query, stats["totalKeysExamined"], most_keys)


@pytest.mark.parametrize("rare", ["status", "track"])
async def test_list_by_two_facets_follows_the_rarer_one(api_without_worker: Api, rare: str) -> None:
    """The newest jobs are a backlog, so neither the newest of a status nor those of a track are the wanted ones."""
    documents = [make_job_document(number) for number in range(6000)]
    for number, job in enumerate(documents):
        is_wanted = number % 600 == 5
        job["status"] = "failed" if is_wanted or (rare == "track" and number < 3000) else "pending"
        job["error"] = None
        job["parameters"]["track"] = "Wanted" if is_wanted or (rare == "status" and number < 3000) else "Other"
    await api_without_worker.db.jobs.insert_many(documents)
    await api_without_worker.db.job_list.insert_many([job_list.build_row(job) for job in documents])
    query = job_list.JobFilter(status="failed", track="Wanted").build_query(ADMIN)
    for newest_first in (True, False):
        await check_query_plan(api_without_worker, query, None, newest_first=newest_first)
    rows, _ = await paging.find_page(Views(api_without_worker.db), query, paging.PageRequest(limit=20))
    assert [row["_id"] for row in rows] == [f"job-{number:024x}" for number in range(5405, 0, -600)]


@pytest.mark.parametrize("principal", [ADMIN, ALICE], ids=["admin", "alice"])
async def test_list_by_id_prefix_examines_only_ids_with_prefix(api_without_worker: Api, principal: Principal) -> None:
    documents = [make_job_document(number) for number in range(3000)]
    await api_without_worker.db.jobs.insert_many(documents)
    await api_without_worker.db.job_list.insert_many([job_list.build_row(job) for job in documents])
    query = job_list.JobFilter(id_prefix=f"job-{7:024x}"[:-1]).build_query(principal)
    command = {"find": query.view, "filter": query.filter, "hint": dict(query.hint)}
    explanation = await api_without_worker.db.command({"explain": command, "verbosity": "executionStats"})
    assert explanation["executionStats"]["totalKeysExamined"] <= 17
