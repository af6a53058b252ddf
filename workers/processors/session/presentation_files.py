"""session: presentation files as ZIP and XML: a copy without anything that leads out of it, and the words in it.

Everything is bounded and read with an XML parser that resolves no entities, loads no DTD and opens no addresses. The
sandbox is what keeps LibreOffice from files and the network; this is the second line.
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
MAX_SLIDE_TEXT: Final = 4000
_MAX_DEPTH: Final = 2

TEXT_SUFFIXES: Final = frozenset({".pptx", ".ppsx", ".odp", ".fodp"})
"""Kinds of files that `words` can read."""
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
"""Elements whose address is followed by a reader's click, if at all."""
_DROPPED_PARTS: Final = re.compile(
    r"(?i)(^|/)(vbaProject[^/]*|activeX/.*|ctrlProps/.*|Basic/.*|Scripts/.*|Dialogs/.*|macros/.*|[^/]*\.(bin|ole|exe|js))$"
)
_REFERENCES: Final = frozenset({"href", "src", "link", "embed-href", "url", "base"})
_BEGIN_OF_XML: Final = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\x00]*<")
"""UTF-8 or UTF-16, with blanks before the first element: LibreOffice finds an SVG image behind many of them, too."""
_OUTSIDE: Final = re.compile(r"(?i)\b(?:file:/|ftps?:/|smb:/|webdavs?:/|vnd\.sun\.star\.)|^\s*\\\\|\bWEBSERVICE\s*\(")
"""What no attribute may hold, whatever its name: addresses of files and servers, also in lists and formulas."""
_ANIMATIONS: Final = frozenset({"animate", "set"})
_URL_IN_STYLE: Final = re.compile(
    r"(?i)url\s*\(\s*['\"]?\s*(?!#|data:image/(?:png|jpe?g|gif);)|@import|expression\s*\("
)


class InvalidPresentation(Exception):
    """Why the file is not used, as the rest of a sentence that begins with "it"."""


class SlideText(BaseModel):
    """The words on a slide, its title first, and those of its speaker notes."""

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
            raise InvalidPresentation(f"unpacks to more than {MAX_TOTAL_BYTES // 2**20} MiB")


# A copy without references --------------------------------------------------------------------------------------


def sanitize_presentation(source: Path, target: Path) -> None:
    """Write a copy of a presentation that refers to nothing outside of it and holds no scripts.

    Files that are neither ZIP nor XML (`.ppt`) are copied as they are.

    Raises:
        UnusableDeck: it is damaged, or unpacks to too much.
    """
    with source.open("rb") as file:
        begin = file.read(64)
    try:
        if begin.startswith(b"PK"):
            with target.open("wb") as made:
                _clean_package(source.open("rb"), made, _Budget(), depth=0)
        elif _looks_like_xml(begin):
            if source.stat().st_size > MAX_XML_BYTES:
                raise InvalidPresentation(f"is a text file of more than {MAX_XML_BYTES // 2**20} MiB")
            target.write_bytes(_clean_xml(source.read_bytes(), names=None))
        else:
            target.write_bytes(source.read_bytes())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError) as error:
        raise InvalidPresentation("is damaged") from error
    except RuntimeError as error:  # zipfile, of encrypted parts
        raise InvalidPresentation("is protected by a password") from error


def _clean_package(source: Any, target: Any, budget: _Budget, *, depth: int) -> None:
    with source, zipfile.ZipFile(source) as package, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        entries = {entry.filename: entry for entry in package.infolist() if not entry.is_dir()}
        budget.parts -= len(entries)
        if budget.parts < 0:
            raise InvalidPresentation(f"holds more than {MAX_PARTS} parts")
        names = frozenset(entries)
        for name, entry in entries.items():
            if _DROPPED_PARTS.search(name) or name.startswith("/") or ".." in name.split("/"):
                continue
            content = _part(package, entry, budget)
            cleaned = _clean_part(name, content, names, budget, depth=depth)
            if cleaned is not None:
                # ODF 1.2, part 3, 3.3: `mimetype` is stored as it is, and comes first, as it did.
                stored = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
                made.writestr(zipfile.ZipInfo(name), cleaned, stored)


def _part(package: zipfile.ZipFile, entry: zipfile.ZipInfo, budget: _Budget) -> bytes:
    """Return an unpacked part. What its header says about its size is not believed."""
    with package.open(entry) as file:
        content = file.read(min(MAX_PART_BYTES, budget.left) + 1)
    if len(content) > MAX_PART_BYTES:
        raise InvalidPresentation(f"holds a part of more than {MAX_PART_BYTES // 2**20} MiB")
    budget.spend(len(content))
    return content


def _clean_part(name: str, content: bytes, names: frozenset[str], budget: _Budget, *, depth: int) -> bytes | None:
    """Return a part as it may stay; None if it may not."""
    if content.startswith(b"PK\x03\x04"):
        if depth >= _MAX_DEPTH:
            return None
        inner = io.BytesIO()
        _clean_package(io.BytesIO(content), inner, budget, depth=depth + 1)
        return inner.getvalue()
    if content.startswith(b"\xd0\xcf\x11\xe0"):  # an embedded object of the old kind; its picture is another part
        return None
    if content.startswith(b"\x1f\x8b"):
        unpacked = _clean_part(name.removesuffix(".gz"), _gunzipped(content, budget), names, budget, depth=depth + 1)
        return None if unpacked is None or depth >= _MAX_DEPTH else gzip.compress(unpacked)
    is_xml = _looks_like_xml(content) or name.lower().endswith(_XML_NAMES)
    if not is_xml or not content:
        return content
    if len(content) > MAX_XML_BYTES:
        raise InvalidPresentation(f"holds a text part of more than {MAX_XML_BYTES // 2**20} MiB")
    try:
        return _clean_xml(content, names=names, folder=posixpath.dirname(name))
    except etree.XMLSyntaxError:
        return None


def _gunzipped(content: bytes, budget: _Budget) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(MAX_XML_BYTES + 1)
    budget.spend(len(unpacked))
    if len(unpacked) > MAX_XML_BYTES:
        raise InvalidPresentation(f"holds a compressed part of more than {MAX_XML_BYTES // 2**20} MiB")
    return unpacked


def _looks_like_xml(begin: bytes) -> bool:
    return _BEGIN_OF_XML.match(begin) is not None


def parse_xml(content: bytes) -> Any:
    """Return the root of an XML document. Entities are not resolved, no DTD is loaded, no address opened.

    Raises:
        lxml.etree.XMLSyntaxError: it is none.
    """
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False)
    return etree.fromstring(content, parser)


def _clean_xml(content: bytes, *, names: frozenset[str] | None, folder: str = "") -> bytes:
    """Return the document without references to what is not in it: `names` are the parts of its package, if any.

    Document type declarations and processing instructions (style sheets) are not part of the copy.

    Raises:
        UnusableDeck: it is no XML, and no part of a package either.
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
                _drop(element)
            continue
        name = etree.QName(element).localname
        if (name in _DROPPED_ELEMENTS and element is not root) or (name == "style" and _style_leads_out(element)):
            _drop(element)
        elif name == "Relationship":
            _clean_relationship(element, names or frozenset(), folder)
        elif name == "binary-data":
            _clean_embedded(element)
        else:
            _clean_attributes(element, name, names, folder)
    return bytes(etree.tostring(root, xml_declaration=True, encoding="UTF-8", standalone=True))


def _drop(element: Any) -> None:
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


def _style_leads_out(element: Any) -> bool:
    return bool(_URL_IN_STYLE.search("".join(element.itertext())))


def _clean_relationship(element: Any, names: frozenset[str], folder: str) -> None:
    """OOXML part 2, 9.3: only links that a reader clicks may lead out of the package."""
    target = element.get("Target", "")
    if element.get("TargetMode", "").strip().lower() == "external" or _SCHEME.match(target) or "\\" in target:
        is_link = element.get("Type", "").endswith("/hyperlink") and _LINK.match(target.strip())
        if not is_link:
            _drop(element)
        return
    base = posixpath.dirname(folder) if folder.endswith("_rels") else folder  # of the part that the file belongs to
    path = unquote(target.partition("#")[0])
    joined = posixpath.normpath(path.lstrip("/") if path.startswith("/") else posixpath.join(base, path))
    if path and joined not in names:
        _drop(element)


def _clean_attributes(element: Any, name: str, names: frozenset[str] | None, folder: str) -> None:
    for key, value in element.attrib.items():
        attribute = etree.QName(key).localname
        if (
            (attribute in _REFERENCES and _leads_out(value, name, names, folder))
            or _URL_IN_STYLE.search(value)
            or _OUTSIDE.search(value)
            or (attribute.startswith("on") and attribute.islower() and "}" not in key)
            or (name in _ANIMATIONS and attribute == "attributeName" and value.rpartition(":")[2] in _REFERENCES)
        ):
            del element.attrib[key]


def _leads_out(reference: str, element: str, names: frozenset[str] | None, folder: str) -> bool:
    plain = reference.strip()
    if not plain or plain.startswith("#") or re.match(r"(?i)data:image/(png|jpe?g|gif);", plain):
        return False
    if element in _LINK_ELEMENTS and _LINK.match(plain):
        return False
    path = posixpath.normpath(posixpath.join(folder, unquote(plain.partition("#")[0])))
    inside = names is not None and any(part == path or part.startswith(path + "/") for part in names)
    return bool(_SCHEME.match(plain)) or plain.startswith("/") or "\\" in plain or not inside


def _clean_embedded(element: Any) -> None:
    """OpenDocument in one file holds pictures in base64."""
    content, cleaned = b"", None
    try:
        content = base64.b64decode("".join((element.text or "").split()), validate=True)
        cleaned = _clean_part("", content, frozenset(), _Budget(), depth=_MAX_DEPTH)
    except (ValueError, zlib.error, OSError, EOFError, InvalidPresentation):
        pass
    if cleaned is None:
        _drop(element)
    elif cleaned != content:
        element.text = base64.b64encode(cleaned).decode()


# The words --------------------------------------------------------------------------------------------------------


def extract_slide_texts(source: Path) -> list[SlideText]:
    """Return the words of each slide of a PowerPoint or OpenDocument file; of what cannot be read, none."""
    try:
        with source.open("rb") as file:
            begin = file.read(64)
        if _looks_like_xml(begin) and source.stat().st_size <= MAX_XML_BYTES:
            return [*_open_document(parse_xml(source.read_bytes()))]
        with zipfile.ZipFile(source) as package:
            names = {entry.filename: entry for entry in package.infolist()[:MAX_PARTS]}
            budget = _Budget()
            if "ppt/presentation.xml" in names:
                return [*_powerpoint(package, names, budget)]
            if "content.xml" in names:
                return [*_open_document(_xml_part(package, names, "content.xml", budget))]
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, InvalidPresentation):
        pass
    except (zipfile.BadZipFile, zlib.error, etree.XMLSyntaxError):
        pass
    return []


def _xml_part(package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], name: str, budget: _Budget) -> Any:
    if names[name].file_size > MAX_XML_BYTES:
        raise InvalidPresentation("holds a text part that is too large")
    return parse_xml(_part(package, names[name], budget))


def _powerpoint(package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], budget: _Budget) -> Iterator[SlideText]:
    root = _xml_part(package, names, "ppt/presentation.xml", budget)
    slides = _related(package, names, "ppt/presentation.xml", budget)
    identifiers = [
        value for element in root.iter("{*}sldId") for key, value in element.attrib.items() if key.endswith("}id")
    ]
    paths = [slides[identifier][1] for identifier in identifiers if identifier in slides]
    for number, path in enumerate(paths[:MAX_SLIDES], 1):
        if path not in names:
            continue
        text = _drawing_text(_xml_part(package, names, path, budget))
        related = _related(package, names, path, budget).values()
        notes = next((target for kind, target in related if kind.endswith("/notesSlide") and target in names), None)
        spoken = _drawing_text(_xml_part(package, names, notes, budget), notes=True) if notes else ""
        yield SlideText(number=number, text=text, notes=spoken)


def _related(
    package: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo], path: str, budget: _Budget
) -> dict[str, tuple[str, str]]:
    """Return the relationships of a part: what kind each is, and the part it leads to."""
    folder, name = posixpath.split(path)
    file = f"{folder}/_rels/{name}.rels"
    if file not in names:
        return {}
    found = {}
    for element in _xml_part(package, names, file, budget).iter("{*}Relationship"):
        target = element.get("Target", "")
        joined = target.lstrip("/") if target.startswith("/") else posixpath.normpath(posixpath.join(folder, target))
        found[element.get("Id", "")] = (element.get("Type", ""), joined)
    return found


def _drawing_text(root: Any, *, notes: bool = False) -> str:
    """The paragraphs of a slide, those of its title first; of a page of notes only the notes themselves."""
    titles: list[str] = []
    others: list[str] = []
    for shape in root.iter("{*}sp"):
        kind = next((place.get("type", "body") for place in shape.iter("{*}ph")), "")
        lines = ["".join(t.text or "" for t in paragraph.iter("{*}t")) for paragraph in shape.iter("{*}p")]
        if not notes or kind == "body":
            (titles if kind in ("title", "ctrTitle") else others).extend(lines)
    if not notes:
        for frame in root.iter("{*}graphicFrame"):
            others += ["".join(t.text or "" for t in p.iter("{*}t")) for p in frame.iter("{*}p")]
    return _normalize_lines([*titles, *others])


def _open_document(root: Any) -> Iterator[SlideText]:
    for number, page in enumerate(root.iter("{urn:oasis:names:tc:opendocument:xmlns:drawing:1.0}page"), 1):
        if number > MAX_SLIDES:
            return
        notes = [*page.iter("{urn:oasis:names:tc:opendocument:xmlns:presentation:1.0}notes")]
        spoken = [line for note in notes for line in _paragraphs(note)]
        for note in notes:
            _drop(note)
        yield SlideText(number=number, text=_normalize_lines(_paragraphs(page)), notes=_normalize_lines(spoken))


def _paragraphs(element: Any) -> list[str]:
    tags = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}p", "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}h"
    return ["".join(paragraph.itertext()) for paragraph in element.iter(*tags)]


def _normalize_lines(lines: list[str]) -> str:
    return "\n".join(text for line in lines if (text := " ".join(line.split())))[:MAX_SLIDE_TEXT]
