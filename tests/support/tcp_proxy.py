"""A TCP proxy to MongoDB that simulates network failures."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self

from tests.support.mongodb_address import open_connection, proxied_uri


class TcpProxy:
    """Forwards TCP connections to MongoDB. `suspend` stops the data but keeps the connections.

    Each packet is delayed by `delay_seconds`.
    """

    def __init__(self, uri: str) -> None:
        self.delay_seconds = 0.0
        self._target = uri
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = proxied_uri(uri, self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.resume()

    def close(self) -> None:
        """Close all connections and stop listening."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # a blocked accept would keep the port open
        self._server.close()
        self.close_connections()

    def suspend(self) -> None:
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def close_connections(self) -> None:
        sockets, self._sockets = self._sockets, []
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            server = open_connection(self._target)
            self._sockets += [client, server]
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                time.sleep(self.delay_seconds)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
