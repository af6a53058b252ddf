"""Who may do what at which door: every kind of principal, at every door, with every visibility, from one table.

The rights are written down here once more, in full, from the table of the reference: not asked of the code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from jobledger.cli.composition import ALL_ROLES
from tests.api.conftest import Api, run_api
from tests.support.header_auth import HeaderAuthBackend, principal_header

NONE, READ, WRITE, ADMIN = range(4)
ACCESS: Final[dict[str, Any]] = {
    "read_access": ["reader", "team-readers"],
    "write_access": ["writer", "team-writers"],
    "admin_access": ["keeper", "team-keepers"],
}
OWNER: Final = principal_header("owner", ["team-o"])
HOOK: Final = {"url": "https://hooks.invalid/secretname"}


class Who(NamedTuple):
    """Somebody, and what they may do with what is private, for the team, public."""

    name: str
    headers: dict[str, str]
    private: int
    team: int
    public: int


PEOPLE: Final = [
    Who("owner", OWNER, ADMIN, ADMIN, ADMIN),
    Who("admin", principal_header("ann", roles=["admin"]), ADMIN, ADMIN, ADMIN),
    Who("named keeper", principal_header("keeper"), ADMIN, ADMIN, ADMIN),
    Who("keeper by team", principal_header("k", ["team-keepers"]), ADMIN, ADMIN, ADMIN),
    Who("named writer", principal_header("writer"), WRITE, WRITE, WRITE),
    Who("writer by team", principal_header("w", ["team-writers"]), WRITE, WRITE, WRITE),
    Who("named reader", principal_header("reader"), READ, READ, READ),
    Who("reader by team", principal_header("r", ["team-readers"]), READ, READ, READ),
    Who("in a team with the owner", principal_header("t", ["team-o", "team-x"]), NONE, READ, READ),
    Who("in another team", principal_header("x", ["team-x"]), NONE, NONE, READ),
    Who("stranger", principal_header("zoe"), NONE, NONE, READ),
    Who("monitor", principal_header("mona", roles=["monitor"]), NONE, NONE, READ),
    Who("named like a scope", principal_header("*"), NONE, NONE, READ),
    Who("nobody", principal_header(), NONE, NONE, READ),
]
VISIBILITIES: Final = ("private", "team", "public")


class Door(NamedTuple):
    """A request for something of a job or batch, and the right it takes."""

    method: str
    path: str
    needs: int
    body: Any = None


READING: Final = [
    Door("GET", "/api/events/jobs/{job}", READ),
    Door("GET", "/api/events/jobs/{job}?as_of=999999", READ),
    Door("GET", "/api/events/jobs/{job}/history", READ),
    Door("GET", "/api/events/jobs/{job}/logs", READ),
    Door("GET", "/api/events/jobs/{job}/download-archive", READ),
    Door("GET", "/api/events/batches/{batch}", READ),
    Door("GET", "/api/events/batches/{batch}/jobs", READ),
    Door("GET", "/api/events/batches/{batch}/history", READ),
    Door("GET", "/api/events/batches/{batch}/download-archive", READ),
    Door("GET", "/api/events/files/{file}", READ),
    Door("GET", "/api/ledger/events?stream={job}", READ),
    Door("GET", "/api/ledger/events?stream={batch}", READ),
    Door("GET", "/api/ledger/events?stream={delivery}", READ),
    Door("GET", "/api/monitoring/events/webhooks/{delivery}", READ),
    Door("GET", "/api/monitoring/events/webhooks?job_id={job}", READ),
]
CHANGING: Final = [
    Door("POST", "/api/monitoring/events/webhooks/{delivery}/redeliver", WRITE),
    Door("POST", "/api/events/jobs/{job}/archive", WRITE),
    Door("POST", "/api/events/jobs/{job}/unarchive", WRITE),
    Door("POST", "/api/events/jobs/{job}/restart", WRITE),
    Door("POST", "/api/events/jobs/{job}/cancel", WRITE),
    Door("PUT", "/api/events/jobs/{job}", WRITE, {"priority": 2}),
    Door("PUT", "/api/events/jobs/{job}", ADMIN, {"access_control": ACCESS}),
    Door("POST", "/api/events/batches/{batch}/pause", WRITE),
    Door("POST", "/api/events/batches/{batch}/resume", WRITE),
    Door("POST", "/api/events/batches/{batch}/archive", WRITE),
    Door("POST", "/api/events/batches/{batch}/unarchive", WRITE),
    Door("POST", "/api/events/batches/{batch}/restart", WRITE),
    Door("POST", "/api/events/batches/{batch}/cancel", WRITE),
    Door("PUT", "/api/events/batches/{batch}", ADMIN, {"access_control": ACCESS}),
    Door("DELETE", "/api/events/jobs/{job}", ADMIN),
    Door("DELETE", "/api/events/batches/{batch}", ADMIN),
]


@pytest.fixture
async def api(mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """All roles, and a header that says who asks."""
    monkeypatch.setattr("jobledger.cli.server.SingleUserBackend", lambda user_id: HeaderAuthBackend())
    async for running in run_api(mongodb_uri, db_name, tmp_path, ALL_ROLES):
        yield running


class Thing(NamedTuple):
    """A finished batch of one job with a file and a webhook, of the owner's."""

    batch: str
    job: str
    file: str
    delivery: str


async def thing(api: Api, visibility: str) -> Thing:
    access = {**ACCESS, "visibility": visibility}
    content = {
        "batch_name": "secretname",
        "access_control": access,
        "jobs": [{"job_type": "echo", "job_name": "secretname", "parameters": {"text": "x"}, "webhook": HOOK}],
    }
    response = (await api.post("/api/events/batches", content, **OWNER)).json()
    job = await api.wait_until_finished(response["job_ids"][0])
    await api.wait_for_event(response["batch_id"], "BatchFinished")
    delivery = f"delivery-{job['job_id']}-{job['version']}"
    return Thing(response["batch_id"], job["job_id"], job["results"]["files"][0]["path"], delivery)


async def knock(api: Api, door: Door, what: Thing, who: Who) -> int:
    path = door.path.format(**what._asdict())
    response = await api.http.request(door.method, path, json=door.body, headers=who.headers)
    if response.status_code >= 400:
        assert response.json()["status"] == "error"
        assert "secretname" not in response.text
    return response.status_code


def expected(has: int, door: Door, who: Who) -> set[int]:
    if door.method != "GET" and not who.headers["X-Test-Principal"]:
        return {401, 404}
    if has < READ:
        return {404}
    return {403} if has < door.needs else {200, 202, 409}  # 409: the right was there, but not the state


@pytest.mark.timeout(300)
@pytest.mark.parametrize("visibility", VISIBILITIES)
async def test_operation_is_allowed_only_with_sufficient_access(api: Api, visibility: str) -> None:
    wrong: list[str] = []
    what = await thing(api, visibility)
    owner, *others = PEOPLE
    for door in [*READING, *CHANGING]:
        if "access_control" in (door.body or {}):
            door = door._replace(body={"access_control": {**ACCESS, "visibility": visibility}})
        for who in [*others, owner]:  # the owner last: what they do changes things for the others
            has = getattr(who, visibility)
            if has >= door.needs > READ and who.name != "owner":
                continue  # changes things for those who come after; each right is seen with the owner, below the others
            got = await knock(api, door, what, who)
            if got not in expected(has, door, who):
                wrong.append(f"{who.name} at {door.method} {door.path}: {got}, not {expected(has, door, who)}")
        if door.method == "DELETE":
            what = await thing(api, visibility)
    assert wrong == []


@pytest.mark.timeout(300)
async def test_operation_with_sufficient_access_succeeds(api: Api) -> None:
    wrong: list[str] = []
    for who in PEOPLE:
        for door in CHANGING:
            if who.private >= door.needs and who.name != "owner":
                what = await thing(api, "private") if door.method == "DELETE" or door is CHANGING[0] else what_was(who)
                remembered[who.name] = what
                if await knock(api, door, what, who) not in (200, 202, 409):
                    wrong.append(f"{who.name} at {door.method} {door.path}")
    assert wrong == []


remembered: dict[str, Thing] = {}


def what_was(who: Who) -> Thing:
    return remembered[who.name]


@pytest.mark.timeout(300)
async def test_lists_and_totals_contain_only_readable_jobs_and_batches(api: Api) -> None:
    things = {visibility: await thing(api, visibility) for visibility in VISIBILITIES}
    position = str(await api.event_store.head_position())
    for who in PEOPLE:
        headers = {**who.headers, "Ledger-Position": position}
        jobs = {things[visibility].job for visibility in VISIBILITIES if getattr(who, visibility) >= READ}
        batches = {things[visibility].batch for visibility in VISIBILITIES if getattr(who, visibility) >= READ}
        for query in ("", "?status=completed", "?q=secretname", "?user_id=owner", "?job_type=echo", "?skip=0&limit=50"):
            content = (await api.http.get(f"/api/events/jobs{query}", headers=headers)).json()
            assert ({job["job_id"] for job in content["jobs"]}, content["total"]) == (jobs, len(jobs)), (who, query)
        for query in ("", "?status=completed", "?q=secretname", "?user_id=owner"):
            content = (await api.http.get(f"/api/events/batches{query}", headers=headers)).json()
            found = {batch["batch_id"] for batch in content["batches"]}
            assert (found, content["total"]) == (batches, len(batches)), (who, query)


@pytest.mark.timeout(300)
async def test_log_page_contains_only_events_of_readable_streams(api: Api) -> None:
    things = {visibility: await thing(api, visibility) for visibility in VISIBILITIES}
    for who in PEOPLE:
        content = (await api.http.get("/api/ledger/events?after=0&limit=1000", headers=who.headers)).json()
        seen = {event["stream"] for event in content["events"]} - {"void"}
        may = {
            stream
            for visibility in VISIBILITIES
            if getattr(who, visibility) >= READ
            for stream in (things[visibility].batch, things[visibility].job, things[visibility].delivery)
        }
        assert seen == may, who.name


@pytest.mark.parametrize(
    ("who", "status"),
    [
        (principal_header("ann", roles=["admin"]), 200),
        (principal_header("mona", roles=["monitor"]), 200),
        (principal_header("zoe"), 403),
        (principal_header("zoe", ["team-x"]), 403),
        (principal_header(), 401),
    ],
)
async def test_statistics_require_the_role_monitor_or_admin(
    header_auth_api: Api, who: dict[str, str], status: int
) -> None:
    for path in ("/api/monitoring/events/stats", "/metrics"):
        assert (await header_auth_api.http.get(path, headers=who)).status_code == status, path


async def test_submission_for_another_user_requires_admin(header_auth_api: Api) -> None:
    job = {"job_type": "echo", "parameters": {}}
    for path, content in (
        ("jobs", {**job, "user_id": "bob"}),
        ("batches", {"jobs": [job], "user_id": "bob"}),
        ("batches", {"jobs": [{**job, "user_id": "bob"}]}),
    ):
        for who, status in (
            (principal_header("zoe"), 403),
            (principal_header(), 401),
            (principal_header("ann", roles=["admin"]), 202),
            (principal_header("bob"), 202),
        ):
            assert (await header_auth_api.post(f"/api/events/{path}", content, **who)).status_code == status


async def test_batch_operation_skips_jobs_without_read_access(header_auth_api: Api) -> None:
    hidden = {"job_type": "echo", "parameters": {}, "access_control": {"visibility": "private"}}
    content = {"access_control": {"write_access": ["writer"]}, "jobs": [hidden, {"job_type": "echo", "parameters": {}}]}
    batch = (await header_auth_api.post("/api/events/batches", content, **OWNER)).json()
    await header_auth_api.get("/api/events/jobs", await header_auth_api.event_store.head_position())

    listed = await header_auth_api.get(f"/api/events/batches/{batch['batch_id']}/jobs", **principal_header("writer"))
    cancelled = await header_auth_api.post(
        f"/api/events/batches/{batch['batch_id']}/cancel", **principal_header("writer")
    )

    assert [job["job_id"] for job in listed.json()["jobs"]] == batch["job_ids"][1:]
    assert cancelled.json()["jobs"] == {"total": 1, "changed": 1, "unchanged": 0, "rejected": 0}
    assert [event.type for event in await header_auth_api.event_store.read_stream(batch["job_ids"][0])] == [
        "JobSubmitted"
    ]
