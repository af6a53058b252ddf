"""Authentication by API keys, JWTs and proxy headers: over HTTP, with the settings of config.yaml."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from jobledger.api.auth import api_keys as keys
from jobledger.api.auth.api_keys import ApiKey, ApiKeyToken
from jobledger.api.auth.jwks import JwksKeySource, load_public_key
from jobledger.api.http.errors import ApiError
from jobledger.cli.api_key_admin import new_key
from jobledger.cli.composition import Role
from jobledger.ledger.domain.errors import ConfigurationError
from tests.api.conftest import DEADLINE_SECONDS, WITHOUT_WORKER, Api, run_api
from tests.support.jwt_issuer import (
    EC_KEY,
    OTHER_RSA_KEY,
    RSA_KEY,
    SECRET,
    JwksServer,
    make_token,
    public_key_jwk,
    public_key_pem,
    serve_jwks,
)

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


def bearer(credentials: object) -> dict[str, str]:
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
    key, token = new_key(**{"user": "alice", "groups": (), "roles": (), "name": None, "expires_in": None, **more})
    await store_key(api, key, token)
    return token


async def store_key(api: Api, key: ApiKey, token: ApiKeyToken) -> None:
    await keys.store_key(api.db, key)
    await wait_for_status(api, token, 200)


async def wait_for_status(api: Api, token: ApiKeyToken, status: int) -> None:
    """Send requests until the API, which learns of keys from its change stream, returns this status."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await api.http.get(JOBS, headers=bearer(token))).status_code != status:
            pass


# API keys ---------------------------------------------------------------------------------------------------------


async def test_key_determines_user_groups_and_roles(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        alice = bearer(await create_key(api, groups=["ops", "team-web"]))
        assert await submit_and_identify(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert not await is_monitor(api, alice)
        admin, monitor = await create_key(api, roles=["admin"]), await create_key(api, roles=["monitor"])
        assert await is_admin(api, bearer(admin))
        assert await is_monitor(api, bearer(monitor))
        assert not await is_admin(api, bearer(monitor))
        assert await submit_and_identify(api, {"Authorization": f"bEARER {admin}"}) == ("alice", [])


async def test_key_works_in_process_started_after_its_creation(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.unrelated.insert_one({})  # the next change stream starts after the key, at the newest operation
    async with runner.run("keys") as api:
        assert (await api.http.get(JOBS, headers=bearer(token))).status_code == 200


async def test_revoked_key_is_rejected_and_other_keys_keep_working(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token, other_token = await create_key(api), await create_key(api)
        assert await keys.revoke_key(api.db, token.key_id)
        await wait_for_status(api, token, 401)
        assert_unauthorized(await api.http.get(JOBS, headers=bearer(token)))
        assert (await api.http.get(JOBS, headers=bearer(other_token))).status_code == 200


async def test_request_with_key_does_not_query_api_keys(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.command("profile", 2)
        for _ in range(5):
            await api.http.get(JOBS, headers=bearer(token))
        await api.db.command("profile", 0)
        commands = [entry["command"] async for entry in api.db["system.profile"].find({"op": "query"})]
    assert any("jobs" in (command.get("find"), command.get("aggregate")) for command in commands), (
        "nothing was profiled"
    )
    assert not [command for command in commands if command.get("find") == "api_keys"]


async def test_key_is_rejected_once_it_expires_without_any_event(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        key, token = new_key(user="alice", groups=(), roles=(), name=None, expires_in="1m")
        expires_at = datetime.now(UTC) + timedelta(seconds=2)
        await store_key(api, key.model_copy(update={"expires_at": expires_at}), token)
        await wait_for_status(api, token, 401)
        assert datetime.now(UTC) >= expires_at - timedelta(milliseconds=1), "the database stores milliseconds"


async def test_every_invalid_key_gets_the_same_response(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        valid = await create_key(api)
        key, expired = new_key(user="alice", groups=(), roles=("admin",), name=None, expires_in=None)
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
        responses = {name: await api.http.get(JOBS, headers=bearer(token)) for name, token in tokens.items()}
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
        assert_unauthorized(await api.http.get(JOBS, headers=bearer(token)))
    async with runner.run("keys") as api:
        assert_unauthorized(await api.http.get(JOBS, headers=bearer(token)))
        assert (await api.http.get(JOBS, headers=bearer(other_token))).status_code == 200


async def test_key_document_changed_by_hand_is_rejected(runner: ApiRunner) -> None:
    async with runner.run("keys") as api:
        token = await create_key(api)
        await api.db.api_keys.update_one({"_id": token.key_id}, {"$set": {"roles": ["admin"]}})
        await wait_for_status(api, token, 401)


# JWTs -------------------------------------------------------------------------------------------------------------


async def test_token_determines_user_groups_and_roles(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings()) as api:
        alice = bearer(make_token(groups=["ops", "team-web", " "], roles=["author", "offline_access"]))
        assert await submit_and_identify(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert not await is_monitor(api, alice)
        assert await is_admin(api, bearer(make_token(roles=["admin"])))
        assert await is_monitor(api, bearer(make_token(roles="monitor")))
        assert await submit_and_identify(api, bearer(make_token(groups="ops"))) == ("alice", ["team-ops"])


async def test_settings_assign_roles_by_user_and_by_group(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings(), admins=["ann", "team-ops"], monitors=["mona"]) as api:
        assert await is_admin(api, bearer(make_token(sub="ann")))
        assert await is_admin(api, bearer(make_token(groups=["ops"])))
        assert not await is_admin(api, bearer(make_token(sub="mona", groups=["ann"])))
        assert await is_monitor(api, bearer(make_token(sub="mona")))
        assert not await is_monitor(api, bearer(make_token()))


async def test_claim_names_can_be_configured_and_nested(runner: ApiRunner) -> None:
    claim_names = {
        "user_claim": "email",
        "groups_claim": "https://example.org/groups",
        "roles_claim": "realm_access.roles",
    }
    async with runner.run("jwt", **runner.jwt_settings(**claim_names)) as api:
        claims: dict[str, Any] = {
            "email": "a@example.org",
            "https://example.org/groups": ["x"],
            "realm_access": {"roles": ["admin"]},
        }
        assert await submit_and_identify(api, bearer(make_token(**claims))) == ("a@example.org", ["team-x"])
        assert await is_admin(api, bearer(make_token(**claims)))
        assert not await is_admin(
            api, bearer(make_token(email="b@example.org", realm_access=["admin"], roles=["admin"]))
        )
        assert_unauthorized(await api.http.get(JOBS, headers=bearer(make_token())))


def assemble_token(header: Any, claims: Any, secret: bytes | None = SECRET.encode()) -> str:
    """Return a token of parts that no library would create, with a valid HS256 signature if there is a secret."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    signed = ".".join(map(encode_base64, parts))
    return f"{signed}.{encode_base64(hmac.digest(secret, signed.encode(), 'sha256') if secret else b'')}"


def encode_base64(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def sign_with_public_key(secret: bytes) -> str:
    """Return a token that uses a public key as HMAC secret (algorithm confusion)."""
    return assemble_token(HS256, {"sub": "alice", "exp": time.time() + 60}, secret)


HS256 = {"alg": "HS256", "typ": "JWT"}


async def test_every_invalid_token_gets_the_same_response(runner: ApiRunner) -> None:
    now = time.time()
    valid = make_token(iss="us", aud="jobledger")
    head, body, signature = valid.split(".")
    claims = {"iss": "us", "aud": "jobledger"}
    alice = {"sub": "alice", "exp": now + 60, **claims}
    deep = b"[" * 5000 + b"]" * 5000
    tokens = {
        "another secret": make_token("another secret, of at least 32 bytes", **claims),
        "another body": f"{head}.{make_token(sub='ann', **claims).split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "alg none": assemble_token({"alg": "none"}, alice, None),
        "alg None": assemble_token({"alg": "None"}, alice, None),
        "alg none, signed": assemble_token({"alg": "none"}, alice),
        "alg missing": assemble_token({}, alice),
        "alg a list": assemble_token({"alg": ["HS256"]}, alice),
        "HS512": make_token(SECRET * 2, "HS512", **claims),
        "RS256": make_token(RSA_KEY, "RS256", **claims),
        "expired": make_token(exp=int(now) - 31, **claims),
        "without exp": make_token(exp=None, **claims),
        "exp null": assemble_token(HS256, {**alice, "exp": None}),
        "exp text": make_token(exp="tomorrow", **claims),
        "exp infinite": make_token(exp=float("inf"), **claims),
        "not yet valid": make_token(nbf=int(now) + 60, **claims),
        "another issuer": make_token(iss="them", aud="jobledger"),
        "no issuer": make_token(aud="jobledger"),
        "another audience": make_token(iss="us", aud=["billing"]),
        "no audience": make_token(iss="us"),
        "no subject": make_token(sub=None, **claims),
        "empty subject": make_token(sub="", **claims),
        "blank subject": make_token(sub=" ", **claims),
        "long subject": make_token(sub="x" * 201, **claims),
        "subject that is a group": make_token(sub="team-ops", **claims),
        "subject with a line break": make_token(sub="alice\nbob", **claims),
        "subject in a list": assemble_token(HS256, {**alice, "sub": ["alice"]}),
        "groups in an object": make_token(groups={"ops": True}, **claims),
        "groups of numbers": make_token(groups=[1], **claims),
        "group too long": make_token(groups=["x" * 200], **claims),
        "key id that is none": assemble_token({**HS256, "kid": {"$ne": 1}}, alice),
        "critical extension": assemble_token({**HS256, "crit": ["x"], "x": 1}, alice),
        "deep claims": assemble_token(HS256, deep),
        "deep header": assemble_token(deep, alice),
        "claims in a list": assemble_token(HS256, [alice]),
        "claims that are no text": assemble_token(HS256, b"\xff"),
        "no token": "not.a.token",
        "empty": "",
        "an API key": ApiKeyToken.generate(),
    }
    async with runner.run("jwt", **runner.jwt_settings(issuer="us", audience="jobledger")) as api:
        assert await submit_and_identify(api, bearer(valid)) == ("alice", [])
        assert await submit_and_identify(api, bearer(assemble_token(HS256, alice))) == ("alice", []), (
            "an assembled token can be valid"
        )
        assert await submit_and_identify(api, bearer(make_token(exp=int(now) - 15, **claims))) == ("alice", []), (
            "within the leeway"
        )
        assert await submit_and_identify(api, bearer(make_token(iss="us", aud=["billing", "jobledger"]))) == (
            "alice",
            [],
        )
        responses = {name: await api.http.get(JOBS, headers=bearer(token)) for name, token in tokens.items()}
        assert {name: response.status_code for name, response in responses.items() if response.status_code != 401} == {}
        assert len({assert_unauthorized(response) for response in responses.values()}) == 1
        assert_unauthorized(await api.http.get(JOBS), "authentication_required")


async def test_token_with_audience_is_rejected_if_no_audience_is_set(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings()) as api:
        assert_unauthorized(await api.http.get(JOBS, headers=bearer(make_token(aud="billing"))))


@pytest.mark.parametrize(("private", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")], ids=["RS256", "ES256"])
async def test_public_key_verifies_tokens_and_is_not_accepted_as_secret(
    runner: ApiRunner, private: Any, algorithm: str
) -> None:
    path = runner.write_file("key.pem", public_key_pem(private))
    async with runner.run("jwt", jwt={"public_key_file": path}) as api:
        assert await submit_and_identify(api, bearer(make_token(private, algorithm))) == ("alice", [])
        for token in (
            make_token(OTHER_RSA_KEY, "RS256"),
            make_token(RSA_KEY, "RS512"),
            make_token(RSA_KEY, "PS256"),
            make_token(ec.generate_private_key(ec.SECP256R1()), "ES256"),
            sign_with_public_key(public_key_pem(private)),
            sign_with_public_key(public_key_pem(private).strip()),
            assemble_token({"alg": "none"}, {"sub": "alice", "exp": time.time() + 60}, None),
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=bearer(token)))


def make_short_rsa_key() -> bytes:
    return public_key_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "PEM form"),
        (SECRET.encode(), "PEM form"),
        (make_short_rsa_key(), "2048 bits"),
        (public_key_pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (None, "cannot be read"),
    ],
    ids=["empty", "a secret", "short", "another curve", "missing"],
)
async def test_unusable_public_key_stops_startup(runner: ApiRunner, content: bytes | None, message: str) -> None:
    path = str(runner.directory / "none.pem") if content is None else runner.write_file("key.pem", content)
    with pytest.raises(ConfigurationError, match=message) as raised:
        async with runner.run("jwt", jwt={"public_key_file": path}):
            pass
    assert str(raised.value).startswith(f"auth.jwt.public_key_file: {path}")
    assert SECRET not in str(raised.value)


def test_private_key_is_rejected_as_public_key() -> None:
    with pytest.raises(ValueError, match="public key"):
        load_public_key(b"-----BEGIN PRIVATE KEY-----\nMIGEAgEAMBAGByqGSM49\n-----END PRIVATE KEY-----\n")


async def test_jwks_are_fetched_once_and_not_for_each_unknown_key(runner: ApiRunner) -> None:
    async with (
        serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"), public_key_jwk(EC_KEY, "two"))) as issuer,
        runner.run("jwt", jwt={"jwks_url": issuer.url}) as api,
    ):
        assert issuer.request_count == 0
        responses = await asyncio.gather(
            *(api.http.get(JOBS, headers=bearer(make_token(RSA_KEY, "RS256", "one"))) for _ in range(10))
        )
        assert {response.status_code for response in responses} == {200}
        assert await submit_and_identify(api, bearer(make_token(EC_KEY, "ES256", "two"))) == ("alice", [])
        assert issuer.request_count == 1
        for token in (
            make_token(OTHER_RSA_KEY, "RS256", "one"),
            make_token(RSA_KEY, "RS256", "two"),
            make_token(RSA_KEY, "RS256", "three"),
            make_token(RSA_KEY, "RS256"),
            sign_with_public_key(public_key_pem(RSA_KEY)),
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=bearer(token)))
        assert issuer.request_count == 1, "less than a minute has passed since the last fetch"


async def test_unavailable_jwks_return_503_without_repeated_fetches(runner: ApiRunner) -> None:
    async with serve_jwks(JwksServer()) as issuer, runner.run("jwt", jwt={"jwks_url": issuer.url}) as api:
        issuer.status = 500
        for _ in range(3):
            response = await api.http.get(JOBS, headers=bearer(make_token(RSA_KEY, "RS256", "one")))
            assert (response.status_code, response.json()["code"]) == (503, "jwks_unavailable")
            assert response.headers["Retry-After"] == "5"
        assert issuer.request_count == 1, "the issuer got one request only"
        assert_unauthorized(await api.http.get(JOBS, headers=bearer("not a token")))


async def test_sign_in_with_unavailable_jwks_returns_503_page(runner: ApiRunner) -> None:
    async with serve_jwks(JwksServer()) as issuer, runner.run("jwt", jwt={"jwks_url": issuer.url}) as api:
        issuer.status = 500
        page = "/monitoring/events/sign-in"
        response = await api.http.post(
            page, data={"credential": make_token(RSA_KEY, "RS256", "one")}, headers=api.origin_header
        )
        assert (response.status_code, response.headers["Content-Type"]) == (503, "text/html; charset=utf-8")
        response = await api.http.post(page, data={"credential": "wrong"}, headers=api.origin_header)
        assert response.status_code == 401


class ManualClock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


async def test_unknown_key_ids_trigger_at_most_one_fetch_per_minute() -> None:
    clock = ManualClock()
    async with serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"))) as issuer:
        source = JwksKeySource(issuer.url, clock)
        for kid in ("a", "b", "c"):
            assert await source.get_key(kid) is None
        assert issuer.request_count == 1
        issuer.set_keys(public_key_jwk(RSA_KEY, "one"), public_key_jwk(OTHER_RSA_KEY, "new"))
        clock.seconds += 59
        assert await source.get_key("new") is None
        clock.seconds += 2
        assert await source.get_key("new") is not None
        assert issuer.request_count == 2


async def test_cached_jwks_stay_valid_during_outage_and_unknown_ids_raise_503() -> None:
    clock = ManualClock()
    async with serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"))) as issuer:
        source = JwksKeySource(issuer.url, clock)
        assert await source.get_key("one") is not None
        issuer.status = 502
        clock.seconds += 4000
        assert await source.get_key("one") is not None
        with pytest.raises(ApiError) as raised:
            await source.get_key("two")
        assert raised.value.status == 503
        assert await source.get_key("one") is not None
        assert issuer.request_count == 2


async def test_withdrawn_jwk_is_rejected_after_an_hour() -> None:
    clock = ManualClock()
    async with serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"), public_key_jwk(OTHER_RSA_KEY, "two"))) as issuer:
        source = JwksKeySource(issuer.url, clock)
        assert await source.get_key("one") is not None
        issuer.set_keys(public_key_jwk(OTHER_RSA_KEY, "two"))
        clock.seconds += 3601
        async with asyncio.timeout(DEADLINE_SECONDS):
            await source.get_key("one")  # starts a fetch in the background
            await source.get_key("three")  # waits for that fetch
            assert await source.get_key("one") is None
        assert await source.get_key("two") is not None


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": []}', b'{"keys": [1, {}]}', b"\xff", b"x" * 1_100_000]
)
async def test_jwks_response_without_keys_raises_503(body: bytes) -> None:
    async with serve_jwks(JwksServer()) as issuer:
        issuer.body = body
        with pytest.raises(ApiError) as raised:
            await JwksKeySource(issuer.url).get_key("one")
    assert raised.value.status == 503


async def test_unsuitable_jwks_are_ignored() -> None:
    secret = {"kty": "oct", "kid": "secret", "k": base64.urlsafe_b64encode(SECRET.encode()).decode(), "alg": "HS256"}
    async with serve_jwks(
        JwksServer(
            secret,
            {"kty": "RSA", "kid": "broken"},
            {"kty": "RSA", "kid": "broken too", "n": 1, "e": []},
            public_key_jwk(RSA_KEY, "for encryption", use="enc"),
            public_key_jwk(RSA_KEY, "another algorithm", alg="RS512"),
            public_key_jwk(rsa.generate_private_key(public_exponent=65537, key_size=1024), "short"),
            public_key_jwk(RSA_KEY, None, use="sig"),
        )
    ) as issuer:
        source = JwksKeySource(issuer.url)
        for kid in ("secret", "broken", "broken too", "for encryption", "another algorithm", "short"):
            assert await source.get_key(kid) is None, kid
        usable = await source.get_key(None)
    assert usable is not None
    assert usable.algorithm == "RS256"


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
        alice = bearer(await create_key(api))
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
        assert_unauthorized(await api.get(f"{JOBS}/{ids['public']}", None, **bearer(ApiKeyToken.generate())))
        assert_unauthorized(await api.get(f"{JOBS}/{ids['public']}", None, Authorization=""))


@pytest.mark.parametrize("mode", ["jwt", "proxy"])
async def test_anonymous_read_works_in_jwt_and_proxy_mode(runner: ApiRunner, mode: str) -> None:
    auth: dict[str, Any] = runner.jwt_settings() if mode == "jwt" else {"proxy": LOCAL_PROXY}
    async with runner.run(mode, **auth, anonymous_read=True) as api:
        assert (await api.http.get(JOBS)).json()["total"] == 0
        assert_unauthorized(await api.http.post(JOBS, json=ECHO), "authentication_required")
        headers = bearer("x") if mode == "jwt" else {"X-Forwarded-User": ""}
        assert_unauthorized(await api.http.get(JOBS, headers=headers))
