"""Public keys that verify JSON Web Tokens: one configured key, or the JWK Set at a URL."""

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
_MIN_RSA_BITS: Final = 2048
_TIMEOUT_SECONDS: Final = 5.0
_MAX_SET_BYTES: Final = 1_000_000
_MAX_AGE_SECONDS: Final = 3600.0  # Then the set is fetched again, because the issuer may have revoked keys.
_MIN_INTERVAL_SECONDS: Final = 60.0  # The time between two fetches, regardless of how many tokens name unknown keys.
_MIN_INTERVAL_WITHOUT_KEYS_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and its only algorithm. A token must not choose the algorithm that verifies it (RFC 8725, 3.1)."""

    key: Any = field(repr=False)
    algorithm: str


class KeySource(Protocol):
    """Provides the keys that verify tokens."""

    async def get_key(self, kid: str | None) -> VerifyingKey | None:
        """Return the key with this ID; None if it does not exist.

        Raises:
            ApiError: 503, the keys cannot be loaded now.
        """


class StaticKeySource:
    """One configured key, for tokens with any key ID."""

    def __init__(self, key: VerifyingKey) -> None:
        self._key = key

    async def get_key(self, kid: str | None) -> VerifyingKey:
        return self._key


def create_hs256_key(secret: str) -> VerifyingKey:
    """Return a shared secret as a key for HS256."""
    return VerifyingKey(secret.encode(), "HS256")


def load_public_key(pem: bytes) -> VerifyingKey:
    """Return the key in a PEM file, for RS256 or ES256 depending on its type.

    Raises:
        ValueError: The file has no such key. The message names what is expected.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("expected a public key in PEM form (-----BEGIN PUBLIC KEY-----)") from None
    if isinstance(key, RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return VerifyingKey(key, "RS256")
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return VerifyingKey(key, "ES256")
    raise ValueError(f"expected an RSA key of {_MIN_RSA_BITS} bits or more, or an elliptic curve key on P-256")


class JwksKeySource:
    """The JWK Set (RFC 7517) at a URL, fetched when a key is needed and then cached.

    Cached keys remain valid while the URL does not respond.

    Args:
        url: The URL of the JWK Set.
        clock: Returns monotonic time in seconds.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._keys: dict[str | None, VerifyingKey] = {}
        self._fetching: asyncio.Task[None] | None = None
        self._requested_at = self._fetched_at = float("-inf")

    async def get_key(self, kid: str | None) -> VerifyingKey | None:
        key = self._find_key(kid)
        if key is None:
            if (fetching := self._start_fetch()) is not None:
                await asyncio.shield(fetching)  # shared with other requests: cancellation must not end it
            key = self._find_key(kid)
            if key is None and self._fetched_at < self._requested_at:
                message = "The token cannot be verified: auth.jwt.jwks_url does not respond. Retry in a moment."
                retry_after = int(_MIN_INTERVAL_WITHOUT_KEYS_SECONDS)
                raise ApiError(503, "jwks_unavailable", message, retry_after_seconds=retry_after)
        elif self._clock() - self._fetched_at > _MAX_AGE_SECONDS:
            self._start_fetch()  # in the background
        return key

    def _find_key(self, kid: str | None) -> VerifyingKey | None:
        """Return a cached key. A token without a key ID means the only key, if there is just one."""
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    def _start_fetch(self) -> asyncio.Task[None] | None:
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        interval = _MIN_INTERVAL_SECONDS if self._keys else _MIN_INTERVAL_WITHOUT_KEYS_SECONDS
        if self._clock() - self._requested_at < interval:
            return None
        self._requested_at = self._clock()
        self._fetching = asyncio.create_task(self._fetch(), name="jwks")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS), httpx.AsyncClient(timeout=_TIMEOUT_SECONDS) as client:
                keys = _parse_usable_keys(await _read_limited(client, self._url))
        except (httpx.HTTPError, TimeoutError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            _log.warning("JWKS not loaded from auth.jwt.jwks_url", url=self._url, error=reason)
        else:
            self._keys = keys
            self._fetched_at = self._clock()


async def _read_limited(client: httpx.AsyncClient, url: str) -> bytes:
    body = bytearray()
    async with client.stream("GET", url) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > _MAX_SET_BYTES:
                raise ValueError(f"the response is larger than {_MAX_SET_BYTES} bytes")
    return bytes(body)


def _parse_usable_keys(body: bytes) -> dict[str | None, VerifyingKey]:
    """Return the keys for RS256 and ES256, never a shared secret: with it a token could also be created."""
    content = orjson.loads(body)
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
        raise ValueError('expected a JWK Set: {"keys": […]}')  # noqa: TRY004 - it is the content that is wrong
    parsed = [key for entry in content["keys"] if (key := _parse_key(entry)) is not None]
    keys = {key.key_id: VerifyingKey(key.key, key.algorithm_name) for key in parsed}
    if not keys:
        raise ValueError("the set has no key for RS256 or ES256")
    return keys


def _parse_key(entry: Any) -> jwt.PyJWK | None:
    if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK(entry)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None  # an unusable key must not disable the others
    is_weak = isinstance(key.key, RSAPublicKey) and key.key.key_size < _MIN_RSA_BITS
    is_private = not isinstance(key.key, RSAPublicKey | EllipticCurvePublicKey)
    return None if is_weak or is_private or key.algorithm_name not in ("RS256", "ES256") else key
