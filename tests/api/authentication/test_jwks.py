"""Authentication by JWTs whose public keys the API fetches from a JWKS URL."""

from __future__ import annotations

import asyncio
import base64

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from jobledger.api.auth.jwks import JwksKeySource
from jobledger.api.http.errors import ApiError
from tests.api.authentication.conftest import (
    JOBS,
    ApiRunner,
    assert_unauthorized,
    build_bearer_header,
    submit_and_identify,
)
from tests.api.authentication.hand_made_tokens import sign_with_public_key
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
from tests.support.polling import DEADLINE_SECONDS


async def test_jwks_are_fetched_once_and_not_for_each_unknown_key(runner: ApiRunner) -> None:
    async with (
        serve_jwks(JwksServer(public_key_jwk(RSA_KEY, "one"), public_key_jwk(EC_KEY, "two"))) as issuer,
        runner.run("jwt", jwt={"jwks_url": issuer.url}) as api,
    ):
        assert issuer.request_count == 0
        responses = await asyncio.gather(
            *(api.http.get(JOBS, headers=build_bearer_header(make_token(RSA_KEY, "RS256", "one"))) for _ in range(10))
        )
        assert {response.status_code for response in responses} == {200}
        assert await submit_and_identify(api, build_bearer_header(make_token(EC_KEY, "ES256", "two"))) == ("alice", [])
        assert issuer.request_count == 1
        for token in (
            make_token(OTHER_RSA_KEY, "RS256", "one"),
            make_token(RSA_KEY, "RS256", "two"),
            make_token(RSA_KEY, "RS256", "three"),
            make_token(RSA_KEY, "RS256"),
            sign_with_public_key(public_key_pem(RSA_KEY)),
        ):
            assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header(token)))
        assert issuer.request_count == 1, "less than a minute has passed since the last fetch"


async def test_unavailable_jwks_return_503_without_repeated_fetches(runner: ApiRunner) -> None:
    async with serve_jwks(JwksServer()) as issuer, runner.run("jwt", jwt={"jwks_url": issuer.url}) as api:
        issuer.status = 500
        for _ in range(3):
            response = await api.http.get(JOBS, headers=build_bearer_header(make_token(RSA_KEY, "RS256", "one")))
            assert (response.status_code, response.json()["code"]) == (503, "jwks_unavailable")
            assert response.headers["Retry-After"] == "5"
        assert issuer.request_count == 1, "the issuer got one request only"
        assert_unauthorized(await api.http.get(JOBS, headers=build_bearer_header("not a token")))


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
