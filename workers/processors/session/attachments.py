"""Recognize attachments that are no slides: viewer pages, archives, HTML presentations, login pages.

All sizes are limited. Nothing is written except one file of an archive.
"""

from __future__ import annotations

import mmap
import re
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from lxml import html  # type: ignore[import-untyped]  # it ships no types

from jobledger.workers.processors.session.fetcher import format_bytes
from jobledger.workers.processors.session.presentation_conversion import SIGNATURES
from jobledger.workers.processors.session.presentation_files import DAMAGE_ERRORS, MAX_PARTS, MAX_SLIDES, SlideText
from jobledger.workers.processors.session.safe_markdown import COMMONMARK
from jobledger.workers.processors.session.slide_text import MAX_TOTAL_CHARACTERS, clean_line, clean_notes

_CHUNK_BYTES: Final = 1024 * 1024
MAX_HTML_BYTES: Final = 5 * 1024 * 1024
PRESENTATION_TYPES: Final = {
    **dict.fromkeys((".ppt", ".pptx", ".pps", ".ppsx"), "a PowerPoint file"),
    **dict.fromkeys((".odp", ".fodp"), "an OpenDocument presentation"),
    ".key": "a Keynote file",
}
"""Names of presentations, by suffix."""
UNSUPPORTED_TYPES: Final = {
    **dict.fromkeys((".gz", ".tgz", ".xz", ".7z", ".rar"), "an archive, not a PDF"),
    ".svg": "an SVG image, not a PDF",
    **dict.fromkeys((".doc", ".docx", ".odt", ".md", ".txt"), "a text document, not a PDF"),
}
"""Attachments that are only linked, and not fetched, by the suffix of their URL."""
_HTML_START: Final = re.compile(rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<!--[^>]*>\s*)?<(?:!doctype\s+html|html|head|body)\b")
_HTML_DECKS: Final = {
    "reveal.js": re.compile(
        r"(?i)Reveal\.initialize|\breveal(?:\.min)?\.js|class=[\"']reveal[\"']\s*>\s*<div class=[\"']slides"
    ),
    "impress.js": re.compile(r"(?i)impress(?:\.min)?\.js|id=[\"']impress[\"']"),
    "Marp": re.compile(r"(?i)data-marpit-|@marp-team"),
    "Slidev": re.compile(r"(?i)@slidev/|slidev-layout"),
    "remark": re.compile(r"(?i)remark\.create|remark(?:-latest)?(?:\.min)?\.js"),
}
_OLE_START: Final = b"\xd0\xcf\x11\xe0"
_ENCRYPTED_PACKAGE: Final = "EncryptedPackage".encode("utf-16-le")
"""Name of the stream that contains an encrypted Office file (MS-OFFCRYPTO, 2.3.4.4)."""
_PASSWORD_FIELD: Final = re.compile(r"(?i)type=[\"']?password")
_LOGIN: Final = re.compile(r"(?i)\b(?:log ?in|sign ?in|anmelden|einloggen)\b")
_MAX_LOGIN_CHARACTERS: Final = 5_000
"""Longer pages may have a link for login beside their content."""
_MAX_NAME_CHARACTERS: Final = 80
_MARKDOWN_SLIDE_END: Final = re.compile(r"\r?\n-{2,3}[ \t]*\r?\n")
_MARKDOWN_NOTES: Final = re.compile(r"(?im)^\s*notes?:")
"""Default separators of slides and notes in Markdown (reveal.js, `data-separator` and `data-separator-notes`)."""


@dataclass(frozen=True, slots=True)
class AttachmentContent:
    """What an attachment is.

    Attributes:
        description: A sentence.
        texts: Texts of the slides of an HTML presentation.
        unpacked_suffix: The suffix of the presentation that was unpacked from an archive.
    """

    description: str = ""
    texts: list[SlideText] = field(default_factory=list)
    unpacked_suffix: str | None = None


def get_download_url(url: str) -> str:
    """Return the URL of the file that a viewer page shows, or else `url` itself."""
    parts = urlsplit(url)
    path = parts.path
    match parts.hostname:
        case "docs.google.com" if match := re.match(r"/presentation(?:/u/\d+)?/d/(?!e/)([\w-]+)", path):
            return f"https://docs.google.com/presentation/d/{match[1]}/export/pdf"
        case "drive.google.com" if match := re.match(r"/file(?:/u/\d+)?/d/([\w-]+)", path):
            return f"https://drive.google.com/uc?export=download&id={match[1]}"
        case "drive.google.com" if path == "/open" and (file_id := parse_qs(parts.query).get("id")):
            return f"https://drive.google.com/uc?export=download&id={quote(file_id[0])}"
        case "www.dropbox.com" | "dropbox.com" if "dl=0" in parts.query.split("&"):
            query = "&".join("dl=1" if item == "dl=0" else item for item in parts.query.split("&"))
            return parts._replace(query=query).geturl()
        case "github.com" if match := re.match(r"(/[^/]+/[^/]+)/blob/(.+)", path):
            return parts._replace(path=f"{match[1]}/raw/{match[2]}", fragment="").geturl()
        case _ if match := re.match(r"(.+)/-/blob/(.+)", path):  # GitLab
            return parts._replace(path=f"{match[1]}/-/raw/{match[2]}", fragment="").geturl()
    return url


def inspect(file: Path, unpacked: Path, *, max_bytes: int, media_type: str) -> AttachmentContent:
    """Return what the file is. Unpack the only presentation of a ZIP archive to `unpacked`.

    Args:
        file: A file that is neither a PDF, a picture nor a presentation.
        unpacked: Path of a new file.
        max_bytes: Maximum size of the unpacked file.
        media_type: Media type in the response of the server.
    """
    if zipfile.is_zipfile(file):
        return _inspect_archive(file, unpacked, max_bytes)
    with file.open("rb") as opened:
        begin = opened.read(MAX_HTML_BYTES)
    if media_type in ("text/html", "application/xhtml+xml") or _HTML_START.match(begin):
        return _inspect_html(begin.decode(errors="replace"), media_type)
    if begin.startswith(_OLE_START) and _has_encrypted_package(file):
        return AttachmentContent("It is a presentation that is protected by a password.")
    return AttachmentContent(
        "The file is empty." if not begin else f"It is not a PDF ({media_type or 'unknown type'})."
    )


def _has_encrypted_package(file: Path) -> bool:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(_ENCRYPTED_PACKAGE) >= 0


def _inspect_archive(file: Path, unpacked: Path, max_bytes: int) -> AttachmentContent:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist()[:MAX_PARTS] if _is_presentation(entry)]
            if len(entries) != 1:
                names = ", ".join(_get_name(entry) for entry in entries[:5])
                found = f"{len(entries)} presentations ({names})" if entries else "no presentation"
                return AttachmentContent(f"It is a ZIP archive that contains {found}, not a PDF.")
            with archive.open(entries[0]) as source, unpacked.open("wb") as target:
                while chunk := source.read(_CHUNK_BYTES):  # the size in the header is not trusted
                    if target.tell() + len(chunk) > max_bytes:
                        limit = format_bytes(max_bytes)
                        return AttachmentContent(f"The presentation in the ZIP archive is larger than {limit}.")
                    target.write(chunk)
            return AttachmentContent(unpacked_suffix=PurePosixPath(entries[0].filename).suffix.lower())
    except RuntimeError:  # raised by zipfile for encrypted files
        return AttachmentContent("It is a ZIP archive that is protected by a password.")
    except (*DAMAGE_ERRORS, OSError):
        return AttachmentContent("It is a damaged ZIP archive.")


def _get_name(entry: zipfile.ZipInfo) -> str:
    return clean_line(PurePosixPath(entry.filename).name)[:_MAX_NAME_CHARACTERS]


def _is_presentation(entry: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(entry.filename)
    is_visible = not path.name.startswith(".") and "__MACOSX" not in path.parts
    return not entry.is_dir() and is_visible and path.suffix.lower() in (".pdf", *SIGNATURES)


def _inspect_html(text: str, media_type: str) -> AttachmentContent:
    for name, pattern in _HTML_DECKS.items():
        if pattern.search(text):
            texts = [*islice(_read_html_slides(text), MAX_SLIDES)] if name == "reveal.js" else []
            return AttachmentContent(f"It is an HTML presentation ({name}), not a PDF.", texts)
    is_login = _PASSWORD_FIELD.search(text) or (len(text) < _MAX_LOGIN_CHARACTERS and _LOGIN.search(text))
    hint = " The web page asks to log in." if is_login else ""
    return AttachmentContent(f"It is not a PDF ({media_type or 'text/html'}).{hint}")


def _read_html_slides(text: str) -> Iterator[SlideText]:
    """Yield the texts of the slides of reveal.js: sections without sections in them."""
    number, remaining = 0, MAX_TOTAL_CHARACTERS
    try:
        root = html.document_fromstring(text)
    except (ValueError, html.etree.ParserError):
        return
    sections = [section for section in root.iter("section") if _is_shown(section)]
    for section in sections:
        for text, notes in _read_section(section):
            slide = SlideText(number=number + 1, text=text, notes=notes)
            if remaining > 0 and (slide.text or slide.notes):
                number += 1
                remaining -= len(slide.text) + len(slide.notes)
                yield slide


def _is_shown(section: Any) -> bool:
    """Return whether a section is a slide, and not a stack of slides or hidden."""
    is_hidden = any(part.get("data-visibility") == "hidden" for part in (section, *section.iterancestors("section")))
    return not is_hidden and section.find(".//section") is None


def _read_section(section: Any) -> Iterator[tuple[str, str]]:
    """Yield text and notes of the slides in a section. One with Markdown may contain several."""
    if section.get("data-markdown") == "":  # otherwise, it is the URL of another file
        for source in _MARKDOWN_SLIDE_END.split(textwrap.dedent(section.text_content())):
            text, *notes = _MARKDOWN_NOTES.split(source, maxsplit=1)
            yield _render_lines(text), _render_lines("".join(notes))
        return
    notes = [_extract_lines(note) for note in section.iter("aside") if "notes" in (note.get("class") or "").split()]
    for element in [*section.iter("aside", "script", "style")]:
        element.drop_tree()
    yield _extract_lines(section), "\n".join(notes)


def _render_lines(markdown: str) -> str:
    """Return the text of Markdown without markup, one line for each block."""
    rendered = COMMONMARK.render(markdown)
    return _extract_lines(html.fragment_fromstring(rendered, create_parent=True)) if rendered.strip() else ""


def _extract_lines(element: Any) -> str:
    """Return the text of an element, one line for each block in it."""
    for block in element.iter("p", "li", "h1", "h2", "h3", "h4", "h5", "h6", "br", "div", "tr", "pre", "blockquote"):
        block.tail = f"\n{block.tail or ''}"
        if block.tag != "br":
            block.text = f"\n{block.text or ''}"
    return clean_notes(element.text_content())
