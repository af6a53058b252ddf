"""session: a PDF becomes an image, a thumbnail and the text of each page. One page at a time: memory stays bounded."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pypdfium2
from PIL import Image

from jobledger.workers.processor import SavedFile
from jobledger.workers.processors.session.settings import SessionSettings

MAX_PAGE_TEXT_CHARACTERS = 4_000

_OTHER_TYPES = {
    **dict.fromkeys((".ppt", ".pptx", ".pps", ".ppsx"), "a PowerPoint file"),
    **dict.fromkeys((".odp", ".fodp"), "an OpenDocument presentation"),
    ".key": "a Keynote file",
    **dict.fromkeys((".htm", ".html"), "a web page"),
    **dict.fromkeys((".zip", ".gz", ".tgz", ".xz", ".7z"), "an archive"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"), "an image"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".md", ".txt"), "a text document"),
}


class UnreadablePdf(Exception):
    """The PDF cannot be opened; the message is the rest of a sentence that begins with "the PDF"."""


@dataclass(frozen=True, slots=True)
class RenderedPage:
    """One page of `pages`, drawn; or, with a `problem`, only counted."""

    page_number: int
    page_count: int
    image: bytes = b""
    thumbnail: bytes = b""
    text: str = ""
    problem: str | None = None


class Slide(SavedFile):
    """A slide's image as it was stored, what is written on it, and its small version."""

    number: int
    text: str
    thumbnail: SavedFile


def describe_other_type(url: str) -> str | None:
    """What `url` leads to according to its ending, if that is no PDF."""
    return _OTHER_TYPES.get(url_suffix(url))


def url_suffix(url: str) -> str:
    """How the path of `url` ends: `.pdf`."""
    return PurePosixPath(unquote(urlsplit(url).path)).suffix.lower()


def is_pdf(path: Path) -> bool:
    """PDF 1.7, implementation note 13: the header may stand anywhere in the first 1024 bytes."""
    with path.open("rb") as file:
        return b"%PDF-" in file.read(1024)


def slide_file_names(number: int) -> tuple[str, str]:
    """The names of slide `number` and its thumbnail; 500 pages sort as they were shown."""
    return f"slide-{number:03}.jpg", f"slide-{number:03}-thumb.jpg"


def render_pages(path: Path, settings: SessionSettings) -> Generator[RenderedPage, None, None]:
    """Draw the first `settings.max_pages` pages of the PDF at `path`.

    Raises:
        Unreadable: it is damaged or wants a password.
    """
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise UnreadablePdf("is protected by a password") from error
        raise UnreadablePdf("is damaged") from error
    with closing(document):
        pages = len(document)
        for index in range(min(pages, settings.max_pdf_pages)):
            yield _draw_page(document, index, pages, settings)


def _draw_page(document: Any, index: int, pages: int, settings: SessionSettings) -> RenderedPage:
    number = index + 1
    try:
        with closing(document[index]) as page:
            if problem := _too_much(page, settings):
                return RenderedPage(number, pages, problem=problem, text=_text(page))
            with closing(page.render(scale=_scale(page, settings), rev_byteorder=True)) as bitmap:
                # PDFium rounds up: the crop takes off the one pixel too many.
                sides = (min(side, settings.slide_max_side_px) for side in (bitmap.width, bitmap.height))
                image = bitmap.to_pil().convert("RGB").crop((0, 0, *sides))
            return RenderedPage(number, pages, _jpeg(image, settings), _thumbnail(image, settings), _text(page))
    except (pypdfium2.PdfiumError, MemoryError):
        return RenderedPage(number, pages, problem="is damaged")


def _scale(page: Any, settings: SessionSettings) -> float:
    width, height = page.get_size()
    by_side: float = settings.slide_max_side_px / max(width, height)
    return min(by_side, math.sqrt(settings.max_image_pixels / (width * height)))


def _too_much(page: Any, settings: SessionSettings) -> str | None:
    """A small file can hold an image of a billion pixels, and drawing the page would unpack it."""
    width, height = page.get_size()
    if not (math.isfinite(width * height) and width * height > 0):
        return "has no size"
    for image in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
        columns, rows = image.get_px_size()
        if columns * rows > settings.max_image_pixels:
            return f"holds an image of {columns} × {rows} pixels, more than allowed"
    return None


def _jpeg(image: Image.Image, settings: SessionSettings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, optimize=True)
    return buffer.getvalue()


def _thumbnail(image: Image.Image, settings: SessionSettings) -> bytes:
    small = image.copy()
    small.thumbnail((settings.thumbnail_max_side_px,) * 2, Image.Resampling.LANCZOS)
    return _jpeg(small, settings)


def _text(page: Any) -> str:
    with closing(page.get_textpage()) as text:
        lines = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]", " ", text.get_text_bounded()).splitlines()
    return "\n".join(words for line in lines if (words := " ".join(line.split())))[:MAX_PAGE_TEXT_CHARACTERS]
