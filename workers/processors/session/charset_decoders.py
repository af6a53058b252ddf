"""Decoders of the WHATWG Encoding Standard: Python's codecs, corrected where they differ from it. Pure.

https://encoding.spec.whatwg.org/
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import webencodings

_WITHOUT_STANDARD_DECODER = {"hz-gb-2312": "hz", "iso-2022-kr": "iso2022_kr", "csiso2022kr": "iso2022_kr"}
"""The standard reads these as one U+FFFD, because scripts can hide in them. Here, text is sanitized after decoding."""

MAX_ERRORS = 20_000
"""After so many errors in one body, Python handles the others. Own code for millions of them would take a minute."""
_CHUNK = 64 * 1024
_errors = threading.local()

_UNICODE = {"utf-8", "utf-16le", "utf-16be", "x-user-defined"}
_SINGLE_BYTE_CHANGES = {"koi8-u": {0xAE: "ў", 0xBE: "Ў"}, "windows-1255": {0xCA: "\u05ba"}}


def look_up_encoding(label: str) -> str | None:
    """Return the name of the encoding with this label, or None if `decode` cannot decode it."""
    label = label.strip("\t\n\f\r ").lower()
    found = webencodings.lookup(label)
    if found is None or found.name == "replacement":
        return label if label in _WITHOUT_STANDARD_DECODER else None
    return found.name


def decode(body: bytes, encoding: str) -> str:
    """Decode `body`. A byte that cannot be decoded becomes U+FFFD.

    Args:
        body: Any bytes, without a byte order mark.
        encoding: A name that `look_up_encoding` returns.
    """
    if encoding in _UNICODE:
        return str(_get_codec(encoding).decode(body, "replace")[0])
    if encoding in _MULTI_BYTE:
        return _MULTI_BYTE[encoding].decode(body)
    if encoding == "iso-2022-jp":
        return _decode_iso_2022_jp(body)
    if encoding in _WITHOUT_STANDARD_DECODER:
        return body.decode(_WITHOUT_STANDARD_DECODER[encoding], "replace")
    return codecs.charmap_decode(body, "strict", _build_single_byte_table(encoding))[0]


def _get_codec(encoding: str) -> codecs.CodecInfo:
    found = webencodings.lookup(encoding)
    if found is None:
        raise LookupError(encoding)
    return found.codec_info


@cache
def _build_single_byte_table(encoding: str) -> str:
    """Return the characters of all bytes.

    The standard maps bytes from 0x80 to 0x9F that Python does not know to control characters.
    """
    codec = _get_codec(encoding)
    table = [chr(byte) if byte < 0xA0 else "\ufffd" for byte in range(256)]
    for byte in range(256):
        with suppress(UnicodeDecodeError):
            table[byte] = codec.decode(bytes([byte]), "strict")[0]
    for byte, character in _SINGLE_BYTE_CHANGES.get(encoding, {}).items():
        table[byte] = character
    return "".join(table)


@dataclass(frozen=True, slots=True)
class _MultiByteDecoder:
    """A codec of Python, and what the standard decodes differently.

    Attributes:
        name: The name of an error handler, which this class registers.
        codec: The codec of Python.
        lost_unit: Matches the bytes that become one U+FFFD. ASCII is never lost, such as the `<` of a tag.
        read_other: Decodes one or two bytes that the codec does not know. Raises UnicodeError or KeyError.
        changes: Characters to replace after decoding.
    """

    name: str
    codec: str
    lost_unit: re.Pattern[bytes]
    read_other: Callable[[bytes], str]
    changes: Mapping[int, str]

    def __post_init__(self) -> None:
        codecs.register_error(self.name, self._handle_error)

    def decode(self, body: bytes) -> str:
        decoder = codecs.getincrementaldecoder(self.codec)(self.name)
        _errors.count = 0
        parts = []
        for start in range(0, len(body), _CHUNK):
            parts.append(decoder.decode(body[start : start + _CHUNK]))
            if _errors.count > MAX_ERRORS:
                decoder.errors = "replace"
        text = "".join(parts) + decoder.decode(b"", final=True)
        return text.translate(self.changes) if any(map(text.count, map(chr, self.changes))) else text

    def _handle_error(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        _errors.count += 1
        for end in (error.start + 2, error.start + 1):
            if end <= len(error.object):
                with suppress(UnicodeError, KeyError):
                    return self.read_other(error.object[error.start : end]), end
        found = self.lost_unit.match(error.object, error.start)
        return "\ufffd", found.end() if found else error.end


def _read_extended_jis(unit: bytes) -> str:
    """Decode a pair of EUC-JP with the extensions of NEC and IBM, which Python knows as Shift_JIS only."""
    if len(unit) != 2 or unit[0] < 0xA1 or unit[1] < 0xA1:
        raise UnicodeError(unit)
    lead, trail = divmod((unit[0] - 0xA1) * 94 + unit[1] - 0xA1, 188)
    return bytes([lead + (0x81 if lead < 0x1F else 0xC1), trail + (0x40 if trail < 0x3F else 0x41)]).decode("cp932")


_NO_OTHER: dict[bytes, str] = {}
_PAIR = re.compile(rb"[\x81-\xfe][\x80-\xff]|.", re.DOTALL)
# Python maps these to private characters; their Unicode characters are newer (GB 18030-2022).
_GB18030_CHANGES = dict(
    zip(
        (*range(0xE78D, 0xE797), 0xE7C7, 0xE81E, 0xE826, 0xE82B, 0xE82C, 0xE832, 0xE843, 0xE854, 0xE864, 0xE5E5),
        "\ufe10\ufe12\ufe11\ufe13\ufe14\ufe15\ufe16\ufe17\ufe18\ufe19\u1e3f龴龵龶龷龸龹龺龻\u3000",
        strict=True,
    )
)
_BIG5_CHANGES = dict(zip(map(ord, "•､‾∼♁☉／＼¥¢£"), "‧﹑¯～⊕⊙∕﹨￥￠￡", strict=True))
_EUC_JP_CHANGES = {0x301C: "～", 0x2016: "∥", 0x2212: "－", 0xA2: "￠", 0xA3: "￡", 0xAC: "￢"}

_MULTI_BYTE = {
    # The standard has about 170 rare characters of HKSCS-2008 more.
    "big5": _MultiByteDecoder("session.big5", "big5hkscs", _PAIR, lambda unit: unit.decode("cp950"), _BIG5_CHANGES),
    "euc-kr": _MultiByteDecoder("session.euc-kr", "cp949", _PAIR, _NO_OTHER.__getitem__, {}),
    "gb18030": _MultiByteDecoder("session.gb18030", "gb18030", _PAIR, {b"\x80": "€"}.__getitem__, _GB18030_CHANGES),
    "shift_jis": _MultiByteDecoder(
        name="session.shift_jis",
        codec="cp932",
        lost_unit=re.compile(rb"[\x81-\x9f\xe0-\xfc][\x80-\xff]|.", re.DOTALL),
        read_other=_NO_OTHER.__getitem__,
        changes=dict.fromkeys(range(0xF8F0, 0xF8F4), "\ufffd"),
    ),
    "euc-jp": _MultiByteDecoder(
        name="session.euc-jp",
        codec="euc_jp",
        lost_unit=re.compile(rb"\x8f[\xa1-\xfe][\x80-\xff]|[\x8e\xa1-\xfe][\x80-\xff]|.", re.DOTALL),
        read_other=_read_extended_jis,
        changes=_EUC_JP_CHANGES,
    ),
}
_MULTI_BYTE["gbk"] = _MULTI_BYTE["gb18030"]

_ESCAPE = re.compile(rb"\x1b(\([BJI]|\$[@B])")
_ASCII = "".join(map(chr, range(128))).replace("\x1b", "\ufffd") + "\ufffd" * 128
_ROMAN = _ASCII.replace("\\", "¥").replace("~", "‾")
_JIS_TO_EUC = bytes(byte + 0x80 if 0x21 <= byte <= 0x7E else min(byte, 0x80) for byte in range(256))
_KANA_TO_SHIFT_JIS = bytes(
    byte + 0x80 if 0x21 <= byte <= 0x5F else byte if byte < 0x60 else 0xFF for byte in range(256)
)


def _decode_iso_2022_jp(body: bytes) -> str:
    """Decode each part between two escape sequences. Python's codec knows fewer characters and escape sequences."""
    start, *parts = _ESCAPE.split(body, maxsplit=MAX_ERRORS)
    texts = [codecs.charmap_decode(start, "strict", _ASCII)[0]]
    for escape, part in zip(parts[::2], parts[1::2], strict=True):
        if escape == b"(I":
            texts.append(_MULTI_BYTE["shift_jis"].decode(part.translate(_KANA_TO_SHIFT_JIS)))
        elif escape.startswith(b"$"):
            texts.append(_MULTI_BYTE["euc-jp"].decode(part.translate(_JIS_TO_EUC)))
        else:
            texts.append(codecs.charmap_decode(part, "strict", _ROMAN if escape == b"(J" else _ASCII)[0])
    return "".join(texts)
