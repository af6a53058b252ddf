"""HTTP connections with limits that uvicorn lacks.

A connection is closed if the header of a request does not arrive in time, if a body arrives or a response is read too
slowly, or if its IP address or the process has too many connections. Ambiguous framing is rejected (RFC 9112, 6.3).
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
from jobledger.api.http.errors import ApiError, build_error_response

_EXHAUSTION_ERRORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_DESCRIPTOR_HINT: Final = "raise the limit of file descriptors (LimitNOFILE in the unit, ulimit -n)"
_LOG_INTERVAL_SECONDS: Final = 10.0
_SHED_DELAY_SECONDS: Final = 0.05
_log = structlog.get_logger()


class LoadSheddingSocket(socket.socket):
    """A listening socket that closes new connections while the process has no free file descriptors.

    asyncio would log such an error up to 2048 times, once per waiting connection, and retry immediately. One
    descriptor is reserved, to accept a connection and close it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._reserve = _open_reserve()
        self._logged_at = float("-inf")

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
            BlockingIOError: No connection is waiting, or it was closed immediately.
        """
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _EXHAUSTION_ERRORS:
                raise
            self._shed(error)
            raise BlockingIOError(errno.EAGAIN, "connection closed") from error

    def close(self) -> None:
        """Close the socket and the reserved descriptor."""
        self._release()
        super().close()

    def _shed(self, error: OSError) -> None:
        if time.monotonic() - self._logged_at > _LOG_INTERVAL_SECONDS:
            self._logged_at = time.monotonic()
            _log.error(
                "out of file descriptors, closing new connections", reason=str(error.strerror), hint=_DESCRIPTOR_HINT
            )
        if self._reserve < 0:
            time.sleep(_SHED_DELAY_SECONDS)  # asyncio would call again immediately
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


def _count_unacknowledged_bytes(connection: socket.socket) -> int:
    """Return the number of sent bytes that the peer has not acknowledged. 0 if the system does not support it."""
    try:
        queued = ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))  # SIOCOUTQ: tcp(7)
    except OSError:
        return 0
    return int.from_bytes(queued, sys.byteorder)


@dataclass(slots=True)
class ConnectionLimits:
    """Limits of the number and slowness of connections.

    Attributes:
        max_connections: Maximum number of connections.
        max_connections_per_address: Maximum number of connections from one IP address.
        trusted_proxies: Networks whose addresses have no limit of their own.
        header_timeout_seconds: Maximum time for the header of a request, from its first byte. For the first request,
            from the start of the connection.
        body_interval_seconds: Length of the intervals in which the progress of a body is checked.
        body_min_bytes: Minimum size of the part of a body that must arrive in each interval.
        read_interval_seconds: Length of the intervals in which reading is checked while the buffers are full.
        read_min_bytes: Minimum number of bytes that the client must read in each interval.
        drain_timeout_seconds: Maximum time for reading all buffered bytes. A large response, which is in memory, must
            therefore be read faster.
        open_connections: Number of open connections by IP address, as `get_rate_limit_key` returns it.
    """

    max_connections: int = 5000
    max_connections_per_address: int = 2000
    trusted_proxies: Collection[Network] = ()
    header_timeout_seconds: float = 10.0
    body_interval_seconds: float = 10.0
    body_min_bytes: int = 10_000
    read_interval_seconds: float = 30.0
    read_min_bytes: int = 10_000
    drain_timeout_seconds: float = 300.0
    open_connections: Counter[str] = field(default_factory=Counter)

    def find_rejection(self, address: str) -> ApiError | None:
        """Return the error for one more connection from an IP address, or None if it is accepted."""
        count = self.open_connections[get_rate_limit_key(address)]
        if self.open_connections.total() > self.max_connections:
            message = "The server has too many open connections (api.max_connections). Retry later."
        elif count > self.max_connections_per_address and not is_in_networks(address, self.trusted_proxies):
            message = "Your IP address has too many open connections (api.max_connections_per_address)."
        else:
            return None
        return ApiError(503, "too_many_connections", message, retry_after_seconds=5)


def create_protocol_class(limits: ConnectionLimits) -> type[H11Protocol]:
    """Return a protocol class for uvicorn with these limits."""
    return type("LimitedConnection", (HttpConnection,), {"limits": limits})


class HttpConnection(H11Protocol):
    """A connection of uvicorn with limits.

    `scope["state"]["abort"]` closes the connection to a client that does not read. `["drained"]` waits until the client
    has read the response.
    """

    limits = ConnectionLimits()
    _timer: asyncio.TimerHandle | None = None
    _address: str | None = None
    _received = 0
    _read_timer: asyncio.TimerHandle | None = None
    _unread = 0
    _required_read = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn has the same signature
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort, "drained": self.flow.drain}
        address = self.client[0] if self.client else ""
        self._address = get_rate_limit_key(address)
        self.limits.open_connections[self._address] += 1
        if (error := self.limits.find_rejection(address)) is not None:
            self._respond_and_close(error)
        else:
            self._set_timer(self.limits.header_timeout_seconds, self._on_header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self.limits.open_connections[self._address] -= 1
            if not self.limits.open_connections[self._address]:
                del self.limits.open_connections[self._address]
            self._address = None
        self._set_timer(None)
        self._stop_watching_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called when the write buffer is full."""
        super().pause_writing()
        buffered = self.transport.get_write_buffer_size()
        self._required_read = max(
            self.limits.read_min_bytes, buffered * self.limits.read_interval_seconds / self.limits.drain_timeout_seconds
        )
        self._watch_reader()

    def resume_writing(self) -> None:
        """Called when the client has read most of the buffer."""
        self._stop_watching_reader()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._received += len(data)
        previous_cycle, was_between_requests = self.cycle, self._is_between_requests()
        super().data_received(data)
        if self.transport.is_closing():
            self._set_timer(None)
        elif self.cycle is not previous_cycle and self.cycle.more_body:
            self._watch_body()
        elif self._is_between_requests():
            if was_between_requests and self._timer is None:
                self._set_timer(self.limits.header_timeout_seconds, self._on_header_timeout)
        elif not self.cycle.more_body:
            self._set_timer(None)

    def send_400_response(self, msg: str) -> None:
        """Respond to malformed requests with the error format of the API."""
        self._respond_and_close(ApiError(400, "malformed_request", "The request is not valid HTTP/1.1."))

    def _is_between_requests(self) -> bool:
        """Return whether the next bytes belong to the header of a request."""
        return self.conn.their_state is h11.IDLE

    def _set_timer(self, seconds: float | None, on_timeout: Callable[[], None] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, on_timeout) if seconds and on_timeout else None

    def _on_header_timeout(self) -> None:
        self._timer = None
        if self._is_between_requests() and not self.transport.is_closing():
            message = f"The request header did not arrive within {self.limits.header_timeout_seconds:g} seconds."
            self._respond_and_close(ApiError(408, "request_timeout", message))

    def _watch_body(self) -> None:
        self._received = 0
        self._set_timer(self.limits.body_interval_seconds, self._check_body)

    def _check_body(self) -> None:
        """Close the connection if too little of the body has arrived, unless the application reads slowly."""
        self._timer = None
        if self.transport.is_closing() or not self.cycle.more_body:
            return
        if self._received >= self.limits.body_min_bytes or self.flow.read_paused:
            self._watch_body()
            return
        message = (
            f"Fewer than {self.limits.body_min_bytes} bytes of the request body arrived in "
            f"{self.limits.body_interval_seconds:g} s."
        )
        if self.cycle.response_started:
            self.transport.abort()
        else:
            self.cycle.disconnected = True  # the application sees it, and its response is dropped
            self.cycle.message_event.set()
            self._respond_and_close(ApiError(408, "request_timeout", message))

    def _watch_reader(self) -> None:
        self._stop_watching_reader()
        self._unread = self._count_unread_bytes()
        self._read_timer = self.loop.call_later(self.limits.read_interval_seconds, self._check_reader)

    def _check_reader(self) -> None:
        """Abort the connection of a client that reads too slowly. Nothing is added to the buffer meanwhile."""
        if self._unread - self._count_unread_bytes() >= self._required_read:
            self._watch_reader()
        else:
            self.transport.abort()  # close() would wait for the client

    def _count_unread_bytes(self) -> int:
        """Return the number of unread bytes, in the process and in the kernel.

        The process's own buffer shows no progress for a long time: the kernel accepts more only after the client has
        read about a third of the kernel's buffer, which may be more than 1 MB.
        """
        return self.transport.get_write_buffer_size() + _count_unacknowledged_bytes(
            self.transport.get_extra_info("socket")
        )

    def _stop_watching_reader(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _respond_and_close(self, error: ApiError) -> None:
        """Send an error and close the connection."""
        response = build_error_response(error)
        headers: list[tuple[Any, Any]] = [*response.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self._set_timer(None)
        self.transport.close()
