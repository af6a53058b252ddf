"""Who somebody is, in each mode, and that nobody is somebody else: over real HTTP, with the settings of config.yaml."""

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
from tests.api.conftest import Api, run_api
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


class Place:
    """Starts an API with a way to sign in."""

    def __init__(self, uri: str, db_name: str, directory: Path) -> None:
        self._where = uri, db_name, directory
        self.directory = directory

    @asynccontextmanager
    async def api(self, mode: str, **auth: Any) -> AsyncIterator[Api]:
        running = run_api(*self._where, API_ONLY, auth={"mode": mode, **auth})
        async for api in running:
            yield api

    def file(self, name: str, content: str | bytes) -> str:
        path = self.directory / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def jwt(self, **more: Any) -> dict[str, Any]:
        """Settings for tokens signed with the secret."""
        return {"jwt": {"secret_file": self.file("secret", SECRET + "\n"), **more}}


@pytest.fixture
def place(mongodb_uri: str, db_name: str, tmp_path: Path) -> Place:
    return Place(mongodb_uri, db_name, tmp_path)


def bearer(credentials: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials}".strip()}


async def who(api: Api, headers: dict[str, str]) -> tuple[str, list[str]]:
    """Submit a job; return whose it is, and the groups they were in."""
    answer = await api.http.post(JOBS, json=ECHO, headers=headers)
    assert answer.status_code == 202, answer.text
    event = await api.db.events.find_one({"stream": answer.json()["job_id"], "version": 1})
    assert event is not None
    assert event["meta"]["actor"] == f"user:{event['data']['user_id']}"
    return event["data"]["user_id"], event["data"].get("teams", [])


async def is_admin(api: Api, headers: dict[str, str]) -> bool:
    """Whether they may submit for somebody else."""
    answer = await api.http.post(JOBS, json={**ECHO, "user_id": "somebody-else"}, headers=headers)
    assert answer.status_code in (202, 403), answer.text
    return answer.status_code == 202


async def is_monitor(api: Api, headers: dict[str, str]) -> bool:
    answer = await api.http.get(STATS, headers=headers)
    assert answer.status_code in (200, 403), answer.text
    return answer.status_code == 200


def refused(answer: httpx.Response, code: str = "invalid_credentials") -> str:
    """Check that it is the one answer to wrong credentials; return its message."""
    assert answer.status_code == 401, answer.text
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    content = answer.json()
    assert (content["status"], content["code"], content["details"]) == ("error", code, {})
    return str(content["message"])


async def made(api: Api, **more: Any) -> ApiKeyToken:
    """Make a key for alice and return what she has to send, once it opens."""
    key, text = new_key(**{"user": "alice", "groups": (), "roles": (), "name": None, "expires_in": None, **more})
    await stored(api, key, text)
    return text


async def stored(api: Api, key: ApiKey, text: ApiKeyToken) -> None:
    await keys.store_key(api.db, key)
    await until_answer(api, text, 200)


async def until_answer(api: Api, text: ApiKeyToken, status: int) -> None:
    async with asyncio.timeout(5):
        # The change stream tells the API, and nobody but the API can tell us that it has heard of it.
        while (await api.http.get(JOBS, headers=bearer(text))).status_code != status:
            pass


# keys ---------------------------------------------------------------------------------------------------------------


async def test_a_key_says_who_its_holder_is_and_in_which_groups_and_roles(place: Place) -> None:
    async with place.api("keys") as api:
        plain = bearer(await made(api, groups=["ops", "team-web"]))
        assert await who(api, plain) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, plain)
        assert not await is_monitor(api, plain)
        admin, monitor = await made(api, roles=["admin"]), await made(api, roles=["monitor"])
        assert await is_admin(api, bearer(admin))
        assert await is_monitor(api, bearer(monitor))
        assert not await is_admin(api, bearer(monitor))
        assert await who(api, {"Authorization": f"bEARER {admin}"}) == ("alice", [])


async def test_a_key_works_in_a_process_that_starts_after_it_was_made(place: Place) -> None:
    async with place.api("keys") as api:
        text = await made(api)
        await api.db.others.insert_one({})  # what a change stream hears of begins with the last thing that happened
    async with place.api("keys") as api:
        assert (await api.http.get(JOBS, headers=bearer(text))).status_code == 200


async def test_a_revoked_key_stops_working_at_once_and_others_go_on(place: Place) -> None:
    async with place.api("keys") as api:
        text, other = await made(api), await made(api)
        assert await keys.revoke_key(api.db, text.key_id)
        await until_answer(api, text, 401)
        refused(await api.http.get(JOBS, headers=bearer(text)))
        assert (await api.http.get(JOBS, headers=bearer(other))).status_code == 200


async def test_no_request_asks_the_database_for_its_key(place: Place) -> None:
    async with place.api("keys") as api:
        text = await made(api)
        await api.db.command("profile", 2)
        for _ in range(5):
            await api.http.get(JOBS, headers=bearer(text))
        await api.db.command("profile", 0)
        asked = [it["command"] async for it in api.db["system.profile"].find({"op": "query"})]
    assert any(it.get("find") == "jobs" or it.get("aggregate") == "jobs" for it in asked), "nothing was profiled"
    assert not [it for it in asked if it.get("find") == "api_keys"]


async def test_an_expired_key_is_refused_from_the_moment_on_without_anything_happening(place: Place) -> None:
    async with place.api("keys") as api:
        key, text = new_key(user="alice", groups=(), roles=(), name=None, expires_in="1m")
        moment = datetime.now(UTC) + timedelta(seconds=1)
        await stored(api, key.model_copy(update={"expires_at": moment}), text)
        await until_answer(api, text, 401)
        assert datetime.now(UTC) >= moment - timedelta(milliseconds=1), "the database keeps milliseconds"


async def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(place: Place) -> None:
    async with place.api("keys") as api:
        good = await made(api)
        key, expired = new_key(user="alice", groups=(), roles=("admin",), name=None, expires_in=None)
        await keys.store_key(api.db, key.model_copy(update={"expires_at": datetime.now(UTC) - timedelta(seconds=1)}))
        later = await made(api)  # by when the API has heard of it, it has heard of the one before
        wrong = {
            "expired": expired,
            "unknown": ApiKeyToken.generate(),
            "another's secret": ApiKeyToken(good.key_id, later.secret),
            "nearly the secret": ApiKeyToken(good.key_id, good.secret[:-1] + ("A" if good.secret[-1] != "A" else "B")),
            "shortened": str(good)[:-1],
            "lengthened": f"{good}x",
            "without a secret": f"jl_{good.key_id}_",
            "only the id": good.key_id,
            "only the secret": good.secret,
            "another prefix": f"sk_{good.key_id}_{good.secret}",
            "operators": '{"$gt": ""}',
            "nothing": "",
            "very long": "x" * 20_000,
        }
        answers = {what: await api.http.get(JOBS, headers=bearer(sent)) for what, sent in wrong.items()}
        answers["another scheme"] = await api.http.get(JOBS, headers={"Authorization": f"Basic {good}"})
        answers["no scheme"] = await api.http.get(JOBS, headers={"Authorization": str(good)})
        answers["twice"] = await api.http.get(JOBS, headers=[("Authorization", f"Bearer {good}")] * 2)
        answers["in the query"] = await api.http.get(f"{JOBS}?key={good}", headers={"Authorization": "Bearer"})
        messages = {what: refused(answer) for what, answer in answers.items()}
        assert len(set(messages.values())) == 1, messages

        assert "API key" in refused(await api.http.get(JOBS), "authentication_required")


async def test_health_needs_no_sign_in_and_everything_else_does(place: Place) -> None:
    async with place.api("keys") as api:
        for path in ("/healthz", "/readyz"):
            assert (await api.http.get(path)).status_code == 200
        for path in ("/", JOBS, STATS, "/api/ledger/stream", "/api/events/files/x", "/nowhere", "/healthz/"):
            refused(await api.http.get(path), "authentication_required")
        refused(await api.http.post(JOBS, json=ECHO), "authentication_required")


async def test_the_database_holds_no_secret(place: Place) -> None:
    async with place.api("keys") as api:
        text = await made(api)
        [document] = await api.db.api_keys.find().to_list()
    assert text.secret not in repr(document)
    assert document["sha256"] == hashlib.sha256(text.secret.encode()).digest()
    assert text.secret not in repr(text)


@pytest.mark.parametrize(
    "document",
    [{}, {"sha256": b"short"}, {"user_id": "team-x"}, {"user_id": ""}, {"groups": "ops"}, {"roles": ["root"]}],
    ids=str,
)
async def test_a_document_that_is_no_key_opens_nothing_and_stops_nobody(place: Place, document: dict[str, Any]) -> None:
    text = ApiKeyToken.generate()
    whole = {"_id": text.key_id, "sha256": text.digest, "user_id": "alice", "created_at": datetime.now(UTC)}
    async with place.api("keys") as api:
        await api.db.api_keys.insert_one({**whole, **document} if document else {"_id": text.key_id})
        other = await made(api)
        refused(await api.http.get(JOBS, headers=bearer(text)))
    async with place.api("keys") as api:
        refused(await api.http.get(JOBS, headers=bearer(text)))
        assert (await api.http.get(JOBS, headers=bearer(other))).status_code == 200


async def test_a_key_that_somebody_changes_by_hand_opens_nothing(place: Place) -> None:
    async with place.api("keys") as api:
        text = await made(api)
        await api.db.api_keys.update_one({"_id": text.key_id}, {"$set": {"roles": ["admin"]}})
        await until_answer(api, text, 401)


# jwt ----------------------------------------------------------------------------------------------------------------


async def test_a_token_says_who_it_is_and_in_which_groups_and_roles(place: Place) -> None:
    async with place.api("jwt", **place.jwt()) as api:
        alice = bearer(make_token(groups=["ops", "team-web", " "], roles=["author", "offline_access"]))
        assert await who(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert not await is_monitor(api, alice)
        assert await is_admin(api, bearer(make_token(roles=["admin"])))
        assert await is_monitor(api, bearer(make_token(roles="monitor")))
        assert await who(api, bearer(make_token(groups="ops"))) == ("alice", ["team-ops"])


async def test_who_has_a_role_can_be_said_in_the_settings_by_user_and_by_group(place: Place) -> None:
    async with place.api("jwt", **place.jwt(), admins=["ann", "team-ops"], monitors=["mona"]) as api:
        assert await is_admin(api, bearer(make_token(sub="ann")))
        assert await is_admin(api, bearer(make_token(groups=["ops"])))
        assert not await is_admin(api, bearer(make_token(sub="mona", groups=["ann"])))
        assert await is_monitor(api, bearer(make_token(sub="mona")))
        assert not await is_monitor(api, bearer(make_token()))


async def test_the_claims_can_have_other_names_and_lie_within_others(place: Place) -> None:
    named = {"user_claim": "email", "groups_claim": "https://example.org/groups", "roles_claim": "realm_access.roles"}
    async with place.api("jwt", **place.jwt(**named)) as api:
        said: dict[str, Any] = {
            "email": "a@example.org",
            "https://example.org/groups": ["x"],
            "realm_access": {"roles": ["admin"]},
        }
        assert await who(api, bearer(make_token(**said))) == ("a@example.org", ["team-x"])
        assert await is_admin(api, bearer(make_token(**said)))
        assert not await is_admin(
            api, bearer(make_token(email="b@example.org", realm_access=["admin"], roles=["admin"]))
        )
        refused(await api.http.get(JOBS, headers=bearer(make_token())))


def by_hand(header: Any, claims: Any, secret: bytes | None = SECRET.encode()) -> str:
    """A token of parts that no library would make, with a good signature if there is a secret for it."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    said = ".".join(map(base64_of, parts))
    return f"{said}.{base64_of(hmac.digest(secret, said.encode(), 'sha256') if secret else b'')}"


def base64_of(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def signed_by_hmac(secret: bytes) -> str:
    """What somebody sends who hopes that the public key, which all know, is taken for a secret."""
    return by_hand(HS256, {"sub": "alice", "exp": time.time() + 60}, secret)


HS256 = {"alg": "HS256", "typ": "JWT"}


async def test_whatever_is_wrong_with_a_token_the_answer_is_the_same(place: Place) -> None:
    now = time.time()
    good = make_token(iss="us", aud="jobledger")
    head, body, signature = good.split(".")
    right = {"iss": "us", "aud": "jobledger"}
    alice = {"sub": "alice", "exp": now + 60, **right}
    deep = b"[" * 5000 + b"]" * 5000
    wrong = {
        "another secret": make_token("another secret, of at least 32 bytes", **right),
        "another body": f"{head}.{make_token(sub='ann', **right).split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.",
        "two parts": f"{head}.{body}",
        "alg none": by_hand({"alg": "none"}, alice, None),
        "alg None": by_hand({"alg": "None"}, alice, None),
        "alg none, signed": by_hand({"alg": "none"}, alice),
        "alg missing": by_hand({}, alice),
        "alg a list": by_hand({"alg": ["HS256"]}, alice),
        "HS512": make_token(SECRET * 2, "HS512", **right),
        "RS256": make_token(RSA_KEY, "RS256", **right),
        "expired": make_token(exp=int(now) - 31, **right),
        "without exp": make_token(exp=None, **right),
        "exp null": by_hand(HS256, {**alice, "exp": None}),
        "exp words": make_token(exp="tomorrow", **right),
        "exp infinite": make_token(exp=float("inf"), **right),
        "not yet": make_token(nbf=int(now) + 60, **right),
        "another issuer": make_token(iss="them", aud="jobledger"),
        "no issuer": make_token(aud="jobledger"),
        "another audience": make_token(iss="us", aud=["billing"]),
        "no audience": make_token(iss="us"),
        "no subject": make_token(sub=None, **right),
        "empty subject": make_token(sub="", **right),
        "blank subject": make_token(sub=" ", **right),
        "long subject": make_token(sub="x" * 201, **right),
        "subject that is a group": make_token(sub="team-ops", **right),
        "subject with a line break": make_token(sub="alice\nbob", **right),
        "subject in a list": by_hand(HS256, {**alice, "sub": ["alice"]}),
        "groups in an object": make_token(groups={"ops": True}, **right),
        "groups of numbers": make_token(groups=[1], **right),
        "group too long": make_token(groups=["x" * 200], **right),
        "key id that is none": by_hand({**HS256, "kid": {"$ne": 1}}, alice),
        "critical extension": by_hand({**HS256, "crit": ["x"], "x": 1}, alice),
        "deep claims": by_hand(HS256, deep),
        "deep header": by_hand(deep, alice),
        "claims in a list": by_hand(HS256, [alice]),
        "claims that are no text": by_hand(HS256, b"\xff"),
        "words": "not.a.token",
        "nothing": "",
        "an API key": ApiKeyToken.generate(),
    }
    async with place.api("jwt", **place.jwt(issuer="us", audience="jobledger")) as api:
        assert await who(api, bearer(good)) == ("alice", [])
        assert await who(api, bearer(by_hand(HS256, alice))) == ("alice", []), "what is made by hand can be right"
        assert await who(api, bearer(make_token(exp=int(now) - 15, **right))) == ("alice", []), "within the leeway"
        assert await who(api, bearer(make_token(iss="us", aud=["billing", "jobledger"]))) == ("alice", [])
        answers = {what: await api.http.get(JOBS, headers=bearer(sent)) for what, sent in wrong.items()}
        assert {what: answer.status_code for what, answer in answers.items() if answer.status_code != 401} == {}
        assert len({refused(answer) for answer in answers.values()}) == 1
        refused(await api.http.get(JOBS), "authentication_required")


async def test_a_token_for_somebody_elses_service_is_refused_when_no_audience_is_set(place: Place) -> None:
    async with place.api("jwt", **place.jwt()) as api:
        refused(await api.http.get(JOBS, headers=bearer(make_token(aud="billing"))))


@pytest.mark.parametrize(("private", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")], ids=["RS256", "ES256"])
async def test_a_public_key_verifies_tokens_and_is_no_secret(place: Place, private: Any, algorithm: str) -> None:
    path = place.file("key.pem", public_key_pem(private))
    async with place.api("jwt", jwt={"public_key_file": path}) as api:
        assert await who(api, bearer(make_token(private, algorithm))) == ("alice", [])
        for wrong in (
            make_token(OTHER_RSA_KEY, "RS256"),
            make_token(RSA_KEY, "RS512"),
            make_token(RSA_KEY, "PS256"),
            make_token(ec.generate_private_key(ec.SECP256R1()), "ES256"),
            signed_by_hmac(public_key_pem(private)),
            signed_by_hmac(public_key_pem(private).strip()),
            by_hand({"alg": "none"}, {"sub": "alice", "exp": time.time() + 60}, None),
        ):
            refused(await api.http.get(JOBS, headers=bearer(wrong)))


def short_rsa() -> bytes:
    return public_key_pem(rsa.generate_private_key(public_exponent=65537, key_size=1024))


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (b"", "PEM form"),
        (SECRET.encode(), "PEM form"),
        (short_rsa(), "2048 bits"),
        (public_key_pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (None, "cannot be read"),
    ],
    ids=["empty", "a secret", "short", "another curve", "missing"],
)
async def test_a_public_key_that_cannot_be_used_ends_the_start(place: Place, content: bytes | None, right: str) -> None:
    path = str(place.directory / "none.pem") if content is None else place.file("key.pem", content)
    with pytest.raises(ConfigurationError, match=right) as raised:
        async with place.api("jwt", jwt={"public_key_file": path}):
            pass
    assert str(raised.value).startswith(f"auth.jwt.public_key_file: {path}")
    assert SECRET not in str(raised.value)


def test_a_private_key_is_not_taken_for_a_public_one() -> None:
    with pytest.raises(ValueError, match="public key"):
        load_public_key(b"-----BEGIN PRIVATE KEY-----\nMIGEAgEAMBAGByqGSM49\n-----END PRIVATE KEY-----\n")


async def test_keys_at_an_address_are_fetched_once_and_again_for_a_new_one(place: Place) -> None:
    async with (
        serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"), public_key_jwk(EC_KEY, "two"))) as issuer,
        place.api("jwt", jwt={"jwks_url": issuer.url}) as api,
    ):
        assert issuer.request_count == 0
        answers = await asyncio.gather(
            *(api.http.get(JOBS, headers=bearer(make_token(RSA_KEY, "RS256", "one"))) for _ in range(10))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert await who(api, bearer(make_token(EC_KEY, "ES256", "two"))) == ("alice", [])
        assert issuer.request_count == 1
        for wrong in (
            make_token(OTHER_RSA_KEY, "RS256", "one"),
            make_token(RSA_KEY, "RS256", "two"),
            make_token(RSA_KEY, "RS256", "three"),
            make_token(RSA_KEY, "RS256"),
            signed_by_hmac(public_key_pem(RSA_KEY)),
        ):
            refused(await api.http.get(JOBS, headers=bearer(wrong)))
        assert issuer.request_count == 1, "a minute has not passed since it was asked"


async def test_while_keys_cannot_be_fetched_it_is_503_and_not_the_clients_fault(place: Place) -> None:
    async with serve_jwks(JwksServer()) as issuer, place.api("jwt", jwt={"jwks_url": issuer.url}) as api:
        issuer.status = 500
        for _ in range(3):
            answer = await api.http.get(JOBS, headers=bearer(make_token(RSA_KEY, "RS256", "one")))
            assert (answer.status_code, answer.json()["code"]) == (503, "jwks_unavailable")
            assert answer.headers["Retry-After"] == "5"
        assert issuer.request_count == 1, "nor is the issuer stormed"
        refused(await api.http.get(JOBS, headers=bearer("not a token")))


async def test_sign_in_while_keys_cannot_be_fetched_is_no_wrong_credential(place: Place) -> None:
    async with serve_jwks(JwksServer()) as issuer, place.api("jwt", jwt={"jwks_url": issuer.url}) as api:
        issuer.status = 500
        page, ours = "/monitoring/events/sign-in", {"Origin": str(api.http.base_url).rstrip("/")}
        answer = await api.http.post(page, data={"credential": make_token(RSA_KEY, "RS256", "one")}, headers=ours)
        assert (answer.status_code, answer.headers["Content-Type"]) == (503, "text/html; charset=utf-8")
        answer = await api.http.post(page, data={"credential": "wrong"}, headers=ours)
        assert answer.status_code == 401


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


async def test_unknown_keys_are_looked_for_once_a_minute_whatever_is_named() -> None:
    clock = Clock()
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


async def test_keys_stay_good_while_their_address_is_away_and_unknown_ones_are_503() -> None:
    clock = Clock()
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


async def test_a_key_that_was_withdrawn_is_forgotten_within_an_hour() -> None:
    clock = Clock()
    async with serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"), public_key_jwk(OTHER_RSA_KEY, "two"))) as issuer:
        source = JwksKeySource(issuer.url, clock)
        assert await source.get_key("one") is not None
        issuer.set_keys(public_key_jwk(OTHER_RSA_KEY, "two"))
        clock.seconds += 3601
        async with asyncio.timeout(5):
            await source.get_key("one")  # which is why they are fetched again
            await source.get_key("three")  # waits for them
            assert await source.get_key("one") is None
        assert await source.get_key("two") is not None


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"keys": {}}', b'{"keys": []}', b'{"keys": [1, {}]}', b"\xff", b"x" * 1_100_000]
)
async def test_an_answer_without_keys_is_as_none(body: bytes) -> None:
    async with serve_jwks(JwksServer()) as issuer:
        issuer.body = body
        with pytest.raises(ApiError) as raised:
            await JwksKeySource(issuer.url).get_key("one")
    assert raised.value.status == 503


async def test_what_is_no_key_for_signatures_is_passed_over_in_a_set() -> None:
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
        only = await source.get_key(None)
    assert only is not None
    assert only.algorithm == "RS256"


# proxy --------------------------------------------------------------------------------------------------------------

HEADERS = {"groups_header": "X-Forwarded-Groups", "roles_header": "X-Roles"}
HERE = {"trusted": ["127.0.0.0/8", "::1"], **HEADERS}


async def test_a_trusted_proxy_says_who_it_is(place: Place) -> None:
    async with place.api("proxy", proxy=HERE, admins=["ann"]) as api:
        alice = {"X-Forwarded-User": "alice", "X-Forwarded-Groups": "ops, team-web,,"}
        assert await who(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert await is_admin(api, {"X-Forwarded-User": "ann"})
        assert await is_admin(api, {"X-Forwarded-User": "alice", "X-Roles": "monitor, admin"})
        assert not await is_monitor(api, {"X-Forwarded-User": "alice", "X-Roles": "administrator"})
        named = await api.http.post(
            JOBS, json=ECHO, headers=httpx.Headers({"X-Forwarded-User": "Müller"}, encoding="utf-8")
        )
        assert named.json()["job"]["user_id"] == "Müller"
        refused(await api.http.get(JOBS), "authentication_required")


async def test_what_the_settings_do_not_name_is_not_believed(place: Place) -> None:
    async with place.api("proxy", proxy={"trusted": ["127.0.0.1"]}) as api:
        spoofed = {
            "X-Forwarded-User": "alice",
            "X-Forwarded-Groups": "ops",
            "X-Roles": "admin",
            "X-Forwarded-Roles": "a",
        }
        assert await who(api, spoofed) == ("alice", [])
        assert not await is_admin(api, spoofed)
        refused(await api.http.get(JOBS, headers={"X-Remote-User": "alice"}), "authentication_required")


async def test_from_elsewhere_no_header_is_believed(place: Place) -> None:
    async with place.api("proxy", proxy={"trusted": ["10.0.0.0/8", "::1"], **HEADERS}, anonymous_read=True) as api:
        for headers in (
            {"X-Forwarded-User": "alice"},
            {"X-Forwarded-User": "alice", "X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1"},
            {"X-Real-IP": "10.0.0.1", "X-Forwarded-User": "alice"},
            {},
        ):
            refused(await api.http.get(JOBS, headers=headers))


async def test_headers_that_cannot_be_right_are_refused(place: Place) -> None:
    async with place.api("proxy", proxy=HERE) as api:
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
            refused(await api.http.get(JOBS, headers=httpx.Headers(headers)))


# Without credentials ------------------------------------------------------------------------------------------------


async def test_who_sends_no_credentials_sees_what_is_public_if_that_is_allowed_and_nothing_else(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    auth = {"mode": "keys", "anonymous_read": True}
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"}), auth=auth):
        alice = bearer(await made(api))
        answers = {
            visibility: await api.http.post(
                JOBS, json={**ECHO, "access_control": {"visibility": visibility}}, headers=alice
            )
            for visibility in ("public", "private", "team")
        }
        ids = {visibility: answer.json()["job_id"] for visibility, answer in answers.items()}
        position = answers["team"].headers["Ledger-Position"]
        listed = (await api.get(JOBS, position)).json()
        assert [job["job_id"] for job in listed["jobs"]] == [ids["public"]]
        statuses = {visibility: (await api.get(f"{JOBS}/{it}")).status_code for visibility, it in ids.items()}
        assert statuses == {"public": 200, "private": 404, "team": 404}
        assert (await api.http.head(f"{JOBS}/{ids['public']}")).status_code == 200

        assert (await api.get("/nowhere")).status_code == 404
        refused(await api.http.post("/nowhere"), "authentication_required")
        refused(await api.http.post(JOBS, json=ECHO), "authentication_required")
        refused(await api.http.post(f"{JOBS}/{ids['public']}/cancel"), "authentication_required")
        refused(await api.http.delete(f"{JOBS}/{ids['public']}"), "authentication_required")
        refused(await api.http.get(STATS), "authentication_required")
        refused(await api.get(f"{JOBS}/{ids['public']}", None, **bearer(ApiKeyToken.generate())))
        refused(await api.get(f"{JOBS}/{ids['public']}", None, Authorization=""))


@pytest.mark.parametrize("mode", ["jwt", "proxy"])
async def test_in_the_other_modes_it_is_the_same(place: Place, mode: str) -> None:
    auth: dict[str, Any] = place.jwt() if mode == "jwt" else {"proxy": HERE}
    async with place.api(mode, **auth, anonymous_read=True) as api:
        assert (await api.http.get(JOBS)).json()["total"] == 0
        refused(await api.http.post(JOBS, json=ECHO), "authentication_required")
        wrong = bearer("x") if mode == "jwt" else {"X-Forwarded-User": ""}
        refused(await api.http.get(JOBS, headers=wrong))
