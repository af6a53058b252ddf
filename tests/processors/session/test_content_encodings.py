"""Compressed bodies: every encoding, chains, damage, bytes after the end, and limits."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from random import Random

import brotli  # type: ignore[import-untyped]  # it ships no types
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jobledger.workers.processors.session.content_encodings import (
    BodyTooLarge,
    ContentDecoder,
    DamagedBody,
    UnsupportedEncoding,
)
from tests.processors.session.fixtures import without_deadline


def deflate_raw(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


COMPRESSORS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate with header": ("deflate", zlib.compress),
    "deflate without header": ("deflate", deflate_raw),
    "deflate that is gzip": ("deflate", gzip.compress),
    "gzip that is zlib": ("gzip", zlib.compress),
    "br": ("br", partial(brotli.compress, quality=5)),
    "zstd": ("zstd", zstandard.compress),
}
each_encoding = pytest.mark.parametrize(("encoding", "compress"), COMPRESSORS.values(), ids=COMPRESSORS)
TEXT = b"".join(b"Line %d of a page about ledgers.\n" % Random(number).randrange(10**9) for number in range(3000))


def decompress(header: str, body: bytes, *, step: int = 10_000, max_bytes: int = 1_000_000) -> tuple[bytes, bool]:
    """Return the output, and whether it is complete."""
    decoder = ContentDecoder(header, max_bytes)
    parts = [part for start in range(0, len(body), step) for part in decoder.feed(body[start : start + step])]
    return b"".join(parts), decoder.is_complete


def decompress_damaged(header: str, body: bytes) -> bytes:
    """Return the output in front of the damage."""
    output: list[bytes] = []
    with pytest.raises(DamagedBody):
        output.extend(ContentDecoder(header, 1_000_000).feed(body))
    return b"".join(output)


@each_encoding
@pytest.mark.parametrize("step", [1, 7, 4096, 10**6])
def test_body_is_decompressed_in_chunks_of_any_size(
    encoding: str, compress: Callable[[bytes], bytes], step: int
) -> None:
    text = TEXT if step > 7 else TEXT[:5000]
    assert decompress(encoding, compress(text), step=step) == (text, True)


@without_deadline
@given(st.binary(max_size=2000), st.lists(st.sampled_from(list(COMPRESSORS)), max_size=5), st.integers(1, 500))
def test_encodings_of_one_header_are_undone_in_reverse_order(data: bytes, names: list[str], step: int) -> None:
    body, header = data, []
    for encoding, compress in (COMPRESSORS[name] for name in names):
        body = compress(body)
        header.append(encoding.upper())
    assert decompress(", ".join(header), body, step=step) == (data, True)


@each_encoding
@pytest.mark.parametrize("garbage", [b"\n", b"\0" * 512, b"<!-- cached -->", b"\x1f", b"\x28\xb5\x2f"])
@pytest.mark.parametrize("step", [1, 10**6])
def test_bytes_after_the_end_are_ignored(
    encoding: str, compress: Callable[[bytes], bytes], garbage: bytes, step: int
) -> None:
    text = TEXT if step > 1 else TEXT[:5000]
    assert decompress(encoding, compress(text) + garbage, step=step) == (text, True)


@each_encoding
@pytest.mark.parametrize("removed", [1, 3, 1000])
def test_cut_body_gives_its_beginning_and_is_not_complete(
    encoding: str, compress: Callable[[bytes], bytes], removed: int
) -> None:
    text, is_complete = decompress(encoding, compress(TEXT)[:-removed])
    assert not is_complete
    assert TEXT.startswith(text)
    # zstd compresses blocks of 128 kB.
    assert len(text) > len(TEXT) - (10 * removed + 100 if encoding != "zstd" else 131_072)


def test_all_output_in_front_of_damage_is_returned() -> None:
    packed = gzip.compress(TEXT)
    wrong_checksum = packed[:-8] + bytes(4) + packed[-4:]
    assert decompress_damaged("gzip", wrong_checksum) == TEXT
    compressor = brotli.Compressor()
    assert decompress_damaged("br", compressor.process(TEXT) + compressor.flush() + b"\xff" * 100) == TEXT


def test_cut_brotli_body_of_much_text_loses_nothing_that_was_received() -> None:
    compressor = brotli.Compressor(quality=5)
    text = TEXT[:1000] * 300
    assert decompress("br", compressor.process(text) + compressor.flush()) == (text, False)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd"])
def test_text_that_is_not_compressed_is_damaged(encoding: str) -> None:
    assert decompress_damaged(encoding, b"<!doctype html><p>This page is not compressed at all.</p>") == b""


def test_members_and_frames_are_joined() -> None:
    assert decompress("gzip", gzip.compress(b"one ") + gzip.compress(b"two") + b"\0\0") == (b"one two", True)
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    frames = zstandard.compress(b"one ") + skippable + zstandard.compress(b"two")
    assert decompress("zstd", frames, step=3) == (b"one two", True)


@pytest.mark.parametrize(
    "header", ["", "identity", "Identity, identity", "none", "UTF-8", "aws-chunked", "iso-8859-1", " , "]
)
def test_header_without_compression_leaves_body_as_it_is(header: str) -> None:
    assert decompress(header, b"<p>hello") == (b"<p>hello", True)


@pytest.mark.parametrize(
    ("header", "named"),
    [("compress", "compress"), ("gzip, exi", "exi"), ("gzip;q=1", "gzip;q=1"), (", ".join(["gzip"] * 6), "gzip, gzip")],
)
def test_unknown_encoding_is_named(header: str, named: str) -> None:
    with pytest.raises(UnsupportedEncoding, match=named):
        ContentDecoder(header, 1000)


def test_empty_body_is_complete() -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, br"):
        assert decompress(encoding, b"") == (b"", True)


@pytest.mark.parametrize("encoding", ["gzip", "deflate with header", "deflate without header", "br", "zstd"])
def test_decompression_bomb_is_stopped_with_little_memory(encoding: str) -> None:
    header, compress = COMPRESSORS[encoding]
    bomb = compress(b"\0" * 50_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            for _ in ContentDecoder(header, 5_000_000).feed(bomb):
                pass
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_bomb_in_an_inner_encoding_is_stopped() -> None:
    # The outer encoding ends at once, so it ignores the 20 MB behind its end and has no output.
    bomb = brotli.compress(gzip.compress(b"x") + b"\0" * 20_000_000, quality=1)
    with pytest.raises(BodyTooLarge):
        for _ in ContentDecoder("gzip, br", 1_000_000).feed(bomb):
            pass


def test_zstd_window_larger_than_http_allows_is_rejected() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert decompress_damaged("zstd", compressor.compress(b"x" * 100) + compressor.flush()) == b""
