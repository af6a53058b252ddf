"""Test permissions: every kind of principal, at every operation, with every visibility.

The expected access levels are a table of their own, taken from the reference and not from the code.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.api.conftest import Api, run_api
from tests.support.header_auth import principal_header

NONE, READ, WRITE, ADMIN = range(4)
ACCESS: Final[dict[str, Any]] = {
    "read_access": ["reader", "team-readers"],
    "write_access": ["writer", "team-writers"],
    "admin_access": ["keeper", "team-keepers"],
}
OWNER: Final = principal_header("owner", ["team-o"])
WEBHOOK: Final = {"url": "https://hooks.invalid/secretname"}


class Caller(NamedTuple):
    """A principal and its access level to the owner's jobs and batches, by their visibility."""

    name: str
    headers: dict[str, str]
    private: int
    team: int
    public: int


CALLERS: Final = [
    Caller("owner", OWNER, ADMIN, ADMIN, ADMIN),
    Caller("admin", principal_header("ann", roles=["admin"]), ADMIN, ADMIN, ADMIN),
    Caller("user in admin_access", principal_header("keeper"), ADMIN, ADMIN, ADMIN),
    Caller("team in admin_access", principal_header("k", ["team-keepers"]), ADMIN, ADMIN, ADMIN),
    Caller("user in write_access", principal_header("writer"), WRITE, WRITE, WRITE),
    Caller("team in write_access", principal_header("w", ["team-writers"]), WRITE, WRITE, WRITE),
    Caller("user in read_access", principal_header("reader"), READ, READ, READ),
    Caller("team in read_access", principal_header("r", ["team-readers"]), READ, READ, READ),
    Caller("user in a team of the owner", principal_header("t", ["team-o", "team-x"]), NONE, READ, READ),
    Caller("user in another team", principal_header("x", ["team-x"]), NONE, NONE, READ),
    Caller("other user", principal_header("zoe"), NONE, NONE, READ),
    Caller("monitor", principal_header("mona", roles=["monitor"]), NONE, NONE, READ),
    Caller("user named like a scope", principal_header("*"), NONE, NONE, READ),
    Caller("anonymous", principal_header(), NONE, NONE, READ),
]
VISIBILITIES: Final = ("private", "team", "public")


class Operation(NamedTuple):
    """A request for a job or batch, and the access level that it requires."""

    method: str
    path: str
    required: int
    body: Any = None


READ_OPERATIONS: Final = [
    Operation("GET", "/api/events/jobs/{job}", READ),
    Operation("GET", "/api/events/jobs/{job}?as_of=999999", READ),
    Operation("GET", "/api/events/jobs/{job}/history", READ),
    Operation("GET", "/api/events/jobs/{job}/logs", READ),
    Operation("GET", "/api/events/jobs/{job}/download-archive", READ),
    Operation("GET", "/api/events/batches/{batch}", READ),
    Operation("GET", "/api/events/batches/{batch}/jobs", READ),
    Operation("GET", "/api/events/batches/{batch}/history", READ),
    Operation("GET", "/api/events/batches/{batch}/download-archive", READ),
    Operation("GET", "/api/events/files/{file}", READ),
    Operation("GET", "/api/ledger/events?stream={job}", READ),
    Operation("GET", "/api/ledger/events?stream={batch}", READ),
    Operation("GET", "/api/ledger/events?stream={delivery}", READ),
    Operation("GET", "/api/monitoring/events/webhooks/{delivery}", READ),
    Operation("GET", "/api/monitoring/events/webhooks?job_id={job}", READ),
]
WRITE_OPERATIONS: Final = [
    Operation("POST", "/api/monitoring/events/webhooks/{delivery}/redeliver", WRITE),
    Operation("POST", "/api/events/jobs/{job}/archive", WRITE),
    Operation("POST", "/api/events/jobs/{job}/unarchive", WRITE),
    Operation("POST", "/api/events/jobs/{job}/restart", WRITE),
    Operation("POST", "/api/events/jobs/{job}/cancel", WRITE),
    Operation("PUT", "/api/events/jobs/{job}", WRITE, {"priority": 2}),
    Operation("PUT", "/api/events/jobs/{job}", ADMIN, {"access_control": ACCESS}),
    Operation("POST", "/api/events/batches/{batch}/pause", WRITE),
    Operation("POST", "/api/events/batches/{batch}/resume", WRITE),
    Operation("POST", "/api/events/batches/{batch}/archive", WRITE),
    Operation("POST", "/api/events/batches/{batch}/unarchive", WRITE),
    Operation("POST", "/api/events/batches/{batch}/restart", WRITE),
    Operation("POST", "/api/events/batches/{batch}/cancel", WRITE),
    Operation("PUT", "/api/events/batches/{batch}", ADMIN, {"access_control": ACCESS}),
    Operation("DELETE", "/api/events/jobs/{job}", ADMIN),
    Operation("DELETE", "/api/events/batches/{batch}", ADMIN),
]


@pytest.fixture
async def api(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """An API with all roles that authenticates by a header."""
    async for api in run_api(mongodb_uri, db_name, tmp_path):
        yield api


class Resources(NamedTuple):
    """The owner's finished batch with one job, which has a file and a webhook delivery."""

    batch: str
    job: str
    file: str
    delivery: str


async def create_resources(api: Api, visibility: str) -> Resources:
    access = {**ACCESS, "visibility": visibility}
    content = {
        "batch_name": "secretname",
        "access_control": access,
        "jobs": [{"job_type": "echo", "job_name": "secretname", "parameters": {"text": "x"}, "webhook": WEBHOOK}],
    }
    response = (await api.post("/api/events/batches", content, **OWNER)).json()
    job = await api.wait_until_finished(response["job_ids"][0])
    await api.wait_for_event(response["batch_id"], "BatchFinished")
    delivery = f"delivery-{job['job_id']}-{job['version']}"
    return Resources(response["batch_id"], job["job_id"], job["results"]["files"][0]["path"], delivery)


async def request_status(api: Api, operation: Operation, resources: Resources, caller: Caller) -> int:
    path = operation.path.format(**resources._asdict())
    response = await api.http.request(operation.method, path, json=operation.body, headers=caller.headers)
    if response.status_code >= 400:
        assert response.json()["status"] == "error"
        assert "secretname" not in response.text
    return response.status_code


def get_expected_statuses(access: int, operation: Operation, caller: Caller) -> set[int]:
    if operation.method != "GET" and not caller.headers["X-Test-Principal"]:
        return {401, 404}
    if access < READ:
        return {404}
    return {403} if access < operation.required else {200, 202, 409}  # 409: allowed, but in the wrong state


@pytest.mark.timeout(300)
@pytest.mark.parametrize("visibility", VISIBILITIES)
async def test_operation_is_allowed_only_with_sufficient_access(api: Api, visibility: str) -> None:
    failures: list[str] = []
    resources = await create_resources(api, visibility)
    owner, *other_callers = CALLERS
    for operation in [*READ_OPERATIONS, *WRITE_OPERATIONS]:
        if "access_control" in (operation.body or {}):
            operation = operation._replace(body={"access_control": {**ACCESS, "visibility": visibility}})
        for caller in [*other_callers, owner]:  # the owner last, because the owner's writes change the state
            access = getattr(caller, visibility)
            if access >= operation.required > READ and caller.name != "owner":
                continue  # would change the state for the next callers; the next test calls these operations
            status = await request_status(api, operation, resources, caller)
            expected = get_expected_statuses(access, operation, caller)
            if status not in expected:
                failures.append(f"{caller.name}, {operation.method} {operation.path}: {status}, not in {expected}")
        if operation.method == "DELETE":
            resources = await create_resources(api, visibility)
    assert failures == []


@pytest.mark.timeout(300)
async def test_operation_with_sufficient_access_succeeds(api: Api) -> None:
    failures: list[str] = []
    for caller in CALLERS:
        resources: Resources | None = None
        for operation in WRITE_OPERATIONS:
            if caller.private >= operation.required and caller.name != "owner":
                if resources is None or operation.method == "DELETE":
                    resources = await create_resources(api, "private")
                status = await request_status(api, operation, resources, caller)
                if status not in (200, 202, 409):
                    failures.append(f"{caller.name}, {operation.method} {operation.path}: {status}")
    assert failures == []


@pytest.mark.timeout(300)
async def test_lists_and_totals_contain_only_readable_jobs_and_batches(api: Api) -> None:
    resources = {visibility: await create_resources(api, visibility) for visibility in VISIBILITIES}
    position = str(await api.event_store.read_head_position())
    for caller in CALLERS:
        headers = {**caller.headers, "Ledger-Position": position}
        readable = [resources[visibility] for visibility in VISIBILITIES if getattr(caller, visibility) >= READ]
        jobs, batches = {item.job for item in readable}, {item.batch for item in readable}
        for query in ("", "?status=completed", "?q=secretname", "?user_id=owner", "?job_type=echo", "?skip=0&limit=50"):
            content = (await api.http.get(f"/api/events/jobs{query}", headers=headers)).json()
            listed = {job["job_id"] for job in content["jobs"]}
            assert (listed, content["total"]) == (jobs, len(jobs)), (caller, query)
        for query in ("", "?status=completed", "?q=secretname", "?user_id=owner"):
            content = (await api.http.get(f"/api/events/batches{query}", headers=headers)).json()
            listed = {batch["batch_id"] for batch in content["batches"]}
            assert (listed, content["total"]) == (batches, len(batches)), (caller, query)


@pytest.mark.timeout(300)
async def test_log_page_contains_only_events_of_readable_streams(api: Api) -> None:
    resources = {visibility: await create_resources(api, visibility) for visibility in VISIBILITIES}
    for caller in CALLERS:
        content = (await api.http.get("/api/ledger/events?after=0&limit=1000", headers=caller.headers)).json()
        streams = {event["stream"] for event in content["events"]} - {"void"}
        readable = [resources[visibility] for visibility in VISIBILITIES if getattr(caller, visibility) >= READ]
        expected = {stream for item in readable for stream in (item.batch, item.job, item.delivery)}
        workers = {stream for stream in streams if stream.startswith("worker-")}
        assert streams - workers == expected, caller.name
        assert bool(workers) == (caller.name == "admin"), caller.name


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (principal_header("ann", roles=["admin"]), 200),
        (principal_header("mona", roles=["monitor"]), 200),
        (principal_header("zoe"), 403),
        (principal_header("zoe", ["team-x"]), 403),
        (principal_header(), 401),
    ],
    ids=["admin", "monitor", "user", "user with a team", "anonymous"],
)
async def test_statistics_require_the_role_monitor_or_admin(
    shared_header_auth_api: Api, headers: dict[str, str], status: int
) -> None:
    for path in ("/api/monitoring/events/stats", "/metrics"):
        assert (await shared_header_auth_api.http.get(path, headers=headers)).status_code == status, path


async def test_submission_for_another_user_requires_admin(shared_header_auth_api: Api) -> None:
    job = {"job_type": "echo", "parameters": {}}
    for path, content in (
        ("jobs", {**job, "user_id": "bob"}),
        ("batches", {"jobs": [job], "user_id": "bob"}),
        ("batches", {"jobs": [{**job, "user_id": "bob"}]}),
    ):
        for headers, status in (
            (principal_header("zoe"), 403),
            (principal_header(), 401),
            (principal_header("ann", roles=["admin"]), 202),
            (principal_header("bob"), 202),
        ):
            assert (await shared_header_auth_api.post(f"/api/events/{path}", content, **headers)).status_code == status


async def test_batch_operation_skips_jobs_without_read_access(shared_header_auth_api: Api) -> None:
    job = {"job_type": "echo", "parameters": {}}
    private_job = {**job, "access_control": {"visibility": "private"}}
    content = {"access_control": {"write_access": ["writer"]}, "jobs": [private_job, job]}
    batch = (await shared_header_auth_api.post("/api/events/batches", content, **OWNER)).json()
    await shared_header_auth_api.get("/api/events/jobs", await shared_header_auth_api.event_store.read_head_position())

    listed = await shared_header_auth_api.get(
        f"/api/events/batches/{batch['batch_id']}/jobs", **principal_header("writer")
    )
    cancelled = await shared_header_auth_api.post(
        f"/api/events/batches/{batch['batch_id']}/cancel", **principal_header("writer")
    )

    assert [job["job_id"] for job in listed.json()["jobs"]] == batch["job_ids"][1:]
    assert cancelled.json()["jobs"] == {"total": 1, "changed": 1, "unchanged": 0, "rejected": 0}
    assert [event.type for event in await shared_header_auth_api.event_store.read_stream(batch["job_ids"][0])] == [
        "JobSubmitted"
    ]
