"""Run an API with settings for authentication, and requests that show who the API takes the caller for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.api.auth import api_keys as keys
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.cli.administration.api_key_admin import generate_key
from jobledger.cli.composition import Role
from tests.api.conftest import Api, run_api
from tests.support.jwt_issuer import SECRET
from tests.support.polling import DEADLINE_SECONDS

JOBS, STATS = "/api/events/jobs", "/api/monitoring/events/stats"
ECHO: dict[str, Any] = {"job_type": "echo", "parameters": {}}
API_ONLY: frozenset[Role] = frozenset({"api"})


class ApiRunner:
    """Runs an API process with settings for authentication."""

    def __init__(self, uri: str, db_name: str, directory: Path) -> None:
        self._arguments = uri, db_name, directory
        self.directory = directory

    @asynccontextmanager
    async def run(self, mode: str, **auth: Any) -> AsyncIterator[Api]:
        apis = run_api(*self._arguments, API_ONLY, auth={"mode": mode, **auth})
        async for api in apis:
            yield api

    def write_file(self, name: str, content: str | bytes) -> str:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def jwt_settings(self, **more: Any) -> dict[str, Any]:
        """Return settings for tokens that are signed with the secret."""
        return {"jwt": {"secret_file": self.write_file("secret", SECRET + "\n"), **more}}


@pytest.fixture
def runner(mongodb_uri: str, db_name: str, tmp_path: Path) -> ApiRunner:
    return ApiRunner(mongodb_uri, db_name, tmp_path)


def build_bearer_header(credentials: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials}".strip()}


async def submit_and_identify(api: Api, headers: dict[str, str]) -> tuple[str, list[str]]:
    """Submit a job. Return the user and the groups that its first event records."""
    response = await api.http.post(JOBS, json=ECHO, headers=headers)
    assert response.status_code == 202, response.text
    event = await api.db.events.find_one({"stream": response.json()["job_id"], "version": 1})
    assert event is not None
    assert event["meta"]["actor"] == f"user:{event['data']['user_id']}"
    return event["data"]["user_id"], event["data"].get("teams", [])


async def is_admin(api: Api, headers: dict[str, str]) -> bool:
    """Return whether the caller may submit for another user."""
    response = await api.http.post(JOBS, json={**ECHO, "user_id": "another-user"}, headers=headers)
    assert response.status_code in (202, 403), response.text
    return response.status_code == 202


async def is_monitor(api: Api, headers: dict[str, str]) -> bool:
    response = await api.http.get(STATS, headers=headers)
    assert response.status_code in (200, 403), response.text
    return response.status_code == 200


def assert_unauthorized(response: httpx.Response, code: str = "invalid_credentials") -> str:
    """Check that the response is the 401 of wrong credentials. Return its message."""
    assert response.status_code == 401, response.text
    assert response.headers["WWW-Authenticate"] == "Bearer"
    content = response.json()
    assert (content["status"], content["code"], content["details"]) == ("error", code, {})
    return str(content["message"])


async def create_key(api: Api, **more: Any) -> ApiKeyToken:
    """Create a key for alice and return its token as soon as the API accepts it."""
    key, token = generate_key(**{"user": "alice", "groups": (), "roles": (), "name": None, "expires_in": None, **more})
    await store_key(api, key, token)
    return token


async def store_key(api: Api, key: ApiKey, token: ApiKeyToken) -> None:
    await keys.store_key(api.db, key)
    await wait_for_status(api, token, 200)


async def wait_for_status(api: Api, token: ApiKeyToken, status: int) -> None:
    """Send requests until the API, which learns of keys from its change stream, returns this status."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await api.http.get(JOBS, headers=build_bearer_header(token))).status_code != status:
            pass
