"""Tokens that no library would create."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

from tests.support.jwt_issuer import SECRET


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
