"""Authentication by JWTs over HTTP, with a shared secret or a public key."""

from __future__ import annotations

import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.api.auth.jwks import load_public_key
from jobledger.ledger.domain.errors import ConfigurationError
from tests.api.authentication.conftest import (
    JOBS,
    ApiRunner,
    assert_unauthorized,
    build_bearer_header,
    is_admin,
    is_monitor,
    submit_and_identify,
)
from tests.api.authentication.hand_made_tokens import HS256, assemble_token, sign_with_public_key
from tests.support.jwt_issuer import EC_KEY, OTHER_RSA_KEY, RSA_KEY, SECRET, make_token, public_key_pem


async def test_token_determines_user_groups_and_roles(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings()) as api:
        alice = build_bearer_header(make_token(groups=["ops", "team-web", " "], roles=["author", "offline_access"]))
        assert await submit_and_identify(api, alice) == ("alice", ["team-ops", "team-web"])
        assert not await is_admin(api, alice)
        assert not await is_monitor(api, alice)
        assert await is_admin(api, build_bearer_header(make_token(roles=["admin"])))
        assert await is_monitor(api, build_bearer_header(make_token(roles="monitor")))
        assert await submit_and_identify(api, build_bearer_header(make_token(groups="ops"))) == ("alice", ["team-ops"])


async def test_settings_assign_roles_by_user_and_by_group(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings(), admins=["ann", "team-ops"], monitors=["mona"]) as api:
        assert await is_admin(api, build_bearer_header(make_token(sub="ann")))
        assert await is_admin(api, build_bearer_header(make_token(groups=["ops"])))
        assert not await is_admin(api, build_bearer_header(make_token(sub="mona", groups=["ann"])))
        assert await is_monitor(api, build_bearer_header(make_token(sub="mona")))
        assert not await is_monitor(api, build_bearer_header(make_token()))


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
        assert await submit_and_identify(api, build_bearer_header(make_token(**claims))) == (
            "a@example.org",
            ["team-x"],
        )
        assert await is_admin(api, build_bearer_header(make_token(**claims)))
        assert not await is_admin(
            api, build_bearer_header(make_token(email="b@example.org", realm_access=["admin"], roles=["admin"]))
        )
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(make_token())))


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
        assert await submit_and_identify(api, build_bearer_header(valid)) == ("alice", [])
        assert await submit_and_identify(api, build_bearer_header(assemble_token(HS256, alice))) == ("alice", []), (
            "an assembled token can be valid"
        )
        assert await submit_and_identify(api, build_bearer_header(make_token(exp=int(now) - 15, **claims))) == (
            "alice",
            [],
        ), "within the leeway"
        assert await submit_and_identify(
            api, build_bearer_header(make_token(iss="us", aud=["billing", "jobledger"]))
        ) == (
            "alice",
            [],
        )
        responses = {
            name: await api.http.get(JOBS, headers=build_bearer_header(token)) for name, token in tokens.items()
        }
        assert {name: response.status_code for name, response in responses.items() if response.status_code != 401} == {}
        assert len({assert_unauthorized(response) for response in responses.values()}) == 1
        assert_unauthorized(await api.http.get(JOBS), "authentication_required")


async def test_token_with_audience_is_rejected_if_no_audience_is_set(runner: ApiRunner) -> None:
    async with runner.run("jwt", **runner.jwt_settings()) as api:
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(make_token(aud="billing"))))


@pytest.mark.parametrize(("private", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")], ids=["RS256", "ES256"])
async def test_public_key_verifies_tokens_and_is_not_accepted_as_secret(
    runner: ApiRunner, private: Any, algorithm: str
) -> None:
    path = runner.write_file("key.pem", public_key_pem(private))
    async with runner.run("jwt", jwt={"public_key_file": path}) as api:
        assert await submit_and_identify(api, build_bearer_header(make_token(private, algorithm))) == ("alice", [])
        for token in (
            make_token(OTHER_RSA_KEY, "RS256"),
            make_token(RSA_KEY, "RS512"),
            make_token(RSA_KEY, "PS256"),
            make_token(ec.generate_private_key(ec.SECP256R1()), "ES256"),
            sign_with_public_key(public_key_pem(private)),
            sign_with_public_key(public_key_pem(private).strip()),
            assemble_token({"alg": "none"}, {"sub": "alice", "exp": time.time() + 60}, None),
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(token)))


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
