"""Decode the bytes of a web page as browsers do, and better where the declared encoding is wrong. Pure.

The order of declarations is that of the HTML Standard, section 13.2.3: byte order mark, HTTP header, `meta` element,
XML declaration. Labels are those of the WHATWG Encoding Standard. UTF-7 and UTF-32 are not among them, so they are
never used. Unlike browsers, this module does not use a declaration that the bytes contradict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import chardetng_py

from jobledger.workers.processors.session.charset_decoders import decode, look_up_encoding

MAX_PRESCAN_BYTES = 64 * 1024
"""The standard scans 1,024 bytes. Browsers also obey a later `meta` element: they start again when they parse it."""
MAX_SAMPLE_BYTES = 128 * 1024
"""Only a sample is used to check the declared encoding and to detect another one, so that the time is bounded."""

_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16le", b"\xfe\xff": "utf-16be"}
_UTF_16 = {"utf-16le", "utf-16be"}
_MULTI_BYTE = {"big5", "euc-jp", "euc-kr", "gb18030", "gbk", "shift_jis"}

_PYTHON_NAMES = {"cp874": "windows-874", "mac-cyrillic": "x-mac-cyrillic"}
"""Names of the detector for which the standard has another label."""

_HEADER_VALUE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
_HEADER_PARAMETER = re.compile(r'[;\s]([^\s;="]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"?|([^;"]*))')
_MARKUP = re.compile(r"<(?:!--|[!?]|/(?![a-z])|(/?[a-z][^\s/>]*))", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s/>][^\s/>=]*)\s*(?:=\s*("[^"]*"|'[^']*'|[^\s>"'][^\s>]*|))?""")
_RAW_TEXT_END = {name: re.compile(rf"</{name}\b", re.IGNORECASE) for name in ("script", "style", "title", "textarea")}
_CONTENT_CHARSET = re.compile(r"""charset\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s;"']+))""", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"""<\?xml[^>]*?\bencoding\s*=\s*(?:"([^">]*)"|'([^'>]*)')""")

_UTF_16_MARKUP = {
    "utf-16le": re.compile(rb"(?:\s\x00)*<\x00(?:[!-~]\x00){2}"),
    "utf-16be": re.compile(rb"(?:\x00\s)*\x00<(?:\x00[!-~]){2}"),
}
_ISO_2022_JP_ESCAPE = re.compile(rb"\x1b\$[@B]")
_TAG = re.compile(rb"<[^<>]*>")
_NON_ASCII = re.compile(rb"[\x80-\xff]")
_NON_ASCII_IN_WORD = re.compile(rb"[A-Za-z][\x80-\xff]|[\x80-\xff][A-Za-z]")
_C1_CONTROLS = "".join(map(chr, range(0x80, 0xA0)))
_HALF_WIDTH_KANA = "".join(map(chr, range(0xFF61, 0xFFA0)))


@dataclass(frozen=True, slots=True)
class DecodedPage:
    """The text of a page. `encoding` is a label of the WHATWG Encoding Standard. `warnings` are for the user."""

    text: str
    encoding: str
    warnings: list[str]


def parse_content_type(value: str) -> tuple[str, str | None]:
    """Return the media type in lower case and the charset of a `Content-Type` header.

    Of several header values the last valid one counts. It inherits the charset of those before it with the same media
    type (Fetch Standard, section 2.2.2). Of several `charset` parameters the first one counts.
    """
    media_type, charset = "", None
    for header in _HEADER_VALUE.findall(value):
        found = re.match(r"\s*([^\s;,(]*)", header)
        essence = found[1].lower() if found else ""
        if not media_type or ("/" in essence and essence != "*/*"):
            charset = charset if essence == media_type else None
            media_type = essence
            for name, quoted, token in _HEADER_PARAMETER.findall(header, found.end() if found else 0):
                if name.lower() == "charset":
                    charset = re.sub(r"\\(.)", r"\1", quoted) or token.strip("' \t")
                    break
    return media_type, charset


def decode_page(body: bytes, content_type: str) -> DecodedPage:
    """Decode an HTML page. This never fails: a byte that cannot be decoded becomes U+FFFD."""
    mark = next((mark for mark in _BYTE_ORDER_MARKS if body.startswith(mark)), b"")
    body = body[len(mark) :]
    declared = _BYTE_ORDER_MARKS.get(mark) or _find_declared_encoding(body, content_type)
    sample = _take_sample(body)
    encoding = (None if mark else _find_certain_encoding(body, sample, declared)) or declared or "utf-8"
    warnings = []
    if _is_contradicted(sample, encoding):
        candidates = [encoding, "utf-8", *_detect(sample)]
        best = min(candidates, key=lambda name: _count_faults(decode(sample, name), name))
        if declared and best != encoding:
            warnings.append(
                f"The page declares the encoding {declared}, but its text looks like {best}, which was used."
            )
        encoding = best
    text = decode(body, encoding)
    if lost := text.count("\ufffd"):
        subject = "One character" if lost == 1 else f"{lost:,} characters"
        warnings.append(f"{subject} of the page could not be read in the encoding {encoding} and became \ufffd.")
    return DecodedPage(text, encoding, warnings)


def _take_sample(body: bytes) -> bytes:
    """Return a part of the page that is not only ASCII if there is one.

    U+FFFD in UTF-8 is left out. It comes from the server and says nothing about the encoding.
    """
    first = _NON_ASCII.search(body)
    start = max(0, first.start() - 1000) if first else 0
    return body[start : start + MAX_SAMPLE_BYTES].replace("\ufffd".encode(), b"")


def _find_declared_encoding(body: bytes, content_type: str) -> str | None:
    """Return the encoding that the header, a `meta` element or the XML declaration declares."""
    media_type, charset = parse_content_type(content_type)
    start = body[:MAX_PRESCAN_BYTES]
    # The markup of a page in UTF-16 has null bytes.
    if (encoding := look_up_encoding(charset or "")) and (encoding not in _UTF_16 or b"\x00" in start):
        return encoding
    found = _XML_ENCODING.match(start)
    xml_encoding = _look_up_in_page((found[1] or found[2] or b"").decode("latin-1")) if found else None
    if media_type == "application/xhtml+xml" and xml_encoding:
        return xml_encoding
    return _find_meta_encoding(start.decode("latin-1")) or xml_encoding


def _look_up_in_page(label: str) -> str | None:
    """Return the encoding of a label in the page. A label that can be read without UTF-16 does not mean UTF-16."""
    encoding = look_up_encoding(label)
    return {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}.get(encoding or "", encoding)


def _find_meta_encoding(text: str) -> str | None:
    """Return the encoding that the first `meta` element declares (HTML Standard, section 13.2.3.2)."""
    position = 0
    while found := _MARKUP.search(text, position):
        if found[1] is None:
            start, end = (found.start() + 2, "-->") if found[0] == "<!--" else (found.end(), ">")
            position = text.find(end, start) + len(end)
            if position < len(end):
                return None
            continue
        name = found[1].lower()
        attributes, position = _parse_attributes(text, found.end())
        if name == "meta" and (encoding := _read_meta_element(attributes)):
            return encoding
        if name in _RAW_TEXT_END:
            if not (closing := _RAW_TEXT_END[name].search(text, position)):
                return None
            position = closing.start()
    return None


def _parse_attributes(text: str, position: int) -> tuple[dict[str, str], int]:
    """Return the attributes of a tag, and the position after them."""
    attributes: dict[str, str] = {}
    while (found := _ATTRIBUTE.match(text, position)) and found.end() > position:
        value = found[2] or ""
        attributes.setdefault(found[1].lower(), value[1:-1] if value[:1] in ("'", '"') else value)
        position = found.end()
    return attributes, position


def _read_meta_element(attributes: dict[str, str]) -> str | None:
    if "charset" in attributes:
        return _look_up_in_page(attributes["charset"])
    found = _CONTENT_CHARSET.search(attributes.get("content", ""))
    if not found or attributes.get("http-equiv", "").lower() != "content-type":
        return None
    return _look_up_in_page(found[1] or found[2] or found[3] or "")


def _find_certain_encoding(body: bytes, sample: bytes, declared: str | None) -> str | None:
    """Return the encoding that the bytes show beyond doubt, or None."""
    for encoding, markup in _UTF_16_MARKUP.items():
        if markup.match(body):
            return encoding
    if not _NON_ASCII.search(sample):
        return "iso-2022-jp" if _ISO_2022_JP_ESCAPE.search(body) else None
    if declared is None or declared == "utf-8":
        return None
    text = decode(sample, "utf-8")
    lost = text.count("\ufffd")
    read = _count_non_ascii(text) - lost
    # One or two characters in another encoding with several bytes for each may also be valid UTF-8.
    is_ambiguous = declared in _MULTI_BYTE and not _count_faults(decode(sample, declared), declared)
    return "utf-8" if read >= (3 if is_ambiguous else 1) and read >= 10 * lost else None


def _is_contradicted(sample: bytes, encoding: str) -> bool:
    """Return whether the text has so many faults that `encoding` is probably wrong.

    A few broken bytes in valid UTF-8 are no contradiction. One broken byte in a word of an ASCII page is one. Text in
    another encoding with one byte for each character has few faults, because most bytes are valid in all of them.
    """
    if encoding in _UTF_16:
        return False
    text = decode(sample, encoding)
    faults = _count_faults(text, encoding)
    correct = _count_non_ascii(text) - faults
    if encoding == "utf-8":
        is_in_word = correct == 0 and _NON_ASCII_IN_WORD.search(sample) is not None
        return faults > correct and (faults > 2 or is_in_word)
    return faults > 2 and faults * (5 if encoding in _MULTI_BYTE else 50) > correct


def _count_non_ascii(text: str) -> int:
    return len(text) - len(text.encode("ascii", "ignore"))


def _count_faults(text: str, encoding: str) -> int:
    """Count the characters that a text hardly has if the encoding is right."""
    unlikely = "" if encoding == "utf-8" else _C1_CONTROLS
    return sum(map(text.count, "\ufffd" + unlikely + (_HALF_WIDTH_KANA if encoding == "shift_jis" else "")))


def _detect(sample: bytes) -> list[str]:
    """Return the most probable encoding of a page that is not what it declares, or nothing if there is no text."""
    # Text without markup, and only where it is not ASCII: the markup says nothing about the encoding.
    text = b"\n".join(part for part in _TAG.split(sample) if _NON_ASCII.search(part))
    if not text:
        return []
    name = chardetng_py.detect(text[:MAX_SAMPLE_BYTES], allow_utf8=True)
    return [look_up_encoding(_PYTHON_NAMES.get(name, name)) or "windows-1252"]
