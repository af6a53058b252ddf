"""A proxy to MongoDB that drops single requests or responses.

    with MessageProxy(uri) as proxy:
        proxy.drop_response("insert")  # the next insert succeeds, but the client gets a connection error

It parses OP_MSG with one document, which is what Jobledger uses. Other messages are forwarded unchanged.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

import bson

from tests.support.mongodb_address import open_connection, proxied_uri

_HEADER = struct.Struct("<iiii")  # length, request ID, ID of the request of a response, operation
_OP_MSG = 2013
_BODY = 21  # after the header, the flags and the kind of the first section
_INTERRUPTED = {"ok": 0.0, "code": 11601, "codeName": "Interrupted", "errmsg": "dropped by the proxy"}


class MessageProxy:
    """Forwards connections to MongoDB by message. It can drop or hold the next message of a command."""

    def __init__(self, uri: str) -> None:
        self._target = uri
        self._lock = threading.Lock()
        self._requests_to_drop: dict[str, int] = {}
        self._responses_to_drop: dict[str, int] = {}
        self._command_to_hold: str | None = None
        self._released = threading.Event()
        self.message_held = threading.Event()
        """Set while a message is held."""
        self.dropped_count = 0
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = proxied_uri(uri, self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.close_connections()

    def close_connections(self) -> None:
        """Close all connections. New connections are accepted."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def drop_request(self, command: str, times: int = 1) -> None:
        """Drop the next request with one of these commands. The client gets a connection error."""
        with self._lock:
            self._requests_to_drop[command] = times

    def drop_response(self, command: str, times: int = 1) -> None:
        """Drop the response to the next of these commands. The client gets a connection error."""
        with self._lock:
            self._responses_to_drop[command] = times

    def hold_request(self, command: str) -> None:
        """Hold the next request with one of these commands until `release_request`."""
        self.message_held.clear()
        self._released.clear()
        self._command_to_hold = command

    def release_request(self) -> None:
        self.message_held.clear()
        self._released.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                server = open_connection(self._target)
            except OSError:
                return
            with self._lock:
                self._sockets += [client, server]
            dropped_ids: set[int] = set()
            threading.Thread(target=self._forward_requests, args=(client, server, dropped_ids), daemon=True).start()
            threading.Thread(target=self._forward_responses, args=(server, client, dropped_ids), daemon=True).start()

    def _forward_requests(self, client: socket.socket, server: socket.socket, dropped_ids: set[int]) -> None:
        with suppress(OSError):
            for message in _read_messages(client):
                _, request_id, _, operation = _HEADER.unpack_from(message)
                command = _read_command_name(message) if operation == _OP_MSG else ""
                if self._consume(self._requests_to_drop, command):
                    client.sendall(_make_error_response(request_id))
                    continue
                if self._consume(self._responses_to_drop, command):
                    dropped_ids.add(request_id)
                if command and command == self._command_to_hold:
                    self._command_to_hold = None
                    self.message_held.set()
                    self._released.wait()
                server.sendall(message)
            server.shutdown(socket.SHUT_WR)

    def _forward_responses(self, server: socket.socket, client: socket.socket, dropped_ids: set[int]) -> None:
        with suppress(OSError):
            for message in _read_messages(server):
                request_id = _HEADER.unpack_from(message)[2]
                client.sendall(_make_error_response(request_id) if request_id in dropped_ids else message)
            client.shutdown(socket.SHUT_WR)

    def _consume(self, commands: dict[str, int], command: str) -> bool:
        with self._lock:
            if not commands.get(command):
                return False
            commands[command] -= 1
            self.dropped_count += 1
            return True


def _read_messages(source: socket.socket) -> Iterator[bytes]:
    with source.makefile("rb") as stream:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            yield header + stream.read(_HEADER.unpack(header)[0] - _HEADER.size)


def _read_command_name(message: bytes) -> str:
    """Return the name of the command: the first key of the document, after its length and the type of the value."""
    begin = _BODY + 5
    return message[begin : message.index(0, begin)].decode()


def _make_error_response(request_id: int) -> bytes:
    body = bson.encode(_INTERRUPTED)
    return _HEADER.pack(_BODY + len(body), 0, request_id, _OP_MSG) + bytes(5) + body
