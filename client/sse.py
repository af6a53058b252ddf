"""Parse Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

The parser works on bytes. A parser on text would split lines at characters such as U+2028, which JSON may contain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

_MAX_BLOCK_BYTES: Final = 128 * 1024 * 1024
"""An event of the log has at most 16 MB, and several times as much as JSON with escaped characters."""


class Block(NamedTuple):
    """A block of the stream. `last_id` is the last ID that was received, also in earlier blocks."""

    last_id: str
    data: bytes


class BlockTooLarge(ValueError):
    """A block has more than 128 MiB."""


class SseParser:
    """Parses one stream. `retry_seconds` is the pause before a reconnect that the server asks for."""

    def __init__(self) -> None:
        self.retry_seconds = 1.0
        self._last_id = ""
        self._data: list[bytes] = []
        self._buffer = bytearray()
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Block]:
        """Yield the blocks that are complete with this chunk. Also yield blocks without data: their IDs count.

        Raises:
            BlockTooLarge: A block is larger than any event.
        """
        self._size += len(chunk)
        if self._size > _MAX_BLOCK_BYTES:
            raise BlockTooLarge(f"a block has more than {_MAX_BLOCK_BYTES} bytes")
        self._buffer += chunk
        if b"\n" not in chunk:
            return
        *lines, rest = bytes(self._buffer).replace(b"\r\n", b"\n").split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            if line:
                self._read_line(line)
                continue
            self._size = len(self._buffer)
            yield Block(self._last_id, b"\n".join(self._data))
            self._data = []

    def _read_line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"id" and b"\0" not in value:
            self._last_id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self.retry_seconds = min(int(value[:9]) / 1000, 60.0)
