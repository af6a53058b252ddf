"""Sessions of the dashboard: what the cookie is, what it opens, and when it ends, in each mode that has them."""

from __future__ import annotations

import asyncio
import socket
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
from jobledger.cli.api_key_admin import new_key
from jobledger.ledger.mongo.connection import Database
from tests.api.conftest import Api, run_api
from tests.support.jwt_issuer import SECRET, make_token

SIGN_IN, SIGN_OUT, JOBS = "/monitoring/events/sign-in", "/monitoring/events/sign-out", "/api/events/jobs"
SOON_SECONDS = 5.0


@pytest.fixture
def run(mongodb_uri: str, db_name: str, tmp_path: Path) -> Any:
    """Run an API without a worker, with these settings."""

    @asynccontextmanager
    async def running(mode: str, **sections: Any) -> AsyncIterator[Api]:
        (tmp_path / "secret").write_text(SECRET)
        auth: dict[str, Any] = {"mode": mode, **sections.pop("auth", {})}
        if mode == "jwt":
            auth["jwt"] = {"secret_file": str(tmp_path / "secret"), "leeway_seconds": 0, **auth.get("jwt", {})}
        async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"}), auth=auth, **sections):
            yield api

    return running


async def key_for(db: Database, user: str = "alice", expires_in: str | None = None) -> ApiKeyToken:
    key, text = new_key(user=user, groups=["editors"], roles=[], name=None, expires_in=expires_in)
    await api_keys.store_key(db, key)
    return text


def ours(api: Api) -> dict[str, str]:
    return {"Origin": str(api.http.base_url).rstrip("/")}


async def signed_in(api: Api, credential: object) -> httpx.Response:
    async with asyncio.timeout(SOON_SECONDS):
        while True:
            answer = await api.http.post(SIGN_IN, data={"credential": str(credential)}, headers=ours(api))
            if answer.status_code != 401:
                api.http.cookies.clear()
                return answer
            await asyncio.sleep(0.02)


async def status(api: Api, cookie: str, name: str = "jobledger") -> int:
    answer = await api.http.get(JOBS, headers={"Cookie": f"{name}={cookie}"})
    return answer.status_code


async def until_refused(api: Api, cookie: str) -> None:
    async with asyncio.timeout(SOON_SECONDS):
        while await status(api, cookie) != 401:  # noqa: ASYNC110 - another process reports it
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", ["keys", "jwt"])
async def test_cookie_is_a_random_id_that_acts_as_its_user_until_sign_out(run: Any, mode: str) -> None:
    async with run(mode) as api:
        credential = str(await key_for(api.db)) if mode == "keys" else make_token(groups=["editors"])
        answer = await signed_in(api, credential)
        cookie = answer.cookies["jobledger"]
        [stored] = await api.db.browser_sessions.find().to_list()
        assert credential not in answer.headers["set-cookie"]
        assert cookie not in str(stored)
        assert credential not in str(stored)
        attributes = answer.headers["set-cookie"].lower()
        assert "httponly" in attributes
        assert "samesite=strict" in attributes
        assert "path=/" in attributes
        submitted = await api.http.post(
            JOBS, json={"job_type": "echo", "parameters": {}}, headers={"Cookie": f"jobledger={cookie}", **ours(api)}
        )
        assert submitted.status_code == 202, submitted.text
        event = await api.db.events.find_one({"stream": submitted.json()["job_id"]})
        assert event is not None
        assert (event["data"]["user_id"], event["data"]["teams"]) == ("alice", ["team-editors"])
        out = await api.http.post(SIGN_OUT, headers={"Cookie": f"jobledger={cookie}", **ours(api)})
        assert out.status_code == 303
        assert await status(api, cookie) == 401
        assert await api.db.browser_sessions.count_documents({}) == 0


async def test_over_https_only_the_name_with_the_host_prefix_is_used(run: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"port": port, "public_url": "https://ledger.example.org/jobs"}
    origin = {"Origin": "https://ledger.example.org", "Host": "ledger.example.org"}
    here = f"http://127.0.0.1:{port}"
    async with run("keys", api=settings) as api, httpx.AsyncClient(base_url=here, trust_env=False) as client:
        key = await key_for(api.db)
        async with asyncio.timeout(SOON_SECONDS):
            form = {"credential": str(key)}
            while (answer := await client.post(SIGN_IN, data=form, headers=origin)).is_client_error:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        sent = answer.headers["set-cookie"]
        assert sent.startswith("__Host-jobledger=")
        assert "secure" in sent.lower()
        assert "domain" not in sent.lower()
        cookie = sent.partition("=")[2].partition(";")[0]
        client.cookies.clear()
        for name, expected in (("__Host-jobledger", 200), ("jobledger", 401)):
            found = await client.get(JOBS, headers={"Cookie": f"{name}={cookie}"})
            assert found.status_code == expected


async def test_session_ends_with_its_key_and_by_command(run: Any) -> None:
    async with run("keys") as api:
        text = await key_for(api.db)
        first, second = [(await signed_in(api, text)).cookies["jobledger"] for _ in range(2)]
        other = (await signed_in(api, await key_for(api.db, "bob"))).cookies["jobledger"]
        assert [await status(api, it) for it in (first, second, other)] == [200, 200, 200]
        assert (await sessions.count_sessions(api.db))[sessions.get_session_owner(key_id=text.key_id)] == 2
        assert await sessions.end_sessions(api.db, sessions.get_session_owner(key_id=text.key_id)) == 2
        await until_refused(api, first)
        third = (await signed_in(api, text)).cookies["jobledger"]
        await api_keys.revoke_key(api.db, text.key_id)
        await until_refused(api, third)
        assert await status(api, other) == 200


async def test_session_ends_when_its_token_expires_and_not_later(run: Any) -> None:
    async with run("jwt") as api:
        answer = await signed_in(api, make_token(exp=int(time.time()) + 3))
        assert await status(api, answer.cookies["jobledger"]) == 200
        await until_refused(api, answer.cookies["jobledger"])


async def test_session_of_other_settings_opens_nothing(run: Any) -> None:
    async with run("jwt") as api:
        cookie = (await signed_in(api, make_token())).cookies["jobledger"]
        assert await status(api, cookie) == 200
    async with run("jwt", auth={"admins": ["bob"]}) as api:
        assert await status(api, cookie) == 401
    async with run("keys") as api:
        assert await status(api, cookie) == 401


@pytest.mark.parametrize("made_up", ["", "x" * 43, "é" * 43, "a" * 10_000, "jl_0123456789abcdef_" + "x" * 43])
async def test_made_up_cookie_and_credential_as_cookie_open_nothing(run: Any, made_up: str) -> None:
    async with run("keys") as api:
        text = await key_for(api.db)
        await signed_in(api, text)
        for cookie in (made_up.encode("latin-1", "replace").decode("latin-1"), str(text)):
            answer = await api.http.get(JOBS, headers={b"Cookie": f"jobledger={cookie}".encode("latin-1")})
            assert answer.status_code == 401


async def test_new_session_ends_the_oldest_beyond_the_limit(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS_PER_OWNER", 3)
    async with run("keys") as api:
        text = await key_for(api.db)
        cookies = [(await signed_in(api, text)).cookies["jobledger"] for _ in range(5)]
        await until_refused(api, cookies[0])
        await until_refused(api, cookies[1])
        assert [await status(api, it) for it in cookies[2:]] == [200, 200, 200]


async def test_sign_in_replaces_the_session_the_browser_held(run: Any) -> None:
    async with run("keys") as api:
        text = await key_for(api.db)
        first = (await signed_in(api, text)).cookies["jobledger"]
        headers = {"Cookie": f"jobledger={first}", **ours(api)}
        answer = await api.http.post(SIGN_IN, data={"credential": str(text)}, headers=headers)
        second = answer.cookies["jobledger"]
        api.http.cookies.clear()
        assert second != first
        assert (await status(api, first), await status(api, second)) == (401, 200)
        assert answer.headers.get_list("set-cookie") == [answer.headers["set-cookie"]]


async def test_page_of_a_cors_origin_cannot_use_the_cookie(run: Any) -> None:
    friend = "https://cms.example.org"
    async with run("keys", api={"port": 0, "cors_origins": [friend]}) as api:
        text = await key_for(api.db)
        cookie = (await signed_in(api, text)).cookies["jobledger"]
        job = {"job_type": "echo", "parameters": {}}
        for headers, expected in (
            ({"Cookie": f"jobledger={cookie}"}, 401),
            ({"Cookie": f"jobledger={cookie}", "Authorization": f"Bearer {text}"}, 202),
        ):
            answer = await api.http.post(JOBS, json=job, headers={"Origin": friend, **headers})
            assert answer.status_code == expected


async def test_second_process_accepts_and_ends_the_same_session(run: Any) -> None:
    async with run("keys") as one, run("keys") as two:
        cookie = (await signed_in(one, await key_for(one.db))).cookies["jobledger"]
        assert await status(two, cookie) == 200
        await two.http.post(SIGN_OUT, headers={"Cookie": f"jobledger={cookie}", **ours(two)})
        assert await status(two, cookie) == 401
        await until_refused(one, cookie)
