"""cli: one HTTP connection of the server, with the limits that uvicorn does not have.

A connection is closed when the head of a request does not arrive in time, when a body arrives or an answer is read too
slowly, or when its address or the process has too many. Framing that two servers could read differently is refused
(RFC 9112, 6.3).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from typing import Any, Final

import h11
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobledger.api.http.client_address import Network, get_rate_limit_key, is_in_networks
from jobledger.api.http.errors import ApiError, error_response

HEADER_TIMEOUT_SECONDS: Final = 10.0
"""Time for the head of a request, from its first byte; for the first request, from the connection."""
BODY_INTERVAL_SECONDS: Final = 10.0
BODY_MIN_BYTES: Final = 10_000
"""Bytes that must arrive of a body in each BODY_SECONDS."""

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_MORE_DESCRIPTORS: Final = "raise the limit of file descriptors (LimitNOFILE in the unit, ulimit -n)"
_LOG_AGAIN_SECONDS: Final = 10.0
_SHED_PAUSE_SECONDS: Final = 0.05
_log = structlog.get_logger()

READ_INTERVAL_SECONDS: Final = 30.0
READ_MIN_BYTES: Final = 10_000
"""Bytes that a client must take of an answer in each READ_SECONDS, while more than its buffers hold is waiting."""
DRAIN_TIMEOUT_SECONDS: Final = 300.0
"""Time for all that waits: a large answer, which is in memory, must be read faster."""


class SheddingSocket(socket.socket):
    """A listening socket that closes new connections while the process is out of file descriptors.

    asyncio logs such an error once for each connection that may wait (2048), and tries again at once. One descriptor is
    kept in reserve to accept a connection and close it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reserve = _open_reserve()
        self._logged_at = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: there is none, or it was closed at once.
        """
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            self._shed(error)
            raise BlockingIOError(errno.EAGAIN, "the connection was closed") from error

    def close(self) -> None:
        """Close the socket and the descriptor in reserve."""
        self._release()
        super().close()

    def _shed(self, error: OSError) -> None:
        if time.monotonic() - self._logged_at > _LOG_AGAIN_SECONDS:
            self._logged_at = time.monotonic()
            _log.error("connections are closed at once", problem=str(error.strerror), advice=_MORE_DESCRIPTORS)
        if self._reserve < 0:
            time.sleep(_SHED_PAUSE_SECONDS)  # asyncio would call again at once
        self._release()
        with suppress(OSError):
            super().accept()[0].close()
        self._reserve = _open_reserve()

    def _release(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1


def _open_reserve() -> int:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _bytes_in_system(connection: socket.socket) -> int:
    """Return how many bytes the other end has not acknowledged; 0 where the system does not say."""
    try:
        queued = ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ: tcp(7)
    except OSError:
        return 0
    return int.from_bytes(queued, sys.byteorder)


@dataclass(slots=True)
class ConnectionLimits:
    """How many connections there may be, and how slow. `trusted` proxies hold the connections of many clients."""

    max_connections: int = 5000
    max_connections_per_address: int = 2000
    trusted_proxies: Collection[Network] = ()
    header_timeout_seconds: float = HEADER_TIMEOUT_SECONDS
    body_interval_seconds: float = BODY_INTERVAL_SECONDS
    body_min_bytes: int = BODY_MIN_BYTES
    read_interval_seconds: float = READ_INTERVAL_SECONDS
    read_min_bytes: int = READ_MIN_BYTES
    drain_timeout_seconds: float = DRAIN_TIMEOUT_SECONDS
    open_connections: Counter[str] = field(default_factory=Counter)

    def rejection(self, address: str) -> ApiError | None:
        """Return why one more connection is refused, if it is."""
        if self.open_connections.total() > self.max_connections:
            return ApiError(503, "too_many_connections", "The server has too many connections.", retry_after_seconds=5)
        if self.open_connections[get_rate_limit_key(address)] > self.max_connections_per_address and not is_in_networks(
            address, self.trusted_proxies
        ):
            message = "Your address has too many connections open (api.max_connections_per_address)."
            return ApiError(503, "too_many_connections", message, retry_after_seconds=5)
        return None


def protocol_class(limits: ConnectionLimits) -> type[H11Protocol]:
    """Return uvicorn's protocol with these limits."""
    return type("LimitedConnection", (HttpConnection,), {"limits": limits})


class HttpConnection(H11Protocol):
    """Uvicorn's connection with limits.

    `scope["state"]["abort"]` cuts off a client that does not read; `["drained"]` waits until an answer has been read.
    """

    limits = ConnectionLimits()
    _timer: asyncio.TimerHandle | None = None
    _address: str | None = None
    _received = 0
    _reading: asyncio.TimerHandle | None = None
    _unread = 0
    _must_read = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort, "drained": self.flow.drain}
        address = self.client[0] if self.client else ""
        self._address = get_rate_limit_key(address)
        self.limits.open_connections[self._address] += 1
        if (refused := self.limits.rejection(address)) is not None:
            self._answer(refused)
        else:
            self._expect(self.limits.header_timeout_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self.limits.open_connections[self._address] -= 1
            if not self.limits.open_connections[self._address]:
                del self.limits.open_connections[self._address]
            self._address = None
        self._expect(None)
        self._stop_watching_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called when more of an answer waits than the buffers hold."""
        super().pause_writing()
        waiting = self.transport.get_write_buffer_size()
        self._must_read = max(
            self.limits.read_min_bytes, waiting * self.limits.read_interval_seconds / self.limits.drain_timeout_seconds
        )
        self._watch_reader()

    def resume_writing(self) -> None:
        """Called when the client has taken most of what waited."""
        self._stop_watching_reader()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        before, began = self.cycle, self._is_between_requests()
        super().data_received(data)
        if self.transport.is_closing():
            self._expect(None)
        elif self.cycle is not before and self.cycle.more_body:
            self._watch_body()
        elif self._is_between_requests():
            if began and self._timer is None:
                self._expect(self.limits.header_timeout_seconds, self._head_is_late)
        elif not self.cycle.more_body:
            self._expect(None)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the envelope of all errors."""
        self._answer(ApiError(400, "malformed_request", "This is not a valid HTTP request."))

    def _is_between_requests(self) -> bool:
        """Return whether the next bytes belong to the head of a request."""
        return self.conn.their_state is h11.IDLE

    def _expect(self, seconds: float | None, otherwise: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, otherwise) if seconds and otherwise else None

    def _head_is_late(self) -> None:
        self._timer = None
        if self._is_between_requests() and not self.transport.is_closing():
            message = f"The head of the request did not arrive within {self.limits.header_timeout_seconds:g} seconds."
            self._answer(ApiError(408, "request_timeout", message))

    def _watch_body(self) -> None:
        self._received = 0
        self._expect(self.limits.body_interval_seconds, self._check_body)

    def _check_body(self) -> None:
        """Give up on a body of which too little has arrived, unless the application reads no faster."""
        self._timer = None
        if self.transport.is_closing() or not self.cycle.more_body:
            return
        if self._received >= self.limits.body_min_bytes or self.flow.read_paused:
            self._watch_body()
            return
        message = (
            f"Less than {self.limits.body_min_bytes} bytes of the body arrived in "
            f"{self.limits.body_interval_seconds:g} s."
        )
        if self.cycle.response_started:
            self.transport.abort()
        else:
            self.cycle.disconnected = True  # the application learns that nothing more comes, and its answer is dropped
            self.cycle.message_event.set()
            self._answer(ApiError(408, "request_timeout", message))

    def _watch_reader(self) -> None:
        self._stop_watching_reader()
        self._unread = self._unread_bytes()
        self._reading = self.loop.call_later(self.limits.read_interval_seconds, self._check_reader)

    def _check_reader(self) -> None:
        """Give up on a client that takes too little. Nothing is added to the buffer while it is watched."""
        if self._unread - self._unread_bytes() >= self._must_read:
            self._watch_reader()
        else:
            self.transport.abort()  # an ordinary close would wait for the client

    def _unread_bytes(self) -> int:
        """Return how much of the answers waits here and in the system.

        Our own buffer alone shows no progress for a long time: the system takes more only after the client has read
        about a third of what the system holds, which may be more than 1 MB.
        """
        return self.transport.get_write_buffer_size() + _bytes_in_system(self.transport.get_extra_info("socket"))

    def _stop_watching_reader(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _answer(self, error: ApiError) -> None:
        """Send an error and close, whatever else the client sends."""
        answer = error_response(error)
        headers: list[tuple[Any, Any]] = [*answer.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self._expect(None)
        self.transport.close()
