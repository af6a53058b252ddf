"""tests: presentations that name files and addresses, or unpack to too much, do no harm; their words are kept."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from jobledger.workers.processors.session import presentation_conversion, presentation_files
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.presentation_files import (
    InvalidPresentation,
    SlideText,
    extract_slide_texts,
    sanitize_presentation,
)
from jobledger.workers.sandbox import runner
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_settings,
    serve_site,
)
from tests.processors.session.test_office import _DECK, _PAGE, needs_office

_RELS = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
_KIND = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9" height="9">{}</svg>'
)
NAMES = ("file:///canary", "http://canary.example/x", "//canary.example/x", "/canary", "../../canary", "\\\\canary\\x")

IN_FLAT = {
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
IN_SVG = {
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


def flat(more: str, *, before: str = "") -> bytes:
    page = _PAGE.format(number=1, text="Harmless words", more=more)
    return _DECK.format(pages=page).replace("?>", "?>" + before, 1).encode()


def package(parts: Mapping[str, str | bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return made.getvalue()


def everything_in(path: Path) -> bytes:
    """All that a file says, unpacked and decoded."""
    content = path.read_bytes()
    if not content.startswith(b"PK"):
        for text in presentation_files.parse_xml(content).itertext("{*}binary-data"):
            content += base64.b64decode(text)
        return content
    with zipfile.ZipFile(path) as file:
        parts = [file.read(name) for name in file.namelist()]
    return b"".join(gzip.decompress(part) if part.startswith(b"\x1f\x8b") else part for part in parts)


def cleaned(content: bytes, folder: Path) -> bytes:
    (folder / "source").write_bytes(content)
    sanitize_presentation(folder / "source", folder / "target")
    return everything_in(folder / "target")


@pytest.mark.parametrize("url", NAMES)
@pytest.mark.parametrize("kind", IN_FLAT)
def test_reference_in_flat_open_document_is_removed(kind: str, url: str, tmp_path: Path) -> None:
    content = cleaned(flat(IN_FLAT[kind].format(url=url)), tmp_path)
    assert b"canary" not in content
    assert b"Harmless words" in content


@pytest.mark.parametrize("kind", IN_SVG)
@pytest.mark.parametrize("place", ["flat", "odp", "pptx", "nested", "compressed", "utf-16", "blanks"])
def test_reference_in_svg_is_removed(kind: str, place: str, tmp_path: Path) -> None:
    svg = _SVG.format("<desc>harmless</desc>" + IN_SVG[kind].format(url="file:///canary"))
    images: dict[str, bytes] = {
        "flat": flat(
            f"<draw:image><office:binary-data>{base64.b64encode(svg.encode()).decode()}"
            "</office:binary-data></draw:image>"
        ),
        "odp": package({"content.xml": flat(""), "Pictures/a.svg": svg}),
        "pptx": package({"ppt/media/image1.png": svg}),
        "nested": package({"ppt/embeddings/a.docx": package({"word/media/a.svg": svg})}),
        "compressed": package({"Pictures/a.svgz": zipped(svg)}),
        "blanks": package({"ppt/media/image1.png": " \n" * 300 + svg}),
        "utf-16": package({"Pictures/a.svg": svg.encode("utf-16")}),
    }
    (tmp_path / "source").write_bytes(images[place])
    sanitize_presentation(tmp_path / "source", tmp_path / "target")
    content = everything_in(tmp_path / "target")
    if content.startswith(b"PK"):
        content = everything_in_bytes(content, tmp_path)
    assert b"canary" not in content
    assert b"harmless" in content


def zipped(text: str) -> bytes:
    return gzip.compress(text.encode())


def everything_in_bytes(content: bytes, folder: Path) -> bytes:
    (folder / "inner").write_bytes(content)
    return everything_in(folder / "inner")


@pytest.mark.parametrize(
    "relationship",
    [
        f'<Relationship Id="r1" Type="{_KIND}/image" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_KIND}/image" Target="http://canary.example/" TargetMode="external"/>',
        f'<Relationship Id="r1" Type="{_KIND}/oleObject" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_KIND}/video" Target="http://canary.example/v" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_KIND}/attachedTemplate" Target="http://canary.example/t"/>',
        f'<Relationship Id="r1" Type="{_KIND}/hyperlink" Target="file:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_KIND}/hyperlink" Target="macro:///canary" TargetMode="External"/>',
        f'<Relationship Id="r1" Type="{_KIND}/image" Target="../../../../canary"/>',
        f'<Relationship Id="r1" Type="{_KIND}/image" Target="\\\\canary\\share"/>',
    ],
)
def test_relationship_that_leads_out_of_a_powerpoint_file_is_removed(relationship: str, tmp_path: Path) -> None:
    parts: dict[str, str | bytes] = {
        "ppt/slides/slide1.xml": "<a>Harmless</a>",
        "ppt/media/image1.png": "PNG",
        "ppt/slides/_rels/slide1.xml.rels": _RELS.format(
            relationship + f'<Relationship Id="r2" Type="{_KIND}/image" Target="../media/image1.png"/>'
            f'<Relationship Id="r3" Type="{_KIND}/hyperlink" Target="https://example.org/" TargetMode="External"/>'
        ),
        "ppt/vbaProject.bin": "canary",
        "ppt/embeddings/oleObject1.bin": b"\xd0\xcf\x11\xe0canary",
    }
    content = cleaned(package(parts), tmp_path)
    assert b"canary" not in content
    assert b"image1.png" in content
    assert b"https://example.org/" in content


@pytest.mark.parametrize(
    "before",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE a SYSTEM "http://canary.example/a.dtd">',
        '<?xml-stylesheet href="file:///canary" type="text/xsl"?>',
        '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://canary.example/p"> %p;]>',
    ],
)
def test_entities_and_document_types_are_not_followed(before: str, tmp_path: Path) -> None:
    entity = "&x;" if "ENTITY x" in before else ""
    content = cleaned(flat(f"<text:p>{entity}</text:p>", before=before), tmp_path)
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
        package({"a.xml": b" " * 100_001}),
        package({f"media/{n}.png": b"\0" * 90_000 for n in range(12)}),
        package({str(n): b"" for n in range(101)}),
        b"PK\x03\x04 and nothing",
        b"<?xml version='1.0'?><a>",
    ],
    ids=["one part", "many parts", "too many parts", "no ZIP", "no XML"],
)
def test_deck_that_is_too_large_or_damaged_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presentation_files, "MAX_XML_BYTES", 100_000)
    monkeypatch.setattr(presentation_files, "MAX_TOTAL_BYTES", 1_000_000)
    monkeypatch.setattr(presentation_files, "MAX_PARTS", 100)
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(InvalidPresentation):
        sanitize_presentation(tmp_path / "source", tmp_path / "target")
    assert extract_slide_texts(tmp_path / "source") == []


def test_entities_that_multiply_are_not_expanded(tmp_path: Path) -> None:
    with suppress(InvalidPresentation):  # later versions of libxml2 refuse it themselves
        assert len(cleaned(flat("<text:p>&j;</text:p>", before=BOMB), tmp_path)) < 10_000
    assert not (tmp_path / "target").exists() or (tmp_path / "target").stat().st_size < 10_000


def powerpoint() -> bytes:
    """Two slides, the second one first in the file; with notes."""
    shape = "<p:sp><p:nvPr>{ph}</p:nvPr><a:p><a:r><a:t>{text}</a:t></a:r></a:p></p:sp>"
    around = '<p:sld xmlns:p="p" xmlns:a="a">{}</p:sld>'
    title, body = '<p:ph type="title"/>', '<p:ph type="body"/>'
    return package(
        {
            "ppt/presentation.xml": '<p:presentation xmlns:p="p" xmlns:r="r"><p:sldIdLst><p:sldId id="1" r:id="r2"/>'
            '<p:sldId id="2" r:id="r1"/></p:sldIdLst></p:presentation>',
            "ppt/_rels/presentation.xml.rels": _RELS.format(
                f'<Relationship Id="r1" Type="{_KIND}/slide" Target="slides/slide1.xml"/>'
                f'<Relationship Id="r2" Type="{_KIND}/slide" Target="/ppt/slides/slide2.xml"/>'
            ),
            "ppt/slides/slide1.xml": around.format(shape.format(ph="", text="Last")),
            "ppt/slides/slide2.xml": around.format(
                shape.format(ph=body, text="A *point*") + shape.format(ph=title, text="The title")
            ),
            "ppt/slides/_rels/slide2.xml.rels": _RELS.format(
                f'<Relationship Id="r1" Type="{_KIND}/notesSlide" Target="../notesSlides/notesSlide1.xml"/>'
            ),
            "ppt/notesSlides/notesSlide1.xml": around.format(
                shape.format(ph=body, text="Say hello") + shape.format(ph='<p:ph type="sldNum"/>', text="7")
            ),
        }
    )


def open_document() -> bytes:
    note = (
        '<presentation:notes xmlns:presentation="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0">'
        "<text:p>Say hello</text:p></presentation:notes>"
    )
    pages = _PAGE.format(number=1, text="The title", more=note) + _PAGE.format(number=2, text="Last", more="")
    return _DECK.format(pages=pages).encode()


@pytest.mark.parametrize("kind", ["pptx", "fodp", "odp"])
def test_words_and_notes_are_read(kind: str, tmp_path: Path) -> None:
    flat_file = open_document()
    decks = {"pptx": powerpoint(), "fodp": flat_file, "odp": package({"content.xml": flat_file})}
    (tmp_path / "deck").write_bytes(decks[kind])
    text = "The title\nA *point*" if kind == "pptx" else "The title"
    assert extract_slide_texts(tmp_path / "deck") == [
        SlideText(number=1, text=text, notes="Say hello"),
        SlideText(number=2, text="Last"),
    ]


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        yield running


@pytest.mark.parametrize("missing", ["LibreOffice", "sandbox"])
async def test_words_and_notes_are_shown_where_no_images_can_be_made(
    missing: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runner,
        "probe_methods",
        lambda: (runner.ProbeResult("landlock", is_working=False, reason="the kernel does not offer it"),),
    )
    program = "no-such-program" if missing == "LibreOffice" else "true"
    chosen = make_settings(libreoffice_command=program)
    url = site.put("/deck.pptx", SiteResponse(powerpoint()))
    job = RecordingJob(make_parameters(url=site.put("/talk", html(CONFERENCE_PAGE)), attachments_url=url), tmp_path)
    results = await run(job, chosen, Fetcher(chosen, lock_directory=tmp_path / "locks"))
    assert results.markdown is not None
    text = job.files[results.markdown.path].decode()
    slides = "### Slide 1\n\n- The title\n- A \\*point\\*\n\nSpeaker notes:\n\n- Say hello\n\n### Slide 2\n\n- Last\n"
    assert slides in text
    assert job.warnings[0].startswith("Only the text of the slides is shown. It ")
    assert ("is not installed" if missing == "LibreOffice" else "apt install bubblewrap") in job.warnings[0]


@needs_office
@pytest.mark.timeout(180)
async def test_uncleaned_deck_reaches_no_file_and_no_address(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox holds by itself. Started directly, LibreOffice shows the picture and asks the site."""
    monkeypatch.setattr(
        presentation_conversion, "sanitize_presentation", lambda source, target: shutil.copyfile(source, target)
    )
    picture, drawing = tmp_path / "canary.png", tmp_path / "canary.svg"
    Image.new("RGB", (50, 50), (255, 0, 255)).save(picture)
    image = f'<image xlink:href="{picture.as_uri()}" width="9" height="9"/>'
    drawing.write_text(_SVG.format(image))
    inside = base64.b64encode(_SVG.format(image).encode()).decode()
    members = [f"<draw:image><office:binary-data>{inside}</office:binary-data></draw:image>"]
    members += [IN_FLAT[kind].format(url=picture.as_uri()) for kind in ("image", "OLE object")]
    members += [IN_FLAT["object"].format(url=drawing.as_uri())]
    members += [
        IN_FLAT[kind].format(url=site.url(f"/{kind}".replace(" ", "-")))
        for kind in ("image", "object", "OLE object", "plug-in", "frame")
    ]
    frame = '<draw:frame svg:width="4cm" svg:height="4cm" svg:x="{x}cm" svg:y="8cm">{member}</draw:frame>'
    more = "".join(frame.format(x=2 + n, member=member) for n, member in enumerate(members))
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(flat(more))
    scratch.mkdir()
    pdf = await presentation_conversion.convert_to_pdf(source, ".fodp", program="soffice", scratch=scratch)
    assert site.requested_paths == []
    document = await asyncio.to_thread(pypdfium2.PdfDocument, pdf)
    colours = document[0].render().to_pil().convert("RGB").getcolors(10**6)
    assert not any(red > 220 and green < 60 and blue > 220 for _, (red, green, blue) in colours)
    document.close()
