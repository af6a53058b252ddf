"""Authentication by headers of a trusted proxy, and anonymous read access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.api.auth.api_keys import ApiKeyToken
from tests.api.authentication.conftest import (
    ECHO,
    JOBS,
    STATS,
    ApiRunner,
    assert_unauthorized,
    build_bearer_header,
    create_key,
    is_admin,
    is_monitor,
    submit_and_identify,
)
from tests.api.conftest import WITHOUT_WORKER, run_api

# Proxy headers ----------------------------------------------------------------------------------------------------

PROXY_HEADERS = {"groups_header": "X-Forwarded-Groups", "roles_header": "X-Roles"}
LOCAL_PROXY = {"trusted": ["127.0.0.0/8", "::1"], **PROXY_HEADERS}


async def test_trusted_proxy_headers_determine_user_groups_and_roles(runner: ApiRunner) -> None:
    async with runner.run("proxy", proxy=LOCAL_PROXY, admins=["ann"]) as api:
        alice = {"X-Forwarded-User": "alice", "X-Forwarded-Groups": "ops, team-web,,"}
        assert await submit_and_identify(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert await is_admin(api, {"X-Forwarded-User": "ann"})
        assert await is_admin(api, {"X-Forwarded-User": "alice", "X-Roles": "monitor, admin"})
        assert not await is_monitor(api, {"X-Forwarded-User": "alice", "X-Roles": "administrator"})
        non_ascii = await api.http.post(
            JOBS, json=ECHO, headers=httpx.Headers({"X-Forwarded-User": "Müller"}, encoding="utf-8")
        )
        assert non_ascii.json()["job"]["user_id"] == "Müller"
        assert_unauthorized(await api.http.get(JOBS), "authentication_required")


async def test_proxy_headers_not_in_settings_are_ignored(runner: ApiRunner) -> None:
    async with runner.run("proxy", proxy={"trusted": ["127.0.0.1"]}) as api:
        spoofed = {
            "X-Forwarded-User": "alice",
            "X-Forwarded-Groups": "ops",
            "X-Roles": "admin",
            "X-Forwarded-Roles": "a",
        }
        assert await submit_and_identify(api, spoofed) == ("alice", [])
        assert not await is_admin(api, spoofed)
        assert_unauthorized(await api.http.get(JOBS, headers={"X-Remote-User": "alice"}), "authentication_required")


async def test_headers_from_untrusted_address_are_rejected(runner: ApiRunner) -> None:
    async with runner.run(
        "proxy", proxy={"trusted": ["10.0.0.0/8", "::1"], **PROXY_HEADERS}, anonymous_read=True
    ) as api:
        for headers in (
            {"X-Forwarded-User": "alice"},
            {"X-Forwarded-User": "alice", "X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1"},
            {"X-Real-IP": "10.0.0.1", "X-Forwarded-User": "alice"},
            {},
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=headers))


async def test_repeated_or_invalid_proxy_headers_are_rejected(runner: ApiRunner) -> None:
    async with runner.run("proxy", proxy=LOCAL_PROXY) as api:
        for headers in (
            [("X-Forwarded-User", "alice"), ("X-Forwarded-User", "bob")],
            [("X-Forwarded-User", "alice"), ("x-forwarded-user", "alice")],
            [("X-Forwarded-User", "alice"), ("X-Roles", ""), ("X-Roles", "admin")],
            [("X-Forwarded-User", "alice"), ("X-Forwarded-Groups", "a"), ("X-Forwarded-Groups", "b")],
            [("X-Forwarded-User", "")],
            [("X-Forwarded-User", "team-ops")],
            [("X-Forwarded-User", "x" * 201)],
            [(b"X-Forwarded-User", b"\xff")],
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=httpx.Headers(headers)))


# Anonymous read ---------------------------------------------------------------------------------------------------


async def test_anonymous_read_shows_public_jobs_and_nothing_else(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    auth = {"mode": "keys", "anonymous_read": True}
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER, auth=auth):
        alice = build_bearer_header(await create_key(api))
        responses = {
            visibility: await api.http.post(
                JOBS, json={**ECHO, "access_control": {"visibility": visibility}}, headers=alice
            )
            for visibility in ("public", "private", "team")
        }
        ids = {visibility: response.json()["job_id"] for visibility, response in responses.items()}
        position = responses["team"].headers["Ledger-Position"]
        listed = (await api.get(JOBS, position)).json()
        assert [job["job_id"] for job in listed["jobs"]] == [ids["public"]]
        statuses = {visibility: (await api.get(f"{JOBS}/{job_id}")).status_code for visibility, job_id in ids.items()}
        assert statuses == {"public": 200, "private": 404, "team": 404}
        assert (await api.http.head(f"{JOBS}/{ids['public']}")).status_code == 200

        assert (await api.get("/nowhere")).status_code == 404
        assert_unauthorized(await api.http.post("/nowhere"), "authentication_required")
        assert_unauthorized(await api.http.post(JOBS, json=ECHO), "authentication_required")
        assert_unauthorized(await api.http.post(f"{JOBS}/{ids['public']}/cancel"), "authentication_required")
        assert_unauthorized(await api.http.delete(f"{JOBS}/{ids['public']}"), "authentication_required")
        assert_unauthorized(await api.http.get(STATS), "authentication_required")
        assert_unauthorized(
            await api.get(f"{JOBS}/{ids['public']}", None, **build_bearer_header(ApiKeyToken.generate()))
        )
        assert_unauthorized(await api.get(f"{JOBS}/{ids['public']}", None, Authorization=""))


@pytest.mark.parametrize("mode", ["jwt", "proxy"])
async def test_anonymous_read_works_in_jwt_and_proxy_mode(runner: ApiRunner, mode: str) -> None:
    auth: dict[str, Any] = runner.jwt_settings() if mode == "jwt" else {"proxy": LOCAL_PROXY}
    async with runner.run(mode, **auth, anonymous_read=True) as api:
        assert (await api.http.get(JOBS)).json()["total"] == 0
        assert_unauthorized(await api.http.post(JOBS, json=ECHO), "authentication_required")
        headers = build_bearer_header("x") if mode == "jwt" else {"X-Forwarded-User": ""}
        assert_unauthorized(await api.http.get(JOBS, headers=headers))
