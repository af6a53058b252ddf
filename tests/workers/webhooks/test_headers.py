"""Tests of webhook headers: accepted headers arrive unchanged, all others are rejected at submission."""

from __future__ import annotations

import random
import string
from typing import Any, Final

import pytest
from pydantic import ValidationError

from jobledger.api.schemas.webhooks import WebhookBody
from jobledger.ledger.domain.limits import MAX_WEBHOOK_HEADER_BYTES
from jobledger.ledger.domain.webhook_headers import MAX_HEADER_VALUE_CHARACTERS
from jobledger.workers.webhooks.webhook_client import WebhookClient, WebhookRequest
from tests.support.webhook_endpoint import run_webhook_endpoint

REJECTED: Final[list[dict[str, str]]] = [
    {"X-Key": "ends in a space "},
    {"X-Key": " begins with one"},
    {"X-Key": "tab\t"},
    {"X-Key": "\tx"},
    {"X-Key": " "},
    {"X-Key": "a\r\nY: b"},
    {"X-Key": "a\nb"},
    {"X-Key": "a\rb"},
    {"X-Key": "a\x00b"},
    {"X-Key": "a\x1bb"},
    {"X-Key": "a\x7fb"},
    {"X-Key": "a\x85b"},
    {"X-Key": "…"},
    {"X-Key": "😀"},
    {"X-Key": "\ud800"},
    {"X-Key": "x" * (MAX_HEADER_VALUE_CHARACTERS + 1)},
    {"A": "x" * MAX_HEADER_VALUE_CHARACTERS, "B": "x" * (MAX_WEBHOOK_HEADER_BYTES - MAX_HEADER_VALUE_CHARACTERS)},
    {"X-Key": "1", "x-key": "2"},
    {"": "x"},
    {" X": "x"},
    {"X ": "x"},
    {"X Y": "x"},
    {"X:Y": "x"},
    {":path": "x"},
    {"X\r\n": "x"},
    {"Ü": "x"},
    {"x" * 101: "x"},
    *({name: "x"} for name in ("Host", "hOST", "Connection", "Keep-Alive", "TE", "Trailer", "Upgrade", "Expect")),
    *({name: "x"} for name in ("Content-Length", "content-type", "Content-Encoding", "Content-Range")),
    *({name: "x"} for name in ("Transfer-Encoding", "HTTP2-Settings", "Proxy-Authorization", "proxy-connection")),
    *({name: "x"} for name in ("webhook-id", "Webhook-Signature", "WEBHOOK-TIMESTAMP", "webhook-anything")),
]
ACCEPTED: Final[list[dict[str, str]]] = [
    {"Authorization": "Bearer of-the-endpoint"},
    {"X-Empty": ""},
    {"X-Inside": "a  b\tc"},
    {"X-Latin": "é ÿ \xa0x"},
    {"X-Colon": 'a: b, c; d="e"'},
    {"User-Agent": "mine", "Accept": "text/plain", "Cookie": "a=b"},
    {"!#%&'*+.^_`|~-": "every special character of a name"},
    {"A": "x" * MAX_HEADER_VALUE_CHARACTERS},
]


@pytest.mark.parametrize("headers", REJECTED, ids=repr)
def test_header_that_cannot_be_sent_unchanged_is_rejected_at_submission(headers: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as rejection:
        WebhookBody(url="https://example.org/", headers=headers)
    assert rejection.value.errors()[0]["loc"][0] == "headers"


def make_random_headers(seed: int) -> dict[str, str]:
    """Return headers with random names and values. Some of them can be sent."""
    generator = random.Random(seed)
    letters = string.printable + "äÿ\xa0\x85…\x00"
    return {
        "".join(generator.choices(string.ascii_letters + "-_$ :é", k=generator.randint(1, 8))): "".join(
            generator.choices(letters, k=generator.randint(0, 6))
        )
        for _ in range(2)
    }


async def test_accepted_headers_arrive_unchanged() -> None:
    accepted_count = 0
    async with run_webhook_endpoint() as endpoint:
        client = WebhookClient(allowed_private_hosts=["127.0.0.1"])
        for headers in [*ACCEPTED, *(make_random_headers(seed) for seed in range(1500))]:
            try:
                accepted_headers = WebhookBody(url="https://example.org/", headers=headers).headers
            except ValidationError:
                assert headers not in ACCEPTED
                continue
            accepted_count += 1
            response = await client.send(WebhookRequest(endpoint.url(), accepted_headers, b"{}"))
            assert response.error_code is None, (headers, response)
            received = endpoint.requests[-1].raw_headers
            for name, value in headers.items():
                assert received.get(name.lower()) == value, headers
        await client.aclose()
    assert accepted_count > len(ACCEPTED) + 20


INVALID_HEADERS: Final[list[Any]] = [
    {"X": "a\r\nY: b"},
    {"X": "a "},
    {"X Y": "a"},
    {"": "a"},
    {"X": "😀"},
    {"X": "\ud800"},
    {"Ü": "a"},
]


@pytest.mark.parametrize("headers", INVALID_HEADERS, ids=repr)
async def test_request_with_invalid_header_fails_without_calling_the_endpoint(headers: dict[str, str]) -> None:
    async with run_webhook_endpoint() as endpoint:
        client = WebhookClient(allowed_private_hosts=["127.0.0.1"])
        response = await client.send(WebhookRequest(endpoint.url(), headers, b"{}"))
        await client.aclose()
    assert response.error_code == "REQUEST_INVALID"
    assert response.message is not None
    assert "127.0.0.1" not in response.message
    assert response.is_permanent
    assert response.is_host_responsive  # the host was not called, so it is not unresponsive
    assert endpoint.requests == []
