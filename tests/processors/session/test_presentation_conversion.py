"""tests: presentations that are no PDF become slides where LibreOffice is installed, and are linked elsewhere."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.presentation_conversion import (
    ConversionFailed,
    convert_to_pdf,
    has_presentation_signature,
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

needs_sandbox = pytest.mark.skipif(
    not runner.is_available(), reason="no sandbox works here: needs Landlock, or bubblewrap (apt install bubblewrap)"
)
needs_office = pytest.mark.skipif(
    shutil.which("soffice") is None or not runner.is_available(),
    reason="needs LibreOffice (apt install libreoffice-impress), and Landlock or bubblewrap",
)

_DECK = """<?xml version="1.0" encoding="UTF-8"?>
<office:document xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0"
 xmlns:draw="urn:oasis:names:tc:opendocument:xmlns:drawing:1.0"
 xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"
 xmlns:svg="urn:oasis:names:tc:opendocument:xmlns:svg-compatible:1.0" xmlns:xlink="http://www.w3.org/1999/xlink"
 office:version="1.2" office:mimetype="application/vnd.oasis.opendocument.presentation">
<office:body><office:presentation>{pages}</office:presentation></office:body></office:document>"""
_PAGE = """<draw:page draw:name="page{number}"><draw:frame svg:width="20cm" svg:height="3cm" svg:x="2cm" svg:y="2cm">
<draw:text-box><text:p>{text}</text:p></draw:text-box></draw:frame>{more}</draw:page>"""
_LINKED = """<draw:frame svg:width="5cm" svg:height="5cm" svg:x="2cm" svg:y="8cm">
<draw:image xlink:href="{url}" xlink:type="simple" xlink:show="embed" xlink:actuate="onLoad"/></draw:frame>"""


def deck(*texts: str, picture: str | None = None) -> bytes:
    """A presentation with a page for each text, as flat OpenDocument; `picture` is an address it links to."""
    more = _LINKED.format(url=picture) if picture else ""
    pages = (_PAGE.format(number=number, text=text, more=more) for number, text in enumerate(texts, 1))
    return _DECK.format(pages="".join(pages)).encode()


def as_kind(suffix: str, content: bytes, folder: Path) -> bytes:
    """The same presentation as a file of another kind, made by LibreOffice itself."""
    source = folder / "deck.fodp"
    source.write_bytes(content)
    home = folder / "home"
    subprocess.run(
        [
            "soffice",
            "--headless",
            f"-env:UserInstallation={home.as_uri()}",
            "--convert-to",
            suffix,
            "--outdir",
            str(folder),
            str(source),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return (folder / f"deck.{suffix}").read_bytes()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve_site() as running:
        yield running


@pytest.fixture
def page(site: Site) -> str:
    return site.put("/talk", html(CONFERENCE_PAGE))


@needs_office
@pytest.mark.timeout(180)
@pytest.mark.parametrize("suffix", ["fodp", "pptx"])
async def test_a_presentation_becomes_slides_in_its_order(suffix: str, site: Site, page: str, tmp_path: Path) -> None:
    content = deck("First things", "Zweitens: Übung", "Third, and last")
    if suffix != "fodp":
        content = await asyncio.to_thread(as_kind, suffix, content, tmp_path)
    url = site.put(f"/deck.{suffix}", SiteResponse(content))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = RecordingJob(make_parameters(url=page, attachments_url=url), scratch)
    results = await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert results.metadata["slides"] == 3
    assert job.warnings == ["There is no transcript. No recording was given."][1:]
    assert results.markdown is not None
    text = job.files[results.markdown.path].decode()
    assert text.index("Slide 1: First things") < text.index("Slide 2: Zweitens: Übung") < text.index("Slide 3: Third")
    [first] = [data for path, data in job.files.items() if path.endswith("slide-001.jpg")]
    with Image.open(io.BytesIO(first)) as image:
        assert max(image.size) == 1280


@needs_office
@pytest.mark.timeout(180)
async def test_what_a_presentation_links_to_is_not_fetched(site: Site, page: str, tmp_path: Path) -> None:
    url = site.put("/deck.fodp", SiteResponse(deck("Look", picture=site.url("/inside.png"))))
    job = RecordingJob(make_parameters(url=page, attachments_url=url), tmp_path)
    await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert "/deck.fodp" in site.requested_paths
    assert "/inside.png" not in site.requested_paths


@needs_office
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".pptx", b"PK\x03\x04 and then nothing that makes sense"), (".ppt", b"\xd0\xcf\x11\xe0" + bytes(2000))],
)
async def test_what_only_begins_like_a_presentation_is_linked(
    suffix: str, content: bytes, site: Site, page: str, tmp_path: Path
) -> None:
    url = site.put(f"/deck{suffix}", SiteResponse(content))
    job = RecordingJob(make_parameters(url=page, attachments_url=url), tmp_path)
    results = await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert results.metadata["slides"] == 0
    said = "is damaged" if suffix == ".pptx" else "could not be read by LibreOffice"
    assert job.warnings == [f"The attachment is only linked. It {said}."]


async def test_a_page_that_calls_itself_a_presentation_is_never_given_to_libreoffice(
    site: Site, page: str, tmp_path: Path
) -> None:
    url = site.put("/deck.pptx", SiteResponse(b"<html>Please log in</html>", headers={"Content-Type": "text/html"}))
    job = RecordingJob(make_parameters(url=page, attachments_url=url), tmp_path)
    # Whatever program it were, it would be found out: this one always makes nothing.
    await run(
        job, make_settings(libreoffice_command="true"), Fetcher(make_settings(), lock_directory=tmp_path / "locks")
    )
    assert job.warnings == ["The attachment is only linked. It is not a PDF (text/html)."]


@needs_sandbox
async def test_a_conversion_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    program = tmp_path / "soffice.sh"
    program.write_text("#!/bin/sh\n(while :; do echo >> beat; sleep 0.05; done) &\nwait\n")
    program.chmod(0o755)
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(b"\xd0\xcf\x11\xe0")
    scratch.mkdir()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await convert_to_pdf(source, ".ppt", program=str(program), scratch=scratch)
    size = (scratch / "beat").stat().st_size
    assert size > 0
    await asyncio.sleep(0.3)
    assert (scratch / "beat").stat().st_size == size


@needs_sandbox
async def test_a_program_that_makes_nothing_is_told(tmp_path: Path) -> None:
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(b"\xd0\xcf\x11\xe0")
    scratch.mkdir()
    with pytest.raises(ConversionFailed, match="could not be read by LibreOffice"):
        await convert_to_pdf(source, ".ppt", program="true", scratch=scratch)


def test_a_presentation_is_known_by_how_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"PK\x03\x04rest")
    assert has_presentation_signature(path, ".pptx")
    assert not has_presentation_signature(path, ".ppt")
    assert not has_presentation_signature(path, ".docx")
