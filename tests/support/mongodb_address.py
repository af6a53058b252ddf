"""The address of MongoDB by its URI: a TCP port or a Unix socket."""

from __future__ import annotations

import re
import socket
from typing import Final
from urllib.parse import unquote

_URI: Final = re.compile(r"mongodb://(?P<login>[^@/]+@)?(?P<host>[^/,?]+)/?(?P<rest>.*)")


def open_connection(uri: str) -> socket.socket:
    """Open a connection to the server."""
    host = _parts(uri)["host"]
    if host.endswith(".sock"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(unquote(host))
        return connection
    name, _, port = host.rpartition(":")
    return socket.create_connection((name, int(port)))


def proxied_uri(uri: str, port: int) -> str:
    """Return the URI with the same credentials that connects through a local port."""
    parts = _parts(uri)
    options = "directConnection=true" + ("&authSource=local" if "authSource=local" in parts["rest"] else "")
    return f"mongodb://{parts['login'] or ''}127.0.0.1:{port}/?{options}"


def _parts(uri: str) -> re.Match[str]:
    parts = _URI.fullmatch(uri)
    assert parts, "expected the URI of one server"
    return parts
