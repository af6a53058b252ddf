"""Sign webhooks as Standard Webhooks 1.0 (standardwebhooks.com) specifies. Pure.

The signature is HMAC-SHA256 over `id.timestamp.body`. With two secrets there are two signatures, and an endpoint that
knows either accepts the message. So a secret can be rotated without rejected messages.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

_PREFIX: Final = "whsec_"
_SHORTEST_BYTES: Final = 24
_LONGEST_BYTES: Final = 64


def generate_secret() -> str:
    """Return a random secret."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def decode_secret(secret: str) -> bytes:
    """Return the key of a secret.

    Raises:
        ValueError: It is not a valid secret. The message describes the format without the secret.
    """
    problem = (
        f"expected a signing secret: {_PREFIX} and {_SHORTEST_BYTES} to {_LONGEST_BYTES} random bytes in Base64, "
        "as `jobledger webhooks generate-secret` makes"
    )
    if not secret.startswith(_PREFIX):
        raise ValueError(problem)
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(problem) from error
    if not _SHORTEST_BYTES <= len(key) <= _LONGEST_BYTES:
        raise ValueError(problem)
    return key


def build_signature_headers(keys: Sequence[str], webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers with a message's ID, its time (in seconds since 1970), and its signatures if there are
    `keys`.

    Raises:
        ValueError: One of the secrets is not valid.
    """
    headers = {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp)}
    if keys:
        content = f"{webhook_id}.{timestamp}.".encode() + body
        digests = [hmac.new(decode_secret(secret), content, hashlib.sha256).digest() for secret in keys]
        headers["webhook-signature"] = " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
    return headers
