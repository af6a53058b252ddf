"""Read presentation files as ZIP and XML: copy them without external references, and extract their text.

All sizes are limited. The XML parser resolves no entities, loads no DTD and opens no URLs. The sandbox protects files
and the network from LibreOffice. This module is the second line of defence.
"""

from __future__ import annotations

import base64
import gzip
import io
import lzma
import posixpath
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import unquote

from lxml import etree  # type: ignore[import-untyped]  # it ships no types
from pydantic import BaseModel

MAX_PARTS: Final = 10_000
MAX_PART_BYTES: Final = 256 * 1024 * 1024
MAX_XML_BYTES: Final = 64 * 1024 * 1024
MAX_TOTAL_BYTES: Final = 1024 * 1024 * 1024
MAX_SLIDES: Final = 1000
MAX_SLIDE_TEXT_CHARACTERS: Final = 4000
_MAX_DEPTH: Final = 2

TEXT_SUFFIXES: Final = frozenset({".pptx", ".ppsx", ".odp", ".fodp"})
"""Suffixes of the files that `extract_slide_texts` can read."""
_XML_NAMES: Final = (".xml", ".rels", ".vml", ".svg", ".fodp", ".rdf")
_LINK: Final = re.compile(r"(?i)^(https?://|mailto:)[^\s]+$")
_SCHEME: Final = re.compile(r"(?i)^[a-z][a-z0-9+.-]*:")
_DROPPED_ELEMENTS: Final = (
    *("{*}plugin", "{*}applet", "{*}floating-frame", "{*}scripts", "{*}script", "{*}event-listeners"),
    *("{*}event-listener", "{*}forms", "{*}dde-source", "{*}dde-connection", "{*}dde-connection-decl"),
    *("{*}dde-connection-decls", "{*}include", "{*}foreignObject", "{*}linked-stylesheet", "{*}externalData"),
    *("{*}section-source", "{*}auto-reload", "{*}template", "{*}iframe", "{*}handler"),
)
_LINK_ELEMENTS: Final = frozenset({"a", "hyperlink", "click"})
"""Elements whose URL is opened only by a click of the reader."""
_DROPPED_PARTS: Final = re.compile(
    r"(?i)(^|/)(vbaProject[^/]*|activeX/.*|ctrlProps/.*|Basic/.*|Scripts/.*|Dialogs/.*|macros/.*|[^/]*\.(bin|ole|exe|js))$"
)
_REFERENCES: Final = frozenset({"href", "src", "link", "embed-href", "url", "base"})
_XML_START: Final = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\x00]*<")
"""UTF-8 or UTF-16, with white space before the first element. LibreOffice detects an SVG image after it, too."""
_EXTERNAL_REFERENCE: Final = re.compile(
    r"(?i)\b(?:file:/|ftps?:/|smb:/|webdavs?:/|vnd\.sun\.star\.)|^\s*\\\\|\bWEBSERVICE\s*\("
)
"""Forbidden in all attributes: URLs of files and servers, including those in lists and formulas."""
_PLACEHOLDERS: Final = frozenset({"page-number", "header", "footer", "date-time"})
_ANIMATIONS: Final = frozenset({"animate", "set"})
_URL_IN_STYLE: Final = re.compile(
    r"(?i)url\s*\(\s*['\"]?\s*(?!#|data:image/(?:png|jpe?g|gif);)|@import|expression\s*\("
)
DAMAGE_ERRORS: Final = (
    *(zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, etree.XMLSyntaxError),
    *(lzma.LZMAError, NotImplementedError, EOFError, ValueError),
)
"""What damaged ZIP, gzip and XML files raise."""


class UnusablePresentation(Exception):
    """The presentation is damaged, too large or cannot be converted. The message continues the sentence "It …"."""


class SlideText(BaseModel):
    """The text of a slide, title first, and of its speaker notes."""

    number: int
    text: str
    notes: str = ""


@dataclass(slots=True)
class _Budget:
    """How many bytes and parts may still be read from a presentation, including the packages in it."""

    remaining_bytes: int = field(default_factory=lambda: MAX_TOTAL_BYTES)
    remaining_parts: int = field(default_factory=lambda: MAX_PARTS)

    def read(self, file: IO[bytes] | gzip.GzipFile, max_bytes: int) -> bytes:
        """Decompress a file of at most `max_bytes`. The size in its header is not trusted."""
        content = file.read(min(max_bytes, self.remaining_bytes) + 1)
        if len(content) > max_bytes:
            raise UnusablePresentation(f"contains a part of more than {max_bytes // 2**20} MiB")
        self.remaining_bytes -= len(content)
        if self.remaining_bytes < 0:
            raise UnusablePresentation(f"is larger than {MAX_TOTAL_BYTES // 2**20} MiB after decompression")
        return content


# Copying without external references ------------------------------------------------------------------------------


def sanitize_presentation(source: Path, target: Path) -> None:
    """Write a copy of a presentation without external references and scripts.

    Files that are neither ZIP nor XML (`.ppt`) are copied unchanged.

    Raises:
        UnusablePresentation: The file is damaged or too large after decompression.
    """
    try:
        with source.open("rb") as file, target.open("wb") as copy:
            begin = file.read(64)
            file.seek(0)
            if begin.startswith(b"PK"):
                _clean_package(file, copy, _Budget(), depth=0)
            elif _looks_like_xml(begin):
                if source.stat().st_size > MAX_XML_BYTES:
                    raise UnusablePresentation(f"is an XML file of more than {MAX_XML_BYTES // 2**20} MiB")
                copy.write(_clean_xml(file.read(), names=None))
            else:
                shutil.copyfileobj(file, copy)
    except DAMAGE_ERRORS as error:
        raise UnusablePresentation("is damaged") from error
    except RuntimeError as error:  # raised by zipfile for encrypted parts
        raise UnusablePresentation("is protected by a password") from error


def _clean_package(source: IO[bytes], target: IO[bytes], budget: _Budget, *, depth: int) -> None:
    with zipfile.ZipFile(source) as package, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        entries = {entry.filename: entry for entry in package.infolist() if not entry.is_dir()}
        budget.remaining_parts -= len(entries)
        if budget.remaining_parts < 0:
            raise UnusablePresentation(f"contains more than {MAX_PARTS} parts")
        names = frozenset(entries)
        for name, entry in entries.items():
            if _DROPPED_PARTS.search(name) or name.startswith("/") or ".." in name.split("/"):
                continue
            with package.open(entry) as part:
                content = budget.read(part, MAX_PART_BYTES)
            cleaned = _clean_part(name, content, names, budget, depth=depth)
            if cleaned is not None:
                # ODF 1.2, part 3, 3.3: `mimetype` is the first entry and is not compressed.
                compression = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
                copy.writestr(zipfile.ZipInfo(name), cleaned, compression)


def _clean_part(name: str, content: bytes, names: frozenset[str], budget: _Budget, *, depth: int) -> bytes | None:
    """Return the cleaned part, or None if it must be removed."""
    if content.startswith(b"PK\x03\x04"):
        if depth >= _MAX_DEPTH:
            return None
        inner = io.BytesIO()
        _clean_package(io.BytesIO(content), inner, budget, depth=depth + 1)
        return inner.getvalue()
    if content.startswith(b"\xd0\xcf\x11\xe0"):  # an embedded OLE object; its image is another part
        return None
    if content.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            inner_content = budget.read(file, MAX_XML_BYTES)
        cleaned = _clean_part(name.removesuffix(".gz"), inner_content, names, budget, depth=depth + 1)
        return None if cleaned is None or depth >= _MAX_DEPTH else gzip.compress(cleaned)
    is_xml = _looks_like_xml(content) or name.lower().endswith(_XML_NAMES)
    if not is_xml or not content:
        return content
    if len(content) > MAX_XML_BYTES:
        raise UnusablePresentation(f"contains an XML part of more than {MAX_XML_BYTES // 2**20} MiB")
    try:
        return _clean_xml(content, names=names, folder=posixpath.dirname(name))
    except etree.XMLSyntaxError:
        return None


def _looks_like_xml(begin: bytes) -> bool:
    return _XML_START.match(begin) is not None


def parse_xml(content: bytes) -> Any:
    """Return the root of an XML document. Entities are not resolved, no DTD is loaded, no URL is opened.

    Raises:
        lxml.etree.XMLSyntaxError: The content is not valid XML.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False)
    return etree.fromstring(content, parser)


def _clean_xml(content: bytes, *, names: frozenset[str] | None, folder: str = "") -> bytes:
    """Return the XML document without external references, document type and processing instructions (style sheets).

    Args:
        content: The document.
        names: The parts of its package. None for a document that is not in a package.
        folder: The folder of the document in the package.

    Raises:
        lxml.etree.XMLSyntaxError: The content is not valid XML.
    """
    root = parse_xml(content)
    etree.strip_elements(root, etree.ProcessingInstruction, etree.Entity, *_DROPPED_ELEMENTS, with_tail=False)
    for element in [*root.iter("*")]:
        name = etree.QName(element).localname
        if name == "style" and _URL_IN_STYLE.search("".join(element.itertext())):
            _remove(element)
        elif name == "Relationship":
            _clean_relationship(element, names or frozenset(), folder)
        elif name == "binary-data":
            _clean_embedded(element)
        else:
            _clean_attributes(element, name, names, folder)
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", standalone=True))


def _remove(element: Any) -> None:
    """Remove an element with the text after it, which is white space in all formats."""
    if (parent := element.getparent()) is not None:
        parent.remove(element)


def _clean_relationship(element: Any, names: frozenset[str], folder: str) -> None:
    """Remove a relationship to a target outside the package unless it is a hyperlink (OOXML part 2, 9.3)."""
    target = element.get("Target", "")
    if element.get("TargetMode", "").strip().lower() == "external" or _SCHEME.match(target) or "\\" in target:
        is_link = element.get("Type", "").endswith("/hyperlink") and _LINK.match(target.strip())
        if not is_link:
            _remove(element)
        return
    base = posixpath.dirname(folder) if folder.endswith("_rels") else folder  # the folder of the source part
    if target.partition("#")[0] and _resolve_reference(target, base) not in names:
        _remove(element)


def _resolve_reference(reference: str, folder: str) -> str:
    """Return the part of the package to which a reference from a part in `folder` points."""
    path = unquote(reference.partition("#")[0])
    return posixpath.normpath(path.lstrip("/") if path.startswith("/") else posixpath.join(folder, path))


def _clean_attributes(element: Any, name: str, names: frozenset[str] | None, folder: str) -> None:
    for key, value in element.attrib.items():
        attribute = etree.QName(key).localname
        if (
            (attribute in _REFERENCES and _is_external(value, name, names, folder))
            or _URL_IN_STYLE.search(value)
            or _EXTERNAL_REFERENCE.search(value)
            or (attribute.startswith("on") and attribute.islower() and "}" not in key)
            or (name in _ANIMATIONS and attribute == "attributeName" and value.rpartition(":")[2] in _REFERENCES)
        ):
            del element.attrib[key]


def _is_external(reference: str, element: str, names: frozenset[str] | None, folder: str) -> bool:
    target = reference.strip()
    if not target or target.startswith("#") or re.match(r"(?i)data:image/(png|jpe?g|gif);", target):
        return False
    if element in _LINK_ELEMENTS and _LINK.match(target):
        return False
    path = _resolve_reference(target, folder)
    inside = names is not None and any(part == path or part.startswith(path + "/") for part in names)
    return bool(_SCHEME.match(target)) or target.startswith("/") or "\\" in target or not inside


def _clean_embedded(element: Any) -> None:
    """Clean an image that a flat OpenDocument file contains as base64."""
    cleaned = None
    with suppress(*DAMAGE_ERRORS, OSError, UnusablePresentation):
        content = base64.b64decode("".join((element.text or "").split()), validate=True)
        cleaned = _clean_part("", content, frozenset(), _Budget(), depth=_MAX_DEPTH)
    if cleaned is None:
        _remove(element)
    else:
        element.text = base64.b64encode(cleaned).decode()


# Text extraction ----------------------------------------------------------------------------------------------------


def extract_slide_texts(source: Path) -> list[SlideText]:
    """Return the text of each slide of a PowerPoint or OpenDocument file, or an empty list if it cannot be read."""
    return read_slide_texts(source) or []


def read_slide_texts(source: Path) -> list[SlideText] | None:
    """Return the text of each visible slide of a PowerPoint or OpenDocument file, or None if it cannot be read.

    Hidden slides are neither shown in a talk nor converted by LibreOffice.
    """
    with suppress(*DAMAGE_ERRORS, OSError, RuntimeError, UnusablePresentation), source.open("rb") as file:
        if _looks_like_xml(file.read(64)) and source.stat().st_size <= MAX_XML_BYTES:
            return [*_read_opendocument(parse_xml(source.read_bytes()))]
        with zipfile.ZipFile(file) as package:
            parts = _Parts(package)
            if (presentation := parts.parse("ppt/presentation.xml")) is not None:
                return [*_read_powerpoint(presentation, parts)]
            if (content := parts.parse("content.xml")) is not None:
                return [*_read_opendocument(content)]
    return None


class _Parts:
    """The XML parts of a package."""

    def __init__(self, package: zipfile.ZipFile) -> None:
        self._package = package
        self._entries = {entry.filename: entry for entry in package.infolist()[:MAX_PARTS]}
        self._budget = _Budget()

    def parse(self, name: str) -> Any | None:
        """Return the root of a part, or None if the package does not contain it."""
        if name not in self._entries:
            return None
        with self._package.open(self._entries[name]) as file:
            return parse_xml(self._budget.read(file, MAX_XML_BYTES))

    def read_relationships(self, path: str) -> dict[str, tuple[str, str]]:
        """Return the type and target part of each relationship of a part, by its ID."""
        folder, name = posixpath.split(path)
        root = self.parse(f"{folder}/_rels/{name}.rels")
        return {
            element.get("Id", ""): (element.get("Type", ""), _resolve_reference(element.get("Target", ""), folder))
            for element in ([] if root is None else root.iter("{*}Relationship"))
        }


def _read_powerpoint(presentation: Any, parts: _Parts) -> Iterator[SlideText]:
    slides = parts.read_relationships("ppt/presentation.xml")
    identifiers = [
        value
        for element in presentation.iter("{*}sldId")
        for key, value in element.attrib.items()
        if key.endswith("}id")
    ]
    paths = [slides[identifier][1] for identifier in identifiers if identifier in slides]
    number = 0
    for path in paths[:MAX_SLIDES]:
        if (slide := parts.parse(path)) is None or slide.get("show") in ("0", "false"):
            continue
        number += 1
        relationships = parts.read_relationships(path).values()
        notes_pages = (parts.parse(target) for kind, target in relationships if kind.endswith("/notesSlide"))
        notes = (_extract_drawing_text(page, is_notes_page=True) for page in notes_pages if page is not None)
        yield SlideText(number=number, text=_extract_drawing_text(slide), notes=next(notes, ""))


def _extract_drawing_text(root: Any, *, is_notes_page: bool = False) -> str:
    """Return the paragraphs of a slide, title first. For a notes page return only the notes."""
    titles: list[str] = []
    other_lines: list[str] = []
    for shape in [*root.iter("{*}sp"), *(() if is_notes_page else root.iter("{*}graphicFrame"))]:
        kind = next((place.get("type", "body") for place in shape.iter("{*}ph")), "")
        lines = [
            " | ".join(_join_runs(part) for part in row.iter("{*}tc")) if is_row else _join_runs(row)
            for row, is_row in _iterate_lines(shape, "{*}tr", "{*}p")
        ]
        if not is_notes_page or kind in ("", "body", "obj"):  # not the slide, its number, header, footer and date
            (titles if kind in ("title", "ctrTitle") else other_lines).extend(lines)
    return _normalize_lines([*titles, *other_lines])


def _join_runs(element: Any) -> str:
    paragraphs = ("".join(run.text or "" for run in paragraph.iter("{*}t")) for paragraph in element.iter("{*}p"))
    return " ".join(paragraphs)


def _iterate_lines(element: Any, row: str, *paragraphs: str) -> Iterator[tuple[Any, bool]]:
    """Yield the rows of tables, and the paragraphs outside of tables. The second value says which it is."""
    for part in element.iter(row, *paragraphs):
        if next(part.iterancestors(row), None) is None:
            yield part, etree.QName(part).localname == row.removeprefix("{*}")


def _read_opendocument(root: Any) -> Iterator[SlideText]:
    hidden_styles = _find_hidden_styles(root)
    pages = (page for page in root.iter("{*}page") if _get_attribute(page, "style-name") not in hidden_styles)
    for number, page in enumerate(islice(pages, MAX_SLIDES), 1):
        _remove_placeholders(page)
        notes = _normalize_lines([line for note in page.iter("{*}notes") for line in _extract_paragraphs(note)])
        etree.strip_elements(page, "{*}notes", with_tail=False)
        yield SlideText(number=number, text=_normalize_lines(_extract_paragraphs(page)), notes=notes)


def _find_hidden_styles(root: Any) -> set[str | None]:
    """Return the names of the page styles that hide a slide."""
    return {
        _get_attribute(style, "name")
        for style in root.iter("{*}style")
        for properties in style.iter("{*}drawing-page-properties")
        if _get_attribute(properties, "visibility") == "hidden"
    }


def _get_attribute(element: Any, name: str) -> str | None:
    """Return the value of an attribute in any namespace."""
    return next((value for key, value in element.attrib.items() if etree.QName(key).localname == name), None)


def _remove_placeholders(page: Any) -> None:
    """Remove page numbers, headers, footers and dates of a page and its notes."""
    for frame in [*page.iter("{*}frame", "{*}custom-shape")]:
        if _get_attribute(frame, "class") in _PLACEHOLDERS:
            _remove(frame)


def _extract_paragraphs(element: Any) -> list[str]:
    return [
        " | ".join("".join(cell.itertext()) for cell in part.iter("{*}table-cell"))
        if is_row
        else "".join(part.itertext())
        for part, is_row in _iterate_lines(element, "{*}table-row", "{*}p", "{*}h")
    ]


def _normalize_lines(lines: list[str]) -> str:
    return "\n".join(text for line in lines if (text := " ".join(line.split())))[:MAX_SLIDE_TEXT_CHARACTERS]
