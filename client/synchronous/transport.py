# Generated from client/asynchronous/transport.py by `make reference`. Change that file instead.
"""Send requests to the API: authentication, retries, timeouts, limits, and reading your own writes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import httpx

from jobledger.client.errors import ClientError, NotFoundError, WaitTimeoutError
from jobledger.client.models import Batch, Job
from jobledger.client.resources import Resource
from jobledger.client.responses import (
    build_response_error,
    build_unexpected_content_error,
    parse_content,
    translate_transport_errors,
)
from jobledger.client.settings import RECONNECT_SECONDS, ClientSettings, RetrySchedule
from jobledger.client.submission import create_idempotency_key, encode_json
from jobledger.client.synchronous.runtime import create_http_client, get_connection_owner, sleep
from jobledger.client.urls import remove_user_info

Snapshot = TypeVar("Snapshot", Job, Batch)
_MAX_BODY_BYTES: Final = 256 * 1024 * 1024
"""No response of the API is larger, except files."""
DELETE_SECONDS: Final = 60.0
"""The API waits up to 30 seconds until a running job has stopped."""
_MAX_ERROR_BYTES: Final = 1024 * 1024
_MAX_WAIT_SECONDS: Final = 60
"""The API waits at most this long (`Prefer: wait`)."""
_WAIT_GRACE_SECONDS: Final = 10.0
_UNWAITED_DELAY_SECONDS: Final = 5.0
"""The pause if the API has no capacity for waiting requests."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request to the API.

    Attributes:
        method: The HTTP method.
        path: The path below the URL of the API, quoted.
        query: Query parameters.
        body: Content of the body, encoded as JSON. None: no body.
        headers: More headers.
        timeout: Seconds for the whole response, or for each part of a stream. None: that of the client.
        is_view: The response comes from the views, so it should show what this client has written.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    is_view: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The content and the headers of a response with a success status."""

    content: Mapping[str, Any]
    headers: httpx.Headers
    url: str


class Transport:
    """Sends requests. All parts of a client share it."""

    def __init__(self, settings: ClientSettings, http: httpx.Client | None) -> None:
        self._settings = settings
        self._owns_http = http is None
        self._http = http or create_http_client(settings.url)
        self._http_owner: object = None
        self._is_closed = False
        self._lock = threading.Lock()
        self._position = 0

    @property
    def url(self) -> str:
        """The URL of the API, without a password."""
        return str(remove_user_info(self._settings.url))

    def close(self) -> None:
        """Close the connections, unless the caller has created them."""
        self._is_closed = True
        if self._owns_http and self._http_owner in (None, get_connection_owner()):
            self._http.close()

    def _get_http(self) -> httpx.Client:
        """Return the client of httpx, a new one after a fork or in another event loop."""
        if self._is_closed:
            raise RuntimeError("the client is closed")
        if self._owns_http and self._http_owner != (owner := get_connection_owner()):
            if self._http_owner is not None:
                self._http = create_http_client(self._settings.url)
            self._http_owner = owner
        return self._http

    def get(self, path: str, query: Mapping[str, str] | None = None, *, is_view: bool = True) -> Answer:
        """Read something, with retries."""
        return self.request(Call("GET", path, query or {}, is_view=is_view))

    def change(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        key: str | None = None,
        if_version: int | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Change something once, with retries.

        All tries of one call have the same Idempotency-Key, so a repeated request has no second effect.
        """
        headers = {"Idempotency-Key": create_idempotency_key(key)}
        if if_version is not None:
            headers["If-Match"] = f'"{if_version}"'
        return self.request(Call(method, path, query or {}, body, headers, timeout))

    def request(self, call: Call) -> Answer:
        """Send a request, with retries after transient errors.

        Raises:
            ClientError: The request failed.
        """
        schedule = RetrySchedule(max_retries=self._settings.max_retries)
        content = None if call.body is None else encode_json(call.body)
        is_lost = False
        while True:
            try:
                return self._send(call, content)
            except ClientError as error:
                if is_lost and call.method == "DELETE" and isinstance(error, NotFoundError):
                    return Answer({}, httpx.Headers(), self.url)  # the try without a response has deleted it
                delay = schedule.next_delay(error)
                is_lost = is_lost or error.is_response_lost
            sleep(delay)

    def wait_until_finished(self, resource: Resource[Snapshot], seconds: float | None) -> Snapshot:
        """Return a job or batch when it is finished.

        The API sends the response when the job or batch is finished, so nothing is polled. An outage is survived.

        Raises:
            WaitTimeoutError: It is not finished in time. `seconds` None: there is no limit.
            ClientError: It cannot be read.
        """
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        schedule = RetrySchedule(seconds=RECONNECT_SECONDS)
        while True:
            cause, delay = None, 0.0
            try:
                answer = self._send(self._build_wait(resource.path, deadline - time.monotonic()), None)
            except ClientError as error:
                if time.monotonic() < deadline:
                    delay = schedule.next_delay(error)
                cause = error
            else:
                schedule.reset()
                snapshot = resource.read(answer.content, answer.url)
                if snapshot.is_finished:
                    return snapshot
                delay = 0.0 if "preference-applied" in answer.headers else _UNWAITED_DELAY_SECONDS
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                message = f"{resource.stream_id} is not finished after {seconds:g} s. It continues."
                raise WaitTimeoutError(message) from cause
            sleep(min(delay, remaining))

    def _build_wait(self, path: str, remaining: float) -> Call:
        if remaining <= 0:
            return Call("GET", path, is_view=True)
        seconds = int(min(_MAX_WAIT_SECONDS, max(1, remaining)))
        # The API waits for whole seconds only.
        timeout = remaining if remaining < seconds else seconds + _WAIT_GRACE_SECONDS
        return Call("GET", path, headers={"Prefer": f"wait={seconds}"}, timeout=timeout, is_view=True)

    def _send(self, call: Call, content: bytes | None) -> Answer:
        deadline = time.monotonic() + (call.timeout or self._settings.timeout)
        with self.open(call, content) as response:
            body = self._read(response, _MAX_BODY_BYTES, deadline)
        answer = Answer(parse_content(response.url, body), response.headers, str(response.url))
        if call.method != "GET":
            self._remember_position(response.headers)
        return answer

    @contextmanager
    def open(self, call: Call, content: bytes | None = None) -> Iterator[httpx.Response]:
        """Send a request once, and yield the response before its body is read. `content` is the encoded body.

        Raises:
            ClientError: The response has no success status, or there is none.
        """
        url, timeout = self._settings.url, call.timeout or self._settings.timeout
        headers = self._settings.build_headers() | dict(call.headers)
        if content is not None:
            headers["Content-Type"] = "application/json"
        if call.is_view and self._position:
            headers["Ledger-Position"] = str(self._position)
        http = self._get_http()
        request = http.build_request(
            call.method,
            url.copy_with(raw_path=url.raw_path.rstrip(b"/") + call.path.encode("ascii")),
            params=call.query or None,
            content=content,
            headers=headers,
            timeout=self._settings.build_timeout(timeout),
        )
        with translate_transport_errors(url):
            response = http.send(request, stream=True, follow_redirects=False)
            try:
                if not response.is_success:
                    body = self._read(response, _MAX_ERROR_BYTES, time.monotonic() + timeout)
                    raise build_response_error(response, body)
                yield response
            finally:
                response.close()

    def _read(self, response: httpx.Response, limit: int, deadline: float) -> bytes:
        """Return the body of a response.

        Raises:
            httpx.ReadTimeout: The response is not complete at the deadline.
            UnexpectedResponseError: It is larger than any response of the API.
        """
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > limit:
                raise build_unexpected_content_error(response.url, f"its response has more than {limit} bytes")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the response is too slow", request=response.request)
        return bytes(body)

    def _remember_position(self, headers: httpx.Headers) -> None:
        """Let later reads wait until the views show this change."""
        text = headers.get("ledger-position", "")
        if text.isascii() and text.isdecimal():
            self.show_position(int(text[:18]))

    def show_position(self, position: int) -> None:
        """Let later reads wait until the views show this position of the log."""
        with self._lock:
            self._position = max(self._position, position)
