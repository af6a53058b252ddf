"""Decompress the body of an HTTP response one bounded chunk at a time. Pure.

Like browsers, this module ignores bytes after the end of the compressed data, and accepts `deflate` with and without
the header of zlib. All output in front of damaged data is returned, of `zstd` all but a block of 128 kB.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any, Protocol

import brotli  # type: ignore[import-untyped]  # it ships no types
import zstandard

from jobledger.workers.processors.session.charset_decoders import look_up_encoding

ACCEPT_ENCODING = "gzip, deflate, br, zstd"
MAX_ENCODINGS = 5

_INPUT_CHUNK = 4096
_OUTPUT_CHUNK = 64 * 1024
_ZSTD_INPUT_CHUNK = 64
"""Four bytes of input can become a block of 128 kB, and the package cannot limit the output: at most 2 MB for each."""
_MAX_ZSTD_WINDOW = 8 * 1024 * 1024
"""HTTP does not allow larger windows (RFC 9659)."""
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"
# Servers send these, or the name of a charset, with bodies that are not compressed.
_NOT_COMPRESSED = {"", "identity", "none", "binary", "7bit", "8bit", "aws-chunked"}


class UnsupportedEncoding(Exception):
    """The text is the content encoding."""


class DamagedBody(Exception):
    """The compressed data is invalid. The text is a clause that says why."""


class BodyTooLarge(Exception):
    """The body, or what is left after one of its decompressors, is too large."""


class _Decompressor(Protocol):
    """Decompresses one content encoding."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the output of `data` in bounded chunks. Raise DamagedBody after the output in front of damage."""

    @property
    def is_complete(self) -> bool:
        """Whether the compressed data has ended or has not begun."""


class ContentDecoder:
    """Decompresses a body with the encodings of a `Content-Encoding` header.

    Args:
        header: The header. The encodings were applied in this order.
        max_bytes: Maximum size of the decompressed body.

    Raises:
        UnsupportedEncoding: One of the encodings is unknown, or there are too many.
    """

    def __init__(self, header: str, max_bytes: int) -> None:
        names = [name.strip(" \t\"'").lower() for name in header.split(",")]
        names = [name for name in names if name not in _NOT_COMPRESSED and not look_up_encoding(name)]
        unknown = [name for name in names if name not in _DECOMPRESSORS]
        if unknown or len(names) > MAX_ENCODINGS:
            raise UnsupportedEncoding(unknown[0] if unknown else header)
        self._decompressors: list[_Decompressor] = [_DECOMPRESSORS[name]() for name in reversed(names)]
        self._sizes = [0] * (len(names) + 1)
        self._max_bytes = max_bytes

    @property
    def is_compressed(self) -> bool:
        return bool(self._decompressors)

    @property
    def is_complete(self) -> bool:
        """Whether the compressed data has ended. A body that is not compressed is always complete."""
        return all(decompressor.is_complete for decompressor in self._decompressors)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed `data` in bounded chunks.

        Raises:
            DamagedBody: After the output in front of the damaged data.
            BodyTooLarge: The body is larger than allowed.
        """
        return self._decompress(0, data)

    def _decompress(self, stage: int, data: bytes) -> Iterator[bytes]:
        # Each stage is limited: a bomb can hide in the first one.
        self._sizes[stage] += len(data)
        if self._sizes[stage] > self._max_bytes:
            raise BodyTooLarge
        if stage == len(self._decompressors):
            yield data
            return
        for start in range(0, len(data), _INPUT_CHUNK):
            for part in self._decompressors[stage].feed(data[start : start + _INPUT_CHUNK]):
                yield from self._decompress(stage + 1, part)


class _Zlib:
    """Decompresses `gzip` of one or several members, and `deflate`. Servers confuse the two, so both read both."""

    _wbits_without_header: int | None = None

    def __init__(self) -> None:
        self._start = b""
        self._inflate: Any = None
        self._has_ended = self._is_garbage = False

    @property
    def is_complete(self) -> bool:
        return self._inflate is None and (self._has_ended or not self._start)

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data and not self._is_garbage:
            if self._inflate is None:
                self._start = data = self._start + data
                if len(data) < 2:
                    return
                self._begin(data)
                continue
            yield from self._decompress(data)
            if not self._inflate.eof:
                return
            data = self._inflate.unused_data
            self._start, self._inflate, self._has_ended = b"", None, True

    def _begin(self, data: bytes) -> None:
        """Start the first member, or a further one of gzip. Anything else behind a member is garbage."""
        wbits = self._wbits_without_header
        if data.startswith(_GZIP_MAGIC):
            wbits = 31
        elif self._has_ended:
            self._is_garbage = True
            return
        elif data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0:
            wbits = 15
        if wbits is None:
            raise DamagedBody("it is not compressed with gzip")
        self._inflate = zlib.decompressobj(wbits)

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while True:
            before = self._inflate.copy()
            try:
                part = self._inflate.decompress(data, _OUTPUT_CHUNK)
            except zlib.error as error:
                yield from _salvage(before, data)
                raise DamagedBody(str(error)) from error
            yield part
            data = self._inflate.unconsumed_tail
            if self._inflate.eof or (not data and len(part) < _OUTPUT_CHUNK):
                return


class _Deflate(_Zlib):
    _wbits_without_header = -15


def _salvage(inflate: Any, data: bytes) -> Iterator[bytes]:
    """Yield the output of all bytes in front of the one that is damaged."""
    with suppress(zlib.error):
        for index in range(len(data)):
            yield inflate.decompress(data[index : index + 1])


class _Brotli:
    """Decompresses `br`.

    The package does not tell bytes behind the end from damage, and loses the output of the call. A second decompressor
    is therefore one chunk behind. It repeats a chunk that fails byte by byte.
    """

    def __init__(self) -> None:
        self._decompressor, self._behind = brotli.Decompressor(), brotli.Decompressor()
        self._has_begun = False

    @property
    def is_complete(self) -> bool:
        return not self._has_begun or bool(self._decompressor.is_finished())

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._decompressor.is_finished():
            return
        self._has_begun = True
        size = 0
        try:
            for part in _process_brotli(self._decompressor, data):
                size += len(part)
                yield part
        except brotli.error:
            yield from self._repeat(data, size)
        else:
            for _ in _process_brotli(self._behind, data):
                pass

    def _repeat(self, data: bytes, skipped: int) -> Iterator[bytes]:
        """Yield the output of the valid bytes without the first `skipped` bytes."""
        self._decompressor = self._behind
        for index in range(len(data)):
            if self._decompressor.is_finished():
                return
            try:
                for part in _process_brotli(self._decompressor, data[index : index + 1]):
                    yield part[skipped:]
                    skipped = max(0, skipped - len(part))
            except brotli.error as error:
                raise DamagedBody("it is not valid Brotli data") from error


def _process_brotli(decompressor: Any, data: bytes) -> Iterator[bytes]:
    """Yield the output of `data`. A call may leave output in the decompressor although it takes more input."""
    yield decompressor.process(data, output_buffer_limit=_OUTPUT_CHUNK)
    while not decompressor.is_finished():
        part = decompressor.process(b"", output_buffer_limit=_OUTPUT_CHUNK)
        yield part
        if not part and decompressor.can_accept_more_data():
            return


class _Zstandard:
    """Decompresses `zstd` of one or several frames."""

    def __init__(self) -> None:
        self._start = b""
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._has_ended = self._is_garbage = False

    @property
    def is_complete(self) -> bool:
        return self._frame is None and (self._has_ended or not self._start)

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data and not self._is_garbage:
            if self._frame is None:
                self._start = data = self._start + data
                if len(data) < len(_ZSTD_MAGIC):
                    return
                self._begin(data)
                continue
            data = yield from self._decompress(self._frame, data)

    def _begin(self, data: bytes) -> None:
        """Start the first frame or a further one. Anything else behind a frame is garbage."""
        if data.startswith(_ZSTD_MAGIC) or (data[1:4] == _ZSTD_SKIPPABLE_MAGIC and data[0] & 0xF0 == 0x50):
            self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()
        elif self._has_ended:
            self._is_garbage = True
        else:
            raise DamagedBody("it is not compressed with zstd")

    def _decompress(self, frame: zstandard.ZstdDecompressionObj, data: bytes) -> Generator[bytes, None, bytes]:
        """Yield the output. Return what follows the frame."""
        for start in range(0, len(data), _ZSTD_INPUT_CHUNK):
            end = start + _ZSTD_INPUT_CHUNK
            try:
                yield frame.decompress(data[start:end])
            except zstandard.ZstdError as error:
                raise DamagedBody(str(error)) from error
            if frame.eof:
                self._start, self._frame, self._has_ended = b"", None, True
                return frame.unused_data + data[end:]
        return b""


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": _Zlib,
    "x-gzip": _Zlib,
    "deflate": _Deflate,
    "br": _Brotli,
    "zstd": _Zstandard,
}
