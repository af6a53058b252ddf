"""Presentations other than PDF are converted by LibreOffice in a sandbox, or only linked."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from PIL import Image

from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.processors.session.presentation_conversion import (
    convert_to_pdf,
    has_presentation_signature,
)
from jobledger.workers.processors.session.presentation_files import UnusablePresentation
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    make_parameters,
    make_settings,
    read_document,
)
from tests.processors.session.presentations import (
    convert_with_libreoffice,
    find_processes,
    make_flat_presentation,
    needs_libreoffice,
    needs_sandbox,
)
from tests.support.event_loop_clock import advance_clock
from tests.support.polling import poll_until


@needs_libreoffice
@pytest.mark.timeout(180)
@pytest.mark.parametrize("suffix", ["fodp", "pptx"])
async def test_presentation_is_converted_to_slides_in_order(
    suffix: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    content = make_flat_presentation("First things", "Zweitens: Übung", "Third, and last")
    if suffix != "fodp":
        content = await asyncio.to_thread(convert_with_libreoffice, suffix, content, tmp_path)
    url = site.put(f"/deck.{suffix}", SiteResponse(content))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), scratch)
    results = await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert results.metadata["slides"] == 3
    assert job.warnings == []
    text = read_document(job, results)
    assert text.index("Slide 1: First things") < text.index("Slide 2: Zweitens: Übung") < text.index("Slide 3: Third")
    [image_file] = [data for path, data in job.files.items() if path.endswith("slide-001.jpg")]
    with Image.open(io.BytesIO(image_file)) as image:
        assert max(image.size) == 1280


@needs_libreoffice
@pytest.mark.timeout(180)
async def test_linked_image_of_presentation_is_not_fetched(site: Site, page_url: str, tmp_path: Path) -> None:
    url = site.put("/deck.fodp", SiteResponse(make_flat_presentation("Look", image_url=site.url("/inside.png"))))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert "/deck.fodp" in site.requested_paths
    assert "/inside.png" not in site.requested_paths


@needs_libreoffice
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".pptx", b"PK\x03\x04 and then nothing that makes sense"), (".ppt", b"\xd0\xcf\x11\xe0" + bytes(2000))],
)
async def test_invalid_presentation_is_only_linked(
    suffix: str, content: bytes, site: Site, page_url: str, tmp_path: Path
) -> None:
    url = site.put(f"/deck{suffix}", SiteResponse(content))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    results = await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert results.metadata["slides"] == 0
    reason = "is damaged" if suffix == ".pptx" else "could not be read by LibreOffice"
    assert job.warnings == [f"The attachment is only linked. It {reason}."]


async def test_html_named_as_presentation_is_not_converted(site: Site, page_url: str, tmp_path: Path) -> None:
    url = site.put("/deck.pptx", SiteResponse(b"<html>Please log in</html>", headers={"Content-Type": "text/html"}))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    # If this program were started, it would create no PDF and the warning would say so.
    await run(
        job, make_settings(libreoffice_command="true"), Fetcher(make_settings(), lock_directory=tmp_path / "locks")
    )
    assert job.warnings == ["The attachment is only linked. It is not a PDF (text/html). The web page asks to log in."]


@needs_sandbox
@pytest.mark.timeout(180)
async def test_hanging_conversion_is_killed_with_its_child_processes(tmp_path: Path) -> None:
    program = tmp_path / "soffice.sh"
    program.write_text("#!/bin/sh\n(while :; do echo >> output; sleep 0.05; done) &\nwait\n")
    program.chmod(0o755)
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(b"\xd0\xcf\x11\xe0")
    scratch.mkdir()

    async def expire_timeout() -> None:
        await poll_until((scratch / "output").exists, seconds=100)
        assert len(find_processes(program)) >= 2
        advance_clock(1000)

    expiring = asyncio.create_task(expire_timeout())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1000):
            await convert_to_pdf(source, ".ppt", program=str(program), scratch=scratch)
    await expiring
    assert find_processes(program) == []


@needs_sandbox
async def test_conversion_without_output_raises_unusable_presentation(tmp_path: Path) -> None:
    source, scratch = tmp_path / "attachment", tmp_path / "scratch"
    source.write_bytes(b"\xd0\xcf\x11\xe0")
    scratch.mkdir()
    with pytest.raises(UnusablePresentation, match="could not be read by LibreOffice"):
        await convert_to_pdf(source, ".ppt", program="true", scratch=scratch)


def test_has_presentation_signature_checks_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"PK\x03\x04rest")
    assert has_presentation_signature(path, ".pptx")
    assert not has_presentation_signature(path, ".ppt")
    assert not has_presentation_signature(path, ".docx")
