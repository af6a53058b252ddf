"""Headers of webhooks: what is accepted arrives exactly as it was given, and all else is refused at submission."""

from __future__ import annotations

import random
import string
from typing import Any, Final

import pytest
from pydantic import ValidationError

from jobledger.api.schemas.webhooks import WebhookBody
from jobledger.ledger.domain.limits import MAX_WEBHOOK_HEADER_BYTES
from jobledger.ledger.domain.webhook_headers import MAX_HEADER_VALUE_CHARACTERS
from jobledger.workers.webhooks.sender import Sender, WebhookRequest
from tests.support.webhook_endpoint import run_webhook_endpoint

REFUSED: Final[list[dict[str, str]]] = [
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
    {"Authorization": "Bearer of-the-receiver"},
    {"X-Empty": ""},
    {"X-Inside": "a  b\tc"},
    {"X-Latin": "é ÿ \xa0x"},
    {"X-Colon": 'a: b, c; d="e"'},
    {"User-Agent": "mine", "Accept": "text/plain", "Cookie": "a=b"},
    {"!#%&'*+.^_`|~-": "every sign of a name"},
    {"A": "x" * MAX_HEADER_VALUE_CHARACTERS},
]


@pytest.mark.parametrize("headers", REFUSED, ids=repr)
def test_header_that_cannot_be_sent_as_given_is_refused_at_submission(headers: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as refused:
        WebhookBody(url="https://example.org/", headers=headers)
    assert refused.value.errors()[0]["loc"][0] == "headers"


def made_up(seed: int) -> dict[str, str]:
    """Return headers of random names and values, of which some can be sent."""
    chance = random.Random(seed)
    letters = string.printable + "äÿ\xa0\x85…\x00"
    return {
        "".join(chance.choices(string.ascii_letters + "-_$ :é", k=chance.randint(1, 8))): "".join(
            chance.choices(letters, k=chance.randint(0, 6))
        )
        for _ in range(2)
    }


async def test_every_header_that_is_accepted_arrives_exactly_as_given() -> None:
    accepted = 0
    async with run_webhook_endpoint() as there:
        sender = Sender(allowed_private_hosts=["127.0.0.1"])
        for headers in [*ACCEPTED, *(made_up(seed) for seed in range(1500))]:
            try:
                given = WebhookBody(url="https://example.org/", headers=headers).headers
            except ValidationError:
                assert headers not in ACCEPTED
                continue
            accepted += 1
            answer = await sender.send(WebhookRequest(there.url(), given, b"{}"))
            assert answer.error_code is None, (headers, answer)
            arrived = there.requests[-1].raw_headers
            for name, value in headers.items():
                assert arrived.get(name.lower()) == value, headers
        await sender.aclose()
    assert accepted > len(ACCEPTED) + 20


CANNOT: Final[list[Any]] = [
    {"X": "a\r\nY: b"},
    {"X": "a "},
    {"X Y": "a"},
    {"": "a"},
    {"X": "😀"},
    {"X": "\ud800"},
    {"Ü": "a"},
]


@pytest.mark.parametrize("headers", CANNOT, ids=repr)
async def test_request_that_cannot_be_built_is_our_error_and_calls_nobody(headers: dict[str, str]) -> None:
    async with run_webhook_endpoint() as there:
        sender = Sender(allowed_private_hosts=["127.0.0.1"])
        answer = await sender.send(WebhookRequest(there.url(), headers, b"{}"))
        await sender.aclose()
    assert answer.error_code == "REQUEST_INVALID"
    assert answer.message is not None
    assert "127.0.0.1" not in answer.message
    assert answer.is_permanent
    assert answer.is_host_responsive  # it is no sign that the host is away
    assert there.requests == []
