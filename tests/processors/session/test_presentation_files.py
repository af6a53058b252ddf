"""Hostile presentations: references and archive bombs are removed or rejected, and the text is kept."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from jobledger.workers.processors.session import presentation_conversion, presentation_files
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.presentation_files import (
    SlideText,
    UnusablePresentation,
    extract_slide_texts,
    sanitize_presentation,
)
from jobledger.workers.sandbox import runner
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    make_parameters,
    make_settings,
    read_document,
)
from tests.processors.session.presentations import FLAT_DOCUMENT, FLAT_PAGE, needs_libreoffice

_RELS = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
_TYPE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9" height="9">{}</svg>'
)
REFERENCES = (
    "file:///canary",
    "http://canary.example/x",
    "//canary.example/x",
    "/canary",
    "../../canary",
    "\\\\canary\\x",
)

FLAT_ELEMENTS = {
    "image": '<draw:image xlink:href="{url}"/>',
    "object": '<draw:object xlink:href="{url}" xlink:show="embed" xlink:actuate="onLoad"/>',
    "OLE object": '<draw:object-ole xlink:href="{url}"/>',
    "plug-in": '<draw:plugin xlink:href="{url}" draw:mime-type="application/vnd.sun.star.media"/>',
    "applet": '<draw:applet xlink:href="{url}" draw:code="canary"/>',
    "frame": '<draw:floating-frame xlink:href="{url}"/>',
    "section": '<text:section><text:section-source xlink:href="{url}"/></text:section>',
    "DDE": '<office:dde-source office:dde-application="canary" office:dde-item="{url}"/>',
    "script": "<office:scripts><office:script>canary {url}</office:script></office:scripts>",
    "event": '<office:event-listeners><x:e xmlns:x="x" xlink:href="{url}"/></office:event-listeners>',
    "sound": '<p:sound xmlns:p="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0" xlink:href="{url}"/>',
    "font": '<svg:font-face-uri xlink:href="{url}"/>',
    "include": '<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="{url}"/>',
    "style": '<draw:frame style="background: url({url})"/>',
    "program": '<draw:frame xlink:href="vnd.sun.star.script:canary?{url}"/>',
    "base": '<draw:frame xml:base="{url}"/>',
}
SVG_ELEMENTS = {
    "image": '<image xlink:href="{url}"/>',
    "plain href": '<image href="{url}"/>',
    "use": '<use xlink:href="{url}#a"/>',
    "style sheet": "<style>@import '{url}';</style>",
    "style": '<rect style="fill:url({url})"/>',
    "attribute": "<rect filter=\"url('{url}')\"/>",
    "script": "<script>canary('{url}')</script>",
    "handler": '<rect onload="canary()"/>',
    "set": '<image><set attributeName="xlink:href" to="{url}"/></image>',
    "animation": '<image><animate attributeName="xlink:href" values="a.png;{url}"/></image>',
    "unknown attribute": '<rect source="{url}"/>',
    "foreign": '<foreignObject><i src="{url}">canary</i></foreignObject>',
}


def make_flat_file(elements: str, *, prolog: str = "") -> bytes:
    page = FLAT_PAGE.format(number=1, text="Harmless words", elements=elements)
    return FLAT_DOCUMENT.format(pages=page).replace("?>", "?>" + prolog, 1).encode()


def make_zip(parts: Mapping[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return buffer.getvalue()


def unpack(content: bytes) -> bytes:
    """Return a file with its parts decompressed or decoded."""
    if not content.startswith(b"PK"):
        for text in presentation_files.parse_xml(content).itertext("{*}binary-data"):
            content += base64.b64decode(text)
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        parts = [file.read(name) for name in file.namelist()]
    return b"".join(gzip.decompress(part) if part.startswith(b"\x1f\x8b") else part for part in parts)


def sanitize(content: bytes, folder: Path) -> bytes:
    """Return the sanitized presentation, unpacked."""
    (folder / "source").write_bytes(content)
    sanitize_presentation(folder / "source", folder / "target")
    return unpack((folder / "target").read_bytes())


@pytest.mark.parametrize("url", REFERENCES)
@pytest.mark.parametrize("kind", FLAT_ELEMENTS)
def test_reference_in_flat_open_document_is_removed(kind: str, url: str, tmp_path: Path) -> None:
    content = sanitize(make_flat_file(FLAT_ELEMENTS[kind].format(url=url)), tmp_path)
    assert b"canary" not in content
    assert b"Harmless words" in content


@pytest.mark.parametrize("kind", SVG_ELEMENTS)
@pytest.mark.parametrize("location", ["flat", "odp", "pptx", "nested", "compressed", "utf-16", "leading spaces"])
def test_reference_in_svg_is_removed(kind: str, location: str, tmp_path: Path) -> None:
    svg = _SVG.format("<desc>harmless</desc>" + SVG_ELEMENTS[kind].format(url="file:///canary"))
    presentations: dict[str, bytes] = {
        "flat": make_flat_file(
            f"<draw:image><office:binary-data>{base64.b64encode(svg.encode()).decode()}"
            "</office:binary-data></draw:image>"
        ),
        "odp": make_zip({"content.xml": make_flat_file(""), "Pictures/a.svg": svg}),
        "pptx": make_zip({"ppt/media/image1.png": svg}),
        "nested": make_zip({"ppt/embeddings/a.docx": make_zip({"word/media/a.svg": svg})}),
        "compressed": make_zip({"Pictures/a.svgz": gzip.compress(svg.encode())}),
        "leading spaces": make_zip({"ppt/media/image1.png": " \n" * 300 + svg}),
        "utf-16": make_zip({"Pictures/a.svg": svg.encode("utf-16")}),
    }
    content = sanitize(presentations[location], tmp_path)
    if content.startswith(b"PK"):
        content = unpack(content)
    assert b"canary" not in content
    assert b"harmless" in content


@pytest.mark.parametrize(
    "relationship",
    [
        f'<Relationship Id="r1" Type="{_TYPE}/image" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/image" Target="http://canary.example/" TargetMode="external"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/oleObject" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/video" Target="http://canary.example/v" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/attachedTemplate" Target="http://canary.example/t"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/hyperlink" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/hyperlink" Target="macro:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/image" Target="../../../../canary"/>',
        f'<Relationship Id="r1" Type="{_TYPE}/image" Target="\\\\canary\\share"/>',
    ],
)
def test_external_relationship_of_powerpoint_is_removed(relationship: str, tmp_path: Path) -> None:
    parts: dict[str, str | bytes] = {
        "ppt/slides/slide1.xml": "<a>Harmless</a>",
        "ppt/media/image1.png": "PNG",
        "ppt/slides/_rels/slide1.xml.rels": _RELS.format(
            relationship + f'<Relationship Id="r2" Type="{_TYPE}/image" Target="../media/image1.png"/>'
            f'<Relationship Id="r3" Type="{_TYPE}/hyperlink" Target="https://example.org/" TargetMode="External"/>'
        ),
        "ppt/vbaProject.bin": "canary",
        "ppt/embeddings/oleObject1.bin": b"\xd0\xcf\x11\xe0canary",
    }
    content = sanitize(make_zip(parts), tmp_path)
    assert b"canary" not in content
    assert b"image1.png" in content
    assert b"https://example.org/" in content


@pytest.mark.parametrize(
    "prolog",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE a SYSTEM "http://canary.example/a.dtd">',
        '<?xml-stylesheet href="file:///canary" type="text/xsl"?>',
        '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://canary.example/p"> %p;]>',
    ],
)
def test_entities_and_doctypes_are_not_resolved(prolog: str, tmp_path: Path) -> None:
    entity = "&x;" if "ENTITY x" in prolog else ""
    content = sanitize(make_flat_file(f"<text:p>{entity}</text:p>", prolog=prolog), tmp_path)
    assert b"canary" not in content
    assert b"SYSTEM" not in content
    assert Path("/etc/hostname").read_bytes().strip() not in content


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
    + "]>"
)


@pytest.mark.parametrize(
    "content",
    [
        make_zip({"a.xml": b" " * 100_001}),
        make_zip({f"media/{n}.png": b"\0" * 90_000 for n in range(12)}),
        make_zip({str(n): b"" for n in range(101)}),
        make_zip({"Pictures/a.svgz": b"\x1f\x8b and nothing"}),
        b"PK\x03\x04 and nothing",
        b"<?xml version='1.0'?><a>",
    ],
    ids=["one part", "many parts", "too many parts", "no gzip", "no ZIP", "no XML"],
)
def test_too_large_or_damaged_presentation_is_rejected(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presentation_files, "MAX_XML_BYTES", 100_000)
    monkeypatch.setattr(presentation_files, "MAX_TOTAL_BYTES", 1_000_000)
    monkeypatch.setattr(presentation_files, "MAX_PARTS", 100)
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(UnusablePresentation):
        sanitize_presentation(tmp_path / "source", tmp_path / "target")
    assert extract_slide_texts(tmp_path / "source") == []


def test_nested_entities_are_not_expanded(tmp_path: Path) -> None:
    with suppress(UnusablePresentation):  # later versions of libxml2 reject it
        assert len(sanitize(make_flat_file("<text:p>&j;</text:p>", prolog=BOMB), tmp_path)) < 10_000
    assert not (tmp_path / "target").exists() or (tmp_path / "target").stat().st_size < 10_000


def make_powerpoint() -> bytes:
    """Return a presentation with notes and two slides, which are stored in reverse order."""
    shape = "<p:sp><p:nvPr>{ph}</p:nvPr><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p:sp>"
    slide = '<p:sld xmlns:p="p" xmlns:a="a">{}</p:sld>'
    title, body = '<p:ph type="title"/>', '<p:ph type="body"/>'
    return make_zip(
        {
            "ppt/presentation.xml": '<p:presentation xmlns:p="p" xmlns:r="r"><p:sldIdLst><p:sldId id="1" r:id="r2"/>'
            '<p:sldId id="2" r:id="r1"/></p:sldIdLst></p:presentation>',
            "ppt/_rels/presentation.xml.rels": _RELS.format(
                f'<Relationship Id="r1" Type="{_TYPE}/slide" Target="slides/slide1.xml"/>'
                f'<Relationship Id="r2" Type="{_TYPE}/slide" Target="/ppt/slides/slide2.xml"/>'
            ),
            "ppt/slides/slide1.xml": slide.format(shape.format(ph="", text="Last")),
            "ppt/slides/slide2.xml": slide.format(
                shape.format(ph=body, text="A *point*") + shape.format(ph=title, text="The title")
            ),
            "ppt/slides/_rels/slide2.xml.rels": _RELS.format(
                f'<Relationship Id="r1" Type="{_TYPE}/notesSlide" Target="../notesSlides/notesSlide1.xml"/>'
            ),
            "ppt/notesSlides/notesSlide1.xml": slide.format(
                shape.format(ph=body, text="Say hello") + shape.format(ph='<p:ph type="sldNum"/>', text="7")
            ),
        }
    )


def make_open_document() -> bytes:
    note = (
        '<presentation:notes xmlns:presentation="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0">'
        "<text:p>Say hello</text:p></presentation:notes>"
    )
    pages = FLAT_PAGE.format(number=1, text="The title", elements=note) + FLAT_PAGE.format(
        number=2, text="Last", elements=""
    )
    return FLAT_DOCUMENT.format(pages=pages).encode()


@pytest.mark.parametrize("kind", ["pptx", "fodp", "odp"])
def test_extract_slide_texts_reads_text_and_notes(kind: str, tmp_path: Path) -> None:
    flat_file = make_open_document()
    presentations = {
        "pptx": make_powerpoint(),
        "fodp": flat_file,
        "odp": make_zip({"content.xml": flat_file}),
    }
    (tmp_path / "deck").write_bytes(presentations[kind])
    text = "The title\nA *point*" if kind == "pptx" else "The title"
    assert extract_slide_texts(tmp_path / "deck") == [
        SlideText(number=1, text=text, notes="Say hello"),
        SlideText(number=2, text="Last"),
    ]


@pytest.mark.parametrize("missing", ["LibreOffice", "sandbox"])
async def test_text_and_notes_are_shown_if_conversion_is_unavailable(
    missing: str, site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runner,
        "probe_methods",
        lambda: (runner.ProbeResult("landlock", is_working=False, reason="the kernel does not offer it"),),
    )
    program = "no-such-program" if missing == "LibreOffice" else "true"
    settings = make_settings(libreoffice_command=program)
    url = site.put("/deck.pptx", SiteResponse(make_powerpoint()))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    results = await run(job, settings, Fetcher(settings, lock_directory=tmp_path / "locks"))
    text = read_document(job, results)
    slides = "### Slide 1\n\n- The title\n- A \\*point\\*\n\nSpeaker notes:\n\n- Say hello\n\n### Slide 2\n\n- Last\n"
    assert slides in text
    assert job.warnings[0].startswith("Only the text of the slides is shown. It ")
    assert ("is not installed" if missing == "LibreOffice" else "apt install bubblewrap") in job.warnings[0]


@needs_libreoffice
@pytest.mark.timeout(180)
async def test_unsanitized_presentation_has_no_access_in_sandbox(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox alone is sufficient. Without it, LibreOffice shows the image and sends requests to the site."""
    monkeypatch.setattr(
        presentation_conversion, "sanitize_presentation", lambda source, target: shutil.copyfile(source, target)
    )
    image_file, drawing = tmp_path / "canary.png", tmp_path / "canary.svg"
    Image.new("RGB", (50, 50), (255, 0, 255)).save(image_file)
    image = f'<image xlink:href="{image_file.as_uri()}" width="9" height="9"/>'
    drawing.write_text(_SVG.format(image))
    embedded = base64.b64encode(_SVG.format(image).encode()).decode()
    members = [f"<draw:image><office:binary-data>{embedded}</office:binary-data></draw:image>"]
    members += [FLAT_ELEMENTS[kind].format(url=image_file.as_uri()) for kind in ("image", "OLE object")]
    members += [FLAT_ELEMENTS["object"].format(url=drawing.as_uri())]
    members += [
        FLAT_ELEMENTS[kind].format(url=site.url(f"/{kind}".replace(" ", "-")))
        for kind in ("image", "object", "OLE object", "plug-in", "frame")
    ]
    frame = '<draw:frame svg:width="4cm" svg:height="4cm" svg:x="{x}cm" svg:y="8cm">{member}</draw:frame>'
    elements = "".join(frame.format(x=2 + n, member=member) for n, member in enumerate(members))
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(make_flat_file(elements))
    scratch.mkdir()
    converted = await presentation_conversion.convert_to_pdf(source, ".fodp", program="soffice", scratch=scratch)
    assert site.requested_paths == []
    document = await asyncio.to_thread(pypdfium2.PdfDocument, converted.pdf)
    colours = document[0].render().to_pil().convert("RGB").getcolors(10**6)
    assert not any(red > 220 and green < 60 and blue > 220 for _, (red, green, blue) in colours)
    document.close()


def test_rows_of_tables_are_lines_and_page_numbers_are_omitted(tmp_path: Path) -> None:
    cells = "<table:table-cell><text:p>{}</text:p></table:table-cell>"
    rows = "".join(f"<table:table-row>{cells.format(a)}{cells.format(b)}</table:table-row>" for a, b in ("ab", "cd"))
    box = "<draw:frame {}><draw:text-box><text:p>{}</text:p></draw:text-box></draw:frame>"
    number = box.format('presentation:class="page-number"', "&lt;number&gt;")
    notes = f"<presentation:notes>{number}{box.format('', 'Note')}</presentation:notes>"
    page = FLAT_PAGE.format(number=1, text="Title", elements=f"<table:table>{rows}</table:table>{number}{notes}")
    names = (
        ' xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0"'
        ' xmlns:presentation="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0"'
    )
    source = tmp_path / "deck.fodp"
    source.write_text(FLAT_DOCUMENT.format(pages=page).replace(" office:version", f"{names} office:version", 1))
    assert extract_slide_texts(source) == [SlideText(number=1, text="Title\na | b\nc | d", notes="Note")]


def test_rows_of_powerpoint_tables_are_lines(tmp_path: Path) -> None:
    namespace = 'xmlns:p="p" xmlns:a="a" xmlns:r="r"'
    row = (
        "<a:tr><a:tc><a:p><a:r><a:t>{}</a:t></a:r></a:p></a:tc><a:tc><a:p><a:r><a:t>{}</a:t></a:r></a:p></a:tc></a:tr>"
    )
    source = tmp_path / "deck.pptx"
    with zipfile.ZipFile(source, "w") as package:
        package.writestr("ppt/presentation.xml", f'<p:presentation {namespace}><p:sldId r:id="r1"/></p:presentation>')
        relation = f'<Relationship Id="r1" Type="{_TYPE}/slide" Target="slides/slide1.xml"/>'
        package.writestr("ppt/_rels/presentation.xml.rels", _RELS.format(relation))
        table = f"<a:tbl>{row.format('a', 'b')}{row.format('c', 'd')}</a:tbl>"
        package.writestr(
            "ppt/slides/slide1.xml", f"<p:sld {namespace}><p:graphicFrame>{table}</p:graphicFrame></p:sld>"
        )
    assert extract_slide_texts(source) == [SlideText(number=1, text="a | b\nc | d")]
