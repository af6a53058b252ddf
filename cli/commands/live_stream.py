"""Read the live stream of the API: events as they happen, also across restarts of the API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

import httpx
import orjson

from jobledger.cli.commands.api_client import build_unexpected_response_error, compute_retry_delay, parse_response
from jobledger.ledger.domain.errors import LedgerUnavailable

_RECONNECT_TIMEOUT_SECONDS: Final = 60.0
_STREAM_TIMEOUT: Final = httpx.Timeout(10, read=45)  # the server sends a heartbeat every 15 seconds
_UNAVAILABLE_STATUSES: Final = (429, 502, 503, 504)
"""HTTP statuses of the API, or of a proxy before it, while the stream cannot be served."""


async def stream_events(
    client: httpx.AsyncClient, *, after: int, **filters: str
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield events as they happen. Reconnects after interruptions.

    Args:
        client: Client of the API.
        after: Position in the log to start after.
        filters: `job_id`, or `batch_id` for a batch and its jobs.

    Raises:
        LedgerUnavailable: The API did not respond for a minute.
        RequestRejected: Access was revoked, or the response does not come from Jobledger.
    """
    lost_at: float | None = None
    while True:
        delay = 1.0
        try:
            query = {"after": str(after), **filters}
            async with client.stream("GET", "/api/ledger/stream", params=query, timeout=_STREAM_TIMEOUT) as response:
                if response.status_code in _UNAVAILABLE_STATUSES:
                    delay = compute_retry_delay(response)
                    raise httpx.HTTPStatusError(
                        f"HTTP status {response.status_code}", request=response.request, response=response
                    )
                if response.is_error:
                    await response.aread()
                    parse_response(response)  # raises the error
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise build_unexpected_response_error(response)
                async for line in _iterate_lines(response):
                    lost_at = None
                    if line.startswith(b"data:"):
                        event: dict[str, Any] = orjson.loads(line.removeprefix(b"data:"))
                        after = event["position"]
                        yield event
        except httpx.HTTPError as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > _RECONNECT_TIMEOUT_SECONDS:
                raise LedgerUnavailable(f"Lost the connection to {client.base_url}: {error}") from error
        await asyncio.sleep(delay)


async def _iterate_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield lines of Server-Sent Events. `aiter_lines` would also split at U+2028 and similar, inside the JSON."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
