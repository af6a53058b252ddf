"""Authentication by API keys over HTTP."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.api.auth import api_keys as keys
from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.cli.administration.api_key_admin import generate_key
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
    wait_for_status,
)
from tests.api.conftest import Api


async def test_key_determines_user_groups_and_roles(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        alice = build_bearer_header(await create_key(api, groups=["ops", "team-web"]))
        assert await submit_and_identify(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert not await is_monitor(api, alice)
        admin, monitor = await create_key(api, roles=["admin"]), await create_key(api, roles=["monitor"])
        assert await is_admin(api, build_bearer_header(admin))
        assert await is_monitor(api, build_bearer_header(monitor))
        assert not await is_admin(api, build_bearer_header(monitor))
        assert await submit_and_identify(api, {"Authorization": f"bEARER {admin}"}) == ("alice", [])


async def test_key_works_in_process_started_after_its_creation(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.unrelated.insert_one({})  # the next change stream starts after the key, at the newest operation
    async with runner.run("keys") as api:
        assert (await api.http.get(JOBS, headers=build_bearer_header(token))).status_code == 200


async def test_revoked_key_is_rejected_and_other_keys_keep_working(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token, other_token = await create_key(api), await create_key(api)
        assert await keys.revoke_key(api.db, token.key_id)
        await wait_for_status(api, token, 401)
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(token)))
        assert (await api.http.get(JOBS, headers=build_bearer_header(other_token))).status_code == 200


async def test_request_with_key_does_not_query_api_keys(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.command("profile", 2)
        for _ in range(5):
            await api.http.get(JOBS, headers=build_bearer_header(token))
        await api.db.command("profile", 0)
        commands = [entry["command"] async for entry in api.db["system.profile"].find({"op": "query"})]
    assert any(command.get("find") == "job_list" for command in commands), "nothing was profiled"
    assert not [command for command in commands if command.get("find") == "api_keys"]


async def create_expiring_key(api: Api) -> tuple[ApiKeyToken, datetime]:
    """Create a key that expires within seconds and wait until the API accepts it. Return its token and expiry."""
    for lifetime in (2, 10, 50):  # on a busy machine, the API may learn of a key only after it has expired
        key, token = generate_key(user="alice", groups=(), roles=(), name=None, expires_in=timedelta(minutes=1))
        expires_at = datetime.now(UTC) + timedelta(seconds=lifetime)
        await keys.store_key(api.db, key.model_copy(update={"expires_at": expires_at}))
        while datetime.now(UTC) < expires_at:
            if (await api.http.get(JOBS, headers=build_bearer_header(token))).status_code == 200:
                return token, expires_at
    raise AssertionError("the API accepted no key before it expired")


async def test_key_is_rejected_once_it_expires_without_any_event(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token, expires_at = await create_expiring_key(api)
        await wait_for_status(api, token, 401)
        assert datetime.now(UTC) >= expires_at - timedelta(milliseconds=1), "the database stores milliseconds"


async def test_every_invalid_key_gets_the_same_response(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        valid = await create_key(api)
        key, expired = generate_key(user="alice", groups=(), roles=("admin",), name=None, expires_in=None)
        await keys.store_key(api.db, key.model_copy(update={"expires_at": datetime.now(UTC) - timedelta(seconds=1)}))
        later = await create_key(api)  # the API learns of keys in order, so it has loaded the expired one too
        tokens = {
            "expired": expired,
            "unknown": ApiKeyToken.generate(),
            "another's secret": ApiKeyToken(valid.key_id, later.secret),
            "similar secret": ApiKeyToken(valid.key_id, valid.secret[:-1] + ("A" if valid.secret[-1] != "A" else "B")),
            "truncated": str(valid)[:-1],
            "extended": f"{valid}x",
            "without a secret": f"jl_{valid.key_id}_",
            "ID only": valid.key_id,
            "secret only": valid.secret,
            "another prefix": f"sk_{valid.key_id}_{valid.secret}",
            "query operator": '{"$gt": ""}',
            "empty": "",
            "very long": "x" * 20_000,
        }
        responses = {
            name: await api.http.get(JOBS, headers=build_bearer_header(token)) for name, token in tokens.items()
        }
        responses["another scheme"] = await api.http.get(JOBS, headers={"Authorization": f"Basic {valid}"})
        responses["no scheme"] = await api.http.get(JOBS, headers={"Authorization": str(valid)})
        responses["repeated"] = await api.http.get(JOBS, headers=[("Authorization", f"Bearer {valid}")] * 2)
        responses["in the query"] = await api.http.get(f"{JOBS}?key={valid}", headers={"Authorization": "Bearer"})
        messages = {name: assert_unauthorized(response) for name, response in responses.items()}
        assert len(set(messages.values())) == 1, messages

        assert "API key" in assert_unauthorized(await api.http.get(JOBS), "authentication_required")


async def test_only_health_routes_work_without_authentication(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        for path in ("/healthz", "/readyz"):
            assert (await api.http.get(path)).status_code == 200
        for path in ("/", JOBS, STATS, "/api/ledger/stream", "/api/events/files/x", "/nowhere", "/healthz/"):
            assert_unauthorized(await api.http.get(path), "authentication_required")
        assert_unauthorized(await api.http.post(JOBS, json=ECHO), "authentication_required")


async def test_database_stores_hash_of_key_but_no_secret(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        [document] = await api.db.api_keys.find().to_list()
    assert token.secret not in repr(document)
    assert document["sha256"] == hashlib.sha256(token.secret.encode()).digest()
    assert token.secret not in repr(token)


@pytest.mark.parametrize(
    "document",
    [{}, {"sha256": b"short"}, {"user_id": "team-x"}, {"user_id": ""}, {"groups": "ops"}, {"roles": ["root"]}],
    ids=str,
)
async def test_invalid_key_document_is_ignored(runner: ApiRunner, document: dict[str, Any]) -> None:
    token = ApiKeyToken.generate()
    complete = {"_id": token.key_id, "sha256": token.digest, "user_id": "alice", "created_at": datetime.now(UTC)}
    async with runner.run("keys") as api:
        await api.db.api_keys.insert_one({**complete, **document} if document else {"_id": token.key_id})
        other_token = await create_key(api)
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(token)))
    async with runner.run("keys") as api:
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(token)))
        assert (await api.http.get(JOBS, headers=build_bearer_header(other_token))).status_code == 200


async def test_key_document_changed_by_hand_is_rejected(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.api_keys.update_one({"_id": token.key_id}, {"$set": {"roles": ["admin"]}})
        await wait_for_status(api, token, 401)
