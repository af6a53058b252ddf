"""Browser sessions: the cookie, what it permits, and when it ends, in each authentication mode that has sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.api.auth import api_keys
from jobledger.api.auth import browser_sessions as sessions
from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.cli.administration.api_key_admin import generate_key
from jobledger.ledger.mongo.connection import Database
from tests.api.conftest import Api, run_api
from tests.support.jwt_issuer import SECRET, make_token
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.replica_set import free_port

SIGN_IN, SIGN_OUT, JOBS = "/monitoring/events/sign-in", "/monitoring/events/sign-out", "/api/events/jobs"


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    """Return a context manager that runs an API process in an authentication mode."""

    @asynccontextmanager
    async def running(mode: str, **sections: Any) -> AsyncIterator[Api]:
        (tmp_path / "secret").write_text(SECRET)
        auth: dict[str, Any] = {"mode": mode, **sections.pop("auth", {})}
        if mode == "jwt":
            auth["jwt"] = {"secret_file": str(tmp_path / "secret"), "leeway_seconds": 0, **auth.get("jwt", {})}
        async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"}), auth=auth, **sections):
            yield api

    return running


async def create_key(db: Database, user: str = "alice") -> ApiKeyToken:
    key, token = generate_key(user=user, groups=["editors"], roles=[], name=None, expires_in=None)
    await api_keys.store_key(db, key)
    return token


async def sign_in(api: Api, credential: object) -> httpx.Response:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            response = await api.http.post(SIGN_IN, data={"credential": str(credential)}, headers=api.origin_header)
            if response.status_code != 401:
                api.http.cookies.clear()
                return response
            await asyncio.sleep(0.02)


async def request_status(api: Api, cookie: str, name: str = "jobledger") -> int:
    response = await api.http.get(JOBS, headers={"Cookie": f"{name}={cookie}"})
    return response.status_code


async def wait_until_rejected(api: Api, cookie: str) -> None:
    async def is_rejected() -> bool:
        return await request_status(api, cookie) == 401

    await poll_until(is_rejected, "the session has ended")


@pytest.mark.parametrize("mode", ["keys", "jwt"])
async def test_cookie_is_a_random_id_valid_until_sign_out(run: Any, mode: str) -> None:
    async with run(mode) as api:
        credential = str(await create_key(api.db)) if mode == "keys" else make_token(groups=["editors"])
        response = await sign_in(api, credential)
        cookie = response.cookies["jobledger"]
        [stored] = await api.db.browser_sessions.find().to_list()
        assert credential not in response.headers["set-cookie"]
        assert cookie not in str(stored)
        assert credential not in str(stored)
        attributes = response.headers["set-cookie"].lower()
        assert "httponly" in attributes
        assert "samesite=strict" in attributes
        assert "path=/" in attributes
        submitted = await api.http.post(
            JOBS,
            json={"job_type": "echo", "parameters": {}},
            headers={"Cookie": f"jobledger={cookie}", **api.origin_header},
        )
        assert submitted.status_code == 202, submitted.text
        event = await api.db.events.find_one({"stream": submitted.json()["job_id"]})
        assert event is not None
        assert (event["data"]["user_id"], event["data"]["teams"]) == ("alice", ["team-editors"])
        signed_out = await api.http.post(SIGN_OUT, headers={"Cookie": f"jobledger={cookie}", **api.origin_header})
        assert signed_out.status_code == 303
        assert await request_status(api, cookie) == 401
        assert await api.db.browser_sessions.count_documents({}) == 0


async def test_cookie_over_https_has_host_prefix_and_secure_flag(run: Any) -> None:
    port = free_port()
    settings = {"port": port, "public_url": "https://ledger.example.org/jobs"}
    origin = {"Origin": "https://ledger.example.org", "Host": "ledger.example.org"}
    base_url = f"http://127.0.0.1:{port}"
    async with run("keys", api=settings) as api, httpx.AsyncClient(base_url=base_url, trust_env=False) as client:
        key = await create_key(api.db)
        async with asyncio.timeout(DEADLINE_SECONDS):
            form = {"credential": str(key)}
            while (response := await client.post(SIGN_IN, data=form, headers=origin)).is_client_error:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        set_cookie = response.headers["set-cookie"]
        assert set_cookie.startswith("__Host-jobledger=")
        assert "secure" in set_cookie.lower()
        assert "domain" not in set_cookie.lower()
        cookie = set_cookie.partition("=")[2].partition(";")[0]
        client.cookies.clear()
        for name, expected in (("__Host-jobledger", 200), ("jobledger", 401)):
            response = await client.get(JOBS, headers={"Cookie": f"{name}={cookie}"})
            assert response.status_code == expected


async def test_session_ends_with_its_key_or_by_command(run: Any) -> None:
    async with run("keys") as api:
        token = await create_key(api.db)
        first, second = [(await sign_in(api, token)).cookies["jobledger"] for _ in range(2)]
        session_of_bob = (await sign_in(api, await create_key(api.db, "bob"))).cookies["jobledger"]
        assert [await request_status(api, session) for session in (first, second, session_of_bob)] == [200, 200, 200]
        assert (await sessions.count_sessions(api.db))[sessions.build_holder(key_id=token.key_id)] == 2
        assert await sessions.end_sessions(api.db, sessions.build_holder(key_id=token.key_id)) == 2
        await wait_until_rejected(api, first)
        third = (await sign_in(api, token)).cookies["jobledger"]
        await api_keys.revoke_key(api.db, token.key_id)
        await wait_until_rejected(api, third)
        assert await request_status(api, session_of_bob) == 200


async def test_session_ends_when_its_token_expires(run: Any) -> None:
    async with run("jwt") as api:
        response = await sign_in(api, make_token(exp=int(time.time()) + 3))
        assert await request_status(api, response.cookies["jobledger"]) == 200
        await wait_until_rejected(api, response.cookies["jobledger"])


async def test_session_of_other_settings_is_rejected(run: Any) -> None:
    async with run("jwt") as api:
        cookie = (await sign_in(api, make_token())).cookies["jobledger"]
        assert await request_status(api, cookie) == 200
    async with run("jwt", auth={"admins": ["bob"]}) as api:
        assert await request_status(api, cookie) == 401
    async with run("keys") as api:
        assert await request_status(api, cookie) == 401


@pytest.mark.parametrize("cookie_value", ["", "x" * 43, "é" * 43, "a" * 10_000, "jl_0123456789abcdef_" + "x" * 43])
async def test_invalid_cookie_and_credential_as_cookie_are_rejected(run: Any, cookie_value: str) -> None:
    async with run("keys") as api:
        token = await create_key(api.db)
        await sign_in(api, token)
        for cookie in (cookie_value.encode("latin-1", "replace").decode("latin-1"), str(token)):
            response = await api.http.get(JOBS, headers={b"Cookie": f"jobledger={cookie}".encode("latin-1")})
            assert response.status_code == 401


async def test_new_session_beyond_limit_ends_the_oldest(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS_PER_HOLDER", 3)
    async with run("keys") as api:
        token = await create_key(api.db)
        cookies = [(await sign_in(api, token)).cookies["jobledger"] for _ in range(5)]
        await wait_until_rejected(api, cookies[0])
        await wait_until_rejected(api, cookies[1])
        assert [await request_status(api, cookie) for cookie in cookies[2:]] == [200, 200, 200]


async def test_sign_in_replaces_existing_session_of_the_browser(run: Any) -> None:
    async with run("keys") as api:
        token = await create_key(api.db)
        first = (await sign_in(api, token)).cookies["jobledger"]
        headers = {"Cookie": f"jobledger={first}", **api.origin_header}
        response = await api.http.post(SIGN_IN, data={"credential": str(token)}, headers=headers)
        second = response.cookies["jobledger"]
        api.http.cookies.clear()
        assert second != first
        assert (await request_status(api, first), await request_status(api, second)) == (401, 200)
        assert response.headers.get_list("set-cookie") == [response.headers["set-cookie"]]


async def test_cors_origin_cannot_use_the_cookie(run: Any) -> None:
    allowed_origin = "https://cms.example.org"
    async with run("keys", api={"port": 0, "cors_origins": [allowed_origin]}) as api:
        token = await create_key(api.db)
        cookie = (await sign_in(api, token)).cookies["jobledger"]
        job = {"job_type": "echo", "parameters": {}}
        for headers, expected in (
            ({"Cookie": f"jobledger={cookie}"}, 401),
            ({"Cookie": f"jobledger={cookie}", "Authorization": f"Bearer {token}"}, 202),
        ):
            response = await api.http.post(JOBS, json=job, headers={"Origin": allowed_origin, **headers})
            assert response.status_code == expected


async def test_session_is_shared_by_two_processes(run: Any) -> None:
    async with run("keys") as first_process, run("keys") as second_process:
        cookie = (await sign_in(first_process, await create_key(first_process.db))).cookies["jobledger"]
        assert await request_status(second_process, cookie) == 200
        await second_process.http.post(
            SIGN_OUT, headers={"Cookie": f"jobledger={cookie}", **second_process.origin_header}
        )
        assert await request_status(second_process, cookie) == 401
        await wait_until_rejected(first_process, cookie)
