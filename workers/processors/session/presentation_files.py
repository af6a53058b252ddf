"""Read presentation files as ZIP and XML: copy them without external references, and extract their text.

All sizes are limited. The XML parser resolves no entities, loads no DTD and opens no URLs. The sandbox protects files
and the network from LibreOffice. This module is the second line of defence.
"""

from __future__ import annotations

import base64
import gzip
import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
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
_DROPPED_ELEMENTS: Final = frozenset(
    {
        *("plugin", "applet", "floating-frame", "scripts", "script", "event-listeners", "event-listener", "forms"),
        *("dde-source", "dde-connection", "dde-connection-decl", "dde-connection-decls", "include", "foreignObject"),
        *("linked-stylesheet", "externalData", "section-source", "auto-reload", "template", "iframe", "handler"),
    }
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
_ANIMATIONS: Final = frozenset({"animate", "set"})
_URL_IN_STYLE: Final = re.compile(
    r"(?i)url\s*\(\s*['\"]?\s*(?!#|data:image/(?:png|jpe?g|gif);)|@import|expression\s*\("
)


class InvalidPresentation(Exception):
    """The file is not used. The message continues the sentence "It …"."""


class SlideText(BaseModel):
    """The text of a slide, title first, and of its speaker notes."""

    number: int
    text: str
    notes: str = ""


@dataclass(slots=True)
class _Budget:
    left: int = field(default_factory=lambda: MAX_TOTAL_BYTES)
    parts: int = field(default_factory=lambda: MAX_PARTS)

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise InvalidPresentation(f"is larger than {MAX_TOTAL_BYTES // 2**20} MiB after decompression")


# Copying without external references ------------------------------------------------------------------------------


def sanitize_presentation(source: Path, target: Path) -> None:
    """Write a copy of a presentation without external references and scripts.

    Files that are neither ZIP nor XML (`.ppt`) are copied unchanged.

    Raises:
        InvalidPresentation: The file is damaged or too large after decompression.
    """
    with source.open("rb") as file:
        begin = file.read(64)
    try:
        if begin.startswith(b"PK"):
            with target.open("wb") as copy:
                _clean_package(source.open("rb"), copy, _Budget(), depth=0)
        elif _looks_like_xml(begin):
            if source.stat().st_size > MAX_XML_BYTES:
                raise InvalidPresentation(f"is an XML file of more than {MAX_XML_BYTES // 2**20} MiB")
            target.write_bytes(_clean_xml(source.read_bytes(), names=None))
        else:
            target.write_bytes(source.read_bytes())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        raise InvalidPresentation("is damaged") from error
    except RuntimeError as error:  # raised by zipfile for encrypted parts
        raise InvalidPresentation("is protected by a password") from error


def _clean_package(source: Any, target: Any, budget: _Budget, *, depth: int) -> None:
    with source, zipfile.ZipFile(source) as package, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        entries = {entry.filename: entry for entry in package.infolist() if not entry.is_dir()}
        budget.parts -= len(entries)
        if budget.parts < 0:
            raise InvalidPresentation(f"contains more than {MAX_PARTS} parts")
        names = frozenset(entries)
        for name, entry in entries.items():
            if _DROPPED_PARTS.search(name) or name.startswith("/") or ".." in name.split("/"):
                continue
            content = _read_part(package, entry, budget)
            cleaned = _clean_part(name, content, names, budget, depth=depth)
            if cleaned is not None:
                # ODF 1.2, part 3, 3.3: `mimetype` is the first entry and is not compressed.
                compression = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
                copy.writestr(zipfile.ZipInfo(name), cleaned, compression)


def _read_part(package: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: _Budget) -> bytes:
    """Return a decompressed part. The size in its header is not trusted."""
    with package.open(entry) as file:
        content = file.read(min(MAX_PART_BYTES, budget.left) + 1)
    if len(content) > MAX_PART_BYTES:
        raise InvalidPresentation(f"contains a part of more than {MAX_PART_BYTES // 2**20} MiB")
    budget.spend(len(content))
    return content


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
        cleaned = _clean_part(name.removesuffix(".gz"), _gunzip(content, budget), names, budget, depth=depth + 1)
        return None if cleaned is None or depth >= _MAX_DEPTH else gzip.compress(cleaned)
    is_xml = _looks_like_xml(content) or name.lower().endswith(_XML_NAMES)
    if not is_xml or not content:
        return content
    if len(content) > MAX_XML_BYTES:
        raise InvalidPresentation(f"contains an XML part of more than {MAX_XML_BYTES // 2**20} MiB")
    try:
        return _clean_xml(content, names=names, folder=posixpath.dirname(name))
    except etree.XMLSyntaxError:
        return None


def _gunzip(content: bytes, budget: _Budget) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        data = file.read(MAX_XML_BYTES + 1)
    budget.spend(len(data))
    if len(data) > MAX_XML_BYTES:
        raise InvalidPresentation(f"contains a compressed part of more than {MAX_XML_BYTES // 2**20} MiB")
    return data


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
        InvalidPresentation: A document that is not in a package is not valid XML.
    """
    try:
        root = parse_xml(content)
    except etree.XMLSyntaxError as error:
        if names is not None:
            raise
        raise InvalidPresentation("is damaged") from error
    for element in [*root.iter()]:
        if not isinstance(element.tag, str):
            if element.getparent() is not None and element.tag is not etree.Comment:
                _remove(element)
            continue
        name = etree.QName(element).localname
        if (name in _DROPPED_ELEMENTS and element is not root) or (name == "style" and _has_external_style(element)):
            _remove(element)
        elif name == "Relationship":
            _clean_relationship(element, names or frozenset(), folder)
        elif name == "binary-data":
            _clean_embedded(element)
        else:
            _clean_attributes(element, name, names, folder)
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", standalone=True))


def _remove(element: Any) -> None:
    parent = element.getparent()
    if parent is None:
        return
    if element.tail and element.tail.strip():
        before = element.getprevious()
        if before is not None:
            before.tail = (before.tail or "") + element.tail
        else:
            parent.text = (parent.text or "") + element.tail
    parent.remove(element)


def _has_external_style(element: Any) -> bool:
    return bool(_URL_IN_STYLE.search("".join(element.itertext())))


def _clean_relationship(element: Any, names: frozenset[str], folder: str) -> None:
    """Remove a relationship to a target outside the package unless it is a hyperlink (OOXML part 2, 9.3)."""
    target = element.get("Target", "")
    if element.get("TargetMode", "").strip().lower() == "external" or _SCHEME.match(target) or "\\" in target:
        is_link = element.get("Type", "").endswith("/hyperlink") and _LINK.match(target.strip())
        if not is_link:
            _remove(element)
        return
    base = posixpath.dirname(folder) if folder.endswith("_rels") else folder  # the folder of the source part
    path = unquote(target.partition("#")[0])
    joined = posixpath.normpath(path.lstrip("/") if path.startswith("/") else posixpath.join(base, path))
    if path and joined not in names:
        _remove(element)


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
    path = posixpath.normpath(posixpath.join(folder, unquote(target.partition("#")[0])))
    inside = names is not None and any(part == path or part.startswith(path + "/") for part in names)
    return bool(_SCHEME.match(target)) or target.startswith("/") or "\\" in target or not inside


def _clean_embedded(element: Any) -> None:
    """Clean an image that a flat OpenDocument file contains as base64."""
    content, cleaned = b"", None
    try:
        content = base64.b64decode("".join((element.text or "").split()), validate=True)
        cleaned = _clean_part("", content, frozenset(), _Budget(), depth=_MAX_DEPTH)
    except (ValueError, zlib.error, OSError, EOFError, InvalidPresentation):
        pass
    if cleaned is None:
        _remove(element)
    elif cleaned != content:
        element.text = base64.b64encode(cleaned).decode()


# Text extraction ----------------------------------------------------------------------------------------------------


def extract_slide_texts(source: Path) -> list[SlideText]:
    """Return the text of each slide of a PowerPoint or OpenDocument file, or an empty list if it cannot be read."""
    try:
        with source.open("rb") as file:
            begin = file.read(64)
        if _looks_like_xml(begin) and source.stat().st_size <= MAX_XML_BYTES:
            return [*_read_opendocument(parse_xml(source.read_bytes()))]
        with zipfile.ZipFile(source) as package:
            names = {entry.filename: entry for entry in package.infolist()[:MAX_PARTS]}
            budget = _Budget()
            if "ppt/presentation.xml" in names:
                return [*_read_powerpoint(package, names, budget)]
            if "content.xml" in names:
                return [*_read_opendocument(_parse_part(package, names, "content.xml", budget))]
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, InvalidPresentation):
        pass
    except (zipfile.BadZipFile, zlib.error, etree.XMLSyntaxError):
        pass
    return []


def _parse_part(package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], name: str, budget: _Budget) -> Any:
    if names[name].file_size > MAX_XML_BYTES:
        raise InvalidPresentation("contains an XML part that is too large")
    return parse_xml(_read_part(package, names[name], budget))


def _read_powerpoint(
    package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], budget: _Budget
) -> Iterator[SlideText]:
    root = _parse_part(package, names, "ppt/presentation.xml", budget)
    slides = _read_relationships(package, names, "ppt/presentation.xml", budget)
    identifiers = [
        value for element in root.iter("{*}sldId") for key, value in element.attrib.items() if key.endswith("}id")
    ]
    paths = [slides[identifier][1] for identifier in identifiers if identifier in slides]
    for number, path in enumerate(paths[:MAX_SLIDES], 1):
        if path not in names:
            continue
        text = _extract_drawing_text(_parse_part(package, names, path, budget))
        relationships = _read_relationships(package, names, path, budget).values()
        notes_path = next(
            (target for kind, target in relationships if kind.endswith("/notesSlide") and target in names), None
        )
        notes_text = (
            _extract_drawing_text(_parse_part(package, names, notes_path, budget), notes=True) if notes_path else ""
        )
        yield SlideText(number=number, text=text, notes=notes_text)


def _read_relationships(
    package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], path: str, budget: _Budget
) -> dict[str, tuple[str, str]]:
    """Return the type and target part of each relationship of a part, by its ID."""
    folder, name = posixpath.split(path)
    file = f"{folder}/_rels/{name}.rels"
    if file not in names:
        return {}
    relationships = {}
    for element in _parse_part(package, names, file, budget).iter("{*}Relationship"):
        target = element.get("Target", "")
        joined = target.lstrip("/") if target.startswith("/") else posixpath.normpath(posixpath.join(folder, target))
        relationships[element.get("Id", "")] = (element.get("Type", ""), joined)
    return relationships


def _extract_drawing_text(root: Any, *, notes: bool = False) -> str:
    """Return the paragraphs of a slide, title first. For a notes page return only the notes."""
    titles: list[str] = []
    other_lines: list[str] = []
    for shape in root.iter("{*}sp"):
        kind = next((place.get("type", "body") for place in shape.iter("{*}ph")), "")
        lines = ["".join(t.text or "" for t in paragraph.iter("{*}t")) for paragraph in shape.iter("{*}p")]
        if not notes or kind == "body":
            (titles if kind in ("title", "ctrTitle") else other_lines).extend(lines)
    if not notes:
        for frame in root.iter("{*}graphicFrame"):
            other_lines += ["".join(t.text or "" for t in p.iter("{*}t")) for p in frame.iter("{*}p")]
    return _normalize_lines([*titles, *other_lines])


def _read_opendocument(root: Any) -> Iterator[SlideText]:
    for number, page in enumerate(root.iter("{urn:oasis:names:tc:opendocument:xmlns:drawing:1.0}page"), 1):
        if number > MAX_SLIDES:
            return
        notes = [*page.iter("{urn:oasis:names:tc:opendocument:xmlns:presentation:1.0}notes")]
        notes_lines = [line for note in notes for line in _extract_paragraphs(note)]
        for note in notes:
            _remove(note)
        yield SlideText(
            number=number, text=_normalize_lines(_extract_paragraphs(page)), notes=_normalize_lines(notes_lines)
        )


def _extract_paragraphs(element: Any) -> list[str]:
    tags = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}p", "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}h"
    return ["".join(paragraph.itertext()) for paragraph in element.iter(*tags)]


def _normalize_lines(lines: list[str]) -> str:
    return "\n".join(text for line in lines if (text := " ".join(line.split())))[:MAX_SLIDE_TEXT_CHARACTERS]
