"""Rendering of PDF pages: sizes, limits, and errors for any content."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from collections.abc import Generator
from contextlib import aclosing
from pathlib import Path
from threading import Event

import pytest
from fpdf import FPDF
from PIL import Image

from jobledger.workers.processors.session import SessionSettings
from jobledger.workers.processors.session.pdf_rendering import (
    RenderedPage,
    UnreadablePdf,
    get_url_suffix,
    is_pdf,
    is_picture,
    make_slide_file_names,
    render_pages,
)
from jobledger.workers.processors.session.step_context import run_in_thread
from tests.processors.session.fixtures import make_pdf, make_pdf_with_image


def render(content: bytes, folder: Path, settings: SessionSettings | None = None) -> list[RenderedPage]:
    path = folder / "slides.pdf"
    path.write_bytes(content)
    return asyncio.run(collect_pages(path, settings or SessionSettings(), is_picture=is_picture(path)))


async def collect_pages(path: Path, settings: SessionSettings, *, is_picture: bool = False) -> list[RenderedPage]:
    async with aclosing(render_pages(path, settings, path.parent, is_picture=is_picture)) as pages:
        return [page async for page in pages]


def read_size(jpeg: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(jpeg)) as image:
        image.load()
        return image.size


@pytest.mark.parametrize(
    ("width", "height"),
    [(254, 143), (254, 190.5), (210, 297), (100, 100), (192.13, 108), (297.05, 167.09), (33.1, 900), (900, 7)],
)
def test_longest_side_has_configured_size_for_every_page_size(width: float, height: float, tmp_path: Path) -> None:
    (page,) = render(make_pdf(1, width=width, height=height), tmp_path)
    columns, rows = read_size(page.image)
    assert max(columns, rows) == 1280
    assert columns / rows == pytest.approx(width / height, rel=0.1)
    assert max(read_size(page.thumbnail)) == 320


def test_every_page_has_its_text_and_number(tmp_path: Path) -> None:
    pages = render(make_pdf(3, title="Über «Zustände»"), tmp_path)
    assert [(page.page_number, page.page_count, [line.text for line in page.lines]) for page in pages] == [
        (number, 3, [f"Über «Zustände» {number}"]) for number in (1, 2, 3)
    ]


def test_number_of_pixels_is_limited(tmp_path: Path) -> None:
    (page,) = render(make_pdf(1), tmp_path, SessionSettings(max_image_pixels=100_000))
    columns, rows = read_size(page.image)
    assert 90_000 < columns * rows < 102_000


def test_large_picture_in_page_is_scaled(tmp_path: Path) -> None:
    """PDFium reads most pictures line by line. Even for 400 million pixels it needs about 100 MB."""
    content = make_pdf_with_image(20_000, 20_000)
    assert len(content) < 500_000
    (page,) = render(content, tmp_path)
    assert page.problem is None
    with Image.open(io.BytesIO(page.image)) as image:
        assert image.convert("L").histogram()[0] > 1_000_000  # the picture is black


def test_page_with_too_large_picture_is_not_rendered(tmp_path: Path) -> None:
    (page,) = render(make_pdf_with_image(20_000, 25_000), tmp_path)
    assert (page.problem, page.image) == ("contains an image of 20000 × 25000 pixels, more than allowed", b"")


@pytest.mark.parametrize("content", [b"%PDF-1.7", b"", b"hello", make_pdf(1)[:200]])
def test_damaged_pdf_raises_unreadable_pdf(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnreadablePdf, match="The PDF is damaged"):
        render(content, tmp_path)


def test_encrypted_pdf_raises_unreadable_pdf(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePdf, match="is protected by a password"):
        render(make_pdf(1, password="secret"), tmp_path)


def test_slide_file_names_sort_by_number() -> None:
    names = [make_slide_file_names(number)[0] for number in range(1, 501)]
    assert names[:2] == ["slide-001.jpg", "slide-002.jpg"]
    assert names == sorted(names)
    assert make_slide_file_names(7) == ("slide-007.jpg", "slide-007-thumb.jpg")


def test_is_pdf_checks_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, expected in ((make_pdf(1), True), (b"\n\n" + make_pdf(1), True), (b"PK\x03\x04", False), (b"", False)):
        path.write_bytes(content)
        assert is_pdf(path) is expected


def test_get_url_suffix_ignores_the_query() -> None:
    assert get_url_suffix("https://conference.example/a/Talk.ODP?download=1") == ".odp"
    assert get_url_suffix("https://conference.example/a/talk") == ""


async def test_run_in_thread_closes_generator_when_consumer_stops() -> None:
    closed = Event()

    def generate() -> Generator[int, None, None]:
        try:
            yield from range(1_000)
        finally:
            closed.set()

    received = []
    async with aclosing(run_in_thread(generate())) as items:
        async for item in items:
            received.append(item)
            if len(received) == 3:
                break
    assert received == [0, 1, 2]
    assert closed.wait(60)


def make_scanned_pdf(pages: int) -> bytes:
    """Return a PDF with a different image and no text on each page, as from a scanner."""
    document = FPDF(unit="mm", format=(143, 254), orientation="landscape")
    for number in range(pages):
        document.add_page()
        noise = Image.effect_noise((640, 360), 20 + number % 50)
        document.image(noise, x=0, y=0, w=254, h=143)
    return bytes(document.output())


def test_scanned_pdf_gives_slides_without_text(tmp_path: Path) -> None:
    pages = render(make_scanned_pdf(3), tmp_path)
    assert [(page.page_number, page.lines, page.problem) for page in pages] == [
        (number, [], None) for number in (1, 2, 3)
    ]
    assert len({page.image for page in pages}) == 3
    assert max(read_size(pages[0].image)) == 1280


_RENDER = """
import resource, sys
from jobledger.workers.processors.session.slide_helper import Request, render

request = Request(sys.argv[1], False, 1, 500, 320, 320, 85, 10**8, merges_overlays=True, recognizes_text=False)
numbers, peak_after_tenth = [], 0
for metadata, image, thumbnail, _ in render(request):
    if image and thumbnail:
        numbers.append(metadata["page"])
    if metadata.get("page") == 10:
        peak_after_tenth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert numbers == list(range(1, 101))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_after_tenth) // 1024)
"""


def test_memory_for_100_pages_is_that_for_10(tmp_path: Path) -> None:
    path = tmp_path / "deck.pdf"
    path.write_bytes(make_scanned_pdf(100))
    process = subprocess.run([sys.executable, "-c", _RENDER, path], check=True, capture_output=True, text=True)
    assert int(process.stdout) < 30
