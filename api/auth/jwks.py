"""api: the public keys of whoever issues our JSON Web Tokens: one that is known from the start, or those at a URL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx
import jwt
import orjson
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from jobledger.api.http.errors import ApiError

_log = structlog.get_logger()
MIN_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: a secret for HS256 is at least as long as what SHA-256 yields."""
_SHORTEST_RSA_BITS: Final = 2048
_FETCH_SECONDS: Final = 5.0
_LARGEST_SET_BYTES: Final = 1_000_000
_FRESH_SECONDS: Final = 3600.0  # then the set is fetched again, for keys that its owner has withdrawn
_PAUSE_SECONDS: Final = 60.0  # between two fetches, however many unknown keys are named
_PAUSE_WITHOUT_KEYS_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key, and the one algorithm it is good for: a token does not choose how it is verified (RFC 8725, 3.1)."""

    key: Any = field(repr=False)
    algorithm: str


class KeySource(Protocol):
    """Knows the keys by which tokens are verified."""

    async def get_key(self, kid: str | None) -> VerifyingKey | None:
        """Return the key with this id; None if there is none.

        Raises:
            ApiError: 503, it cannot be known now.
        """


class StaticKeySource:
    """A key that is known from the start. Whatever id a token gives it, there is no other."""

    def __init__(self, key: VerifyingKey) -> None:
        self._key = key

    async def get_key(self, kid: str | None) -> VerifyingKey:
        return self._key


def create_hs256_key(secret: str) -> VerifyingKey:
    """Return the key for HS256."""
    return VerifyingKey(secret.encode(), "HS256")


def load_public_key(pem: bytes) -> VerifyingKey:
    """Return the key in a PEM file, for RS256 or ES256, whichever it is made for.

    Raises:
        ValueError: it is none of these; says what would be right.
    """
    try:
        found = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("expected a public key in PEM form (-----BEGIN PUBLIC KEY-----)") from None
    if isinstance(found, RSAPublicKey) and found.key_size >= _SHORTEST_RSA_BITS:
        return VerifyingKey(found, "RS256")
    if isinstance(found, EllipticCurvePublicKey) and isinstance(found.curve, SECP256R1):
        return VerifyingKey(found, "ES256")
    raise ValueError(f"expected an RSA key of {_SHORTEST_RSA_BITS} bits or more, or an elliptic one on the curve P-256")


class JwksKeySource:
    """The keys at a URL (a JWK Set, RFC 7517), fetched when one is needed and kept.

    Keys that were fetched stay good while the URL does not answer. `clock` counts seconds.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._keys: dict[str | None, VerifyingKey] = {}
        self._fetching: asyncio.Task[None] | None = None
        self._asked_at = self._fetched_at = float("-inf")

    async def get_key(self, kid: str | None) -> VerifyingKey | None:
        found = self._known(kid)
        if found is None:
            if (fetching := self._fetch_again()) is not None:
                await asyncio.shield(fetching)  # others wait for the same fetch: who gives up must not end it
            found = self._known(kid)
            if found is None and self._fetched_at < self._asked_at:
                message = "Who has issued this token cannot be asked for their keys now."
                raise ApiError(503, "jwks_unavailable", message, retry_after_seconds=int(_PAUSE_WITHOUT_KEYS_SECONDS))
        elif self._clock() - self._fetched_at > _FRESH_SECONDS:
            self._fetch_again()  # nobody has to wait for it
        return found

    def _known(self, kid: str | None) -> VerifyingKey | None:
        """A token that names no key means the only one there is."""
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    def _fetch_again(self) -> asyncio.Task[None] | None:
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        pause = _PAUSE_SECONDS if self._keys else _PAUSE_WITHOUT_KEYS_SECONDS
        if self._clock() - self._asked_at < pause:
            return None
        self._asked_at = self._clock()
        self._fetching = asyncio.create_task(self._fetch(), name="jwks")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(_FETCH_SECONDS), httpx.AsyncClient(timeout=_FETCH_SECONDS) as client:
                keys = _usable(await _read(client, self._url))
        except (httpx.HTTPError, TimeoutError, OSError, ValueError) as error:
            _log.warning(
                "JWKS not loaded from auth.jwt.jwks_url", url=self._url, error=f"{type(error).__name__}: {error}"
            )
        else:
            self._keys = keys
            self._fetched_at = self._clock()


async def _read(client: httpx.AsyncClient, url: str) -> bytes:
    body = bytearray()
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for part in answer.aiter_bytes():
            body += part
            if len(body) > _LARGEST_SET_BYTES:
                raise ValueError(f"the answer is larger than {_LARGEST_SET_BYTES} bytes")
    return bytes(body)


def _usable(body: bytes) -> dict[str | None, VerifyingKey]:
    """Return the keys for signatures by RS256 and ES256; never a secret, by which a token could be made as well."""
    content = orjson.loads(body)
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
        raise ValueError('expected a JWK Set: {"keys": […]}')  # noqa: TRY004 - it is the content that is wrong
    found = [key for entry in content["keys"] if (key := _key_in(entry)) is not None]
    keys = {key.key_id: VerifyingKey(key.key, key.algorithm_name) for key in found}
    if not keys:
        raise ValueError("there is no key for RS256 or ES256 among them")
    return keys


def _key_in(entry: Any) -> jwt.PyJWK | None:
    if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
        return None
    try:
        found = jwt.PyJWK(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None  # one that cannot be used takes nothing from the others
    weak = isinstance(found.key, RSAPublicKey) and found.key.key_size < _SHORTEST_RSA_BITS
    private = not isinstance(found.key, RSAPublicKey | EllipticCurvePublicKey)
    return None if weak or private or found.algorithm_name not in ("RS256", "ES256") else found
