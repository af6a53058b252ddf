"""tests: pages of a PDF are drawn in bounds, whatever is in it."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
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
    describe_other_type,
    is_pdf,
    render_pages,
    slide_file_names,
)
from jobledger.workers.processors.session.threaded_iteration import run_in_thread
from tests.processors.session.fixtures import make_pdf


def drawn(content: bytes, folder: Path, settings: SessionSettings | None = None) -> list[RenderedPage]:
    path = folder / "slides.pdf"
    path.write_bytes(content)
    return list(render_pages(path, settings or SessionSettings()))


def size_of(jpeg: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(jpeg)) as image:
        image.load()
        return image.size


def pdf_with_image(columns: int, rows: int) -> bytes:
    """A PDF of one page with a black image: `columns` × `rows` pixels in very few bytes."""
    pixels = zlib.compressobj(9)
    packed = b"".join(pixels.compress(bytes(columns)) for _ in range(rows)) + pixels.flush()
    drawing = b"q 200 0 0 200 0 0 cm /I Do Q"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R "
        b"/Resources << /XObject << /I 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing),
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8 "
        b"/Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (columns, rows, len(packed), packed),
    ]
    parts = [b"%PDF-1.4\n"]
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(sum(map(len, parts)))
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = sum(map(len, parts))
    parts.append(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    parts.append(b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("width", "height"),
    [(254, 143), (254, 190.5), (210, 297), (100, 100), (192.13, 108), (297.05, 167.09), (33.1, 900), (900, 7)],
)
def test_the_longest_side_is_as_asked_for_in_every_format(width: float, height: float, tmp_path: Path) -> None:
    (page,) = drawn(make_pdf(1, width=width, height=height), tmp_path)
    columns, rows = size_of(page.image)
    assert max(columns, rows) == 1280
    assert columns / rows == pytest.approx(width / height, rel=0.1)
    assert max(size_of(page.thumbnail)) == 320


def test_every_page_has_its_text_and_number(tmp_path: Path) -> None:
    pages = drawn(make_pdf(3, words="Über «Zustände»"), tmp_path)
    assert [(page.page_number, page.page_count, page.text) for page in pages] == [
        (number, 3, f"Über «Zustände» {number}") for number in (1, 2, 3)
    ]


def test_the_number_of_pixels_is_bounded(tmp_path: Path) -> None:
    (page,) = drawn(make_pdf(1), tmp_path, SessionSettings(max_image_pixels=100_000))
    columns, rows = size_of(page.image)
    assert 90_000 < columns * rows < 102_000


def test_a_page_with_a_giant_image_is_left_out(tmp_path: Path) -> None:
    content = pdf_with_image(20_000, 5_000)
    assert len(content) < 200_000
    (page,) = drawn(content, tmp_path)
    assert (page.problem, page.image) == ("contains an image of 20000 × 5000 pixels, more than allowed", b"")
    (allowed,) = drawn(pdf_with_image(200, 50), tmp_path)
    assert allowed.problem is None


@pytest.mark.parametrize("content", [b"%PDF-1.7", b"", b"hello", make_pdf(1)[:200]])
def test_a_damaged_pdf_is_told(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnreadablePdf, match="is damaged"):
        drawn(content, tmp_path)


def test_an_encrypted_pdf_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePdf, match="is protected by a password"):
        drawn(make_pdf(1, password="secret"), tmp_path)


def test_names_of_slides_sort_in_the_order_shown() -> None:
    names = [name for number in range(1, 501) for name in (slide_file_names(number)[0],)]
    assert names[:2] == ["slide-001.jpg", "slide-002.jpg"]
    assert names == sorted(names)
    assert slide_file_names(7) == ("slide-007.jpg", "slide-007-thumb.jpg")


def test_a_pdf_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content, expected in ((make_pdf(1), True), (b"\n\n" + make_pdf(1), True), (b"PK\x03\x04", False), (b"", False)):
        path.write_bytes(content)
        assert is_pdf(path) is expected


def test_other_types_are_known_by_their_ending() -> None:
    assert describe_other_type("https://conference.example/a/Talk.ODP?download=1") == "an OpenDocument presentation"
    assert describe_other_type("https://conference.example/a/talk.pdf") is None
    assert describe_other_type("https://conference.example/a/talk") is None


async def test_work_in_a_thread_is_closed_by_that_thread_when_the_reader_leaves() -> None:
    closed = Event()

    def work() -> Generator[int, None, None]:
        try:
            yield from range(1_000)
        finally:
            closed.set()

    seen = []
    async with aclosing(run_in_thread(work())) as items:
        async for item in items:
            seen.append(item)
            if len(seen) == 3:
                break
    assert seen == [0, 1, 2]
    assert closed.wait(10)


def pdf_of_scans(pages: int) -> bytes:
    """A PDF that has nothing but a picture on each page, as a scanner makes them, each a little different."""
    document = FPDF(unit="mm", format=(143, 254), orientation="landscape")
    for number in range(pages):
        document.add_page()
        noise = Image.effect_noise((640, 360), 20 + number % 50)
        document.image(noise, x=0, y=0, w=254, h=143)
    return bytes(document.output())


def test_a_pdf_of_pictures_only_becomes_slides_without_text(tmp_path: Path) -> None:
    pages = drawn(pdf_of_scans(3), tmp_path)
    assert [(page.page_number, page.text, page.problem) for page in pages] == [
        (number, "", None) for number in (1, 2, 3)
    ]
    assert len({page.image for page in pages}) == 3
    assert max(size_of(pages[0].image)) == 1280


_DRAW = """
import resource, sys
from pathlib import Path
from jobledger.workers.processors.session import SessionSettings
from jobledger.workers.processors.session.pdf_rendering import render_pages

numbers, half = [], 0
for page in render_pages(Path(sys.argv[1]), SessionSettings(slide_max_side_px=320)):
    assert page.image and page.thumbnail and not page.problem
    numbers.append(page.page_number)
    if page.page_number == page.page_count // 10:
        half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert numbers == list(range(1, page.page_count + 1))
print(page.page_count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - half) // 1024)
"""


def test_three_hundred_pages_take_no_more_memory_than_thirty(tmp_path: Path) -> None:
    path = tmp_path / "deck.pdf"
    path.write_bytes(pdf_of_scans(300))
    said = subprocess.run([sys.executable, "-c", _DRAW, path], check=True, capture_output=True, text=True, timeout=120)
    pages, megabytes_more = map(int, said.stdout.split())
    assert pages == 300
    assert megabytes_more < 50
