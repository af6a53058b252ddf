"""Render each page of a PDF as image and thumbnail, and extract its text. One page at a time limits memory use."""

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

OTHER_TYPES = {
    **dict.fromkeys((".ppt", ".pptx", ".pps", ".ppsx"), "a PowerPoint file"),
    **dict.fromkeys((".odp", ".fodp"), "an OpenDocument presentation"),
    ".key": "a Keynote file",
    **dict.fromkeys((".htm", ".html"), "a web page"),
    **dict.fromkeys((".zip", ".gz", ".tgz", ".xz", ".7z"), "an archive"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"), "an image"),
    **dict.fromkeys((".doc", ".docx", ".odt", ".md", ".txt"), "a text document"),
}
"""Types of attachments other than PDF, by suffix."""


class UnreadablePdf(Exception):
    """The PDF cannot be opened. The message continues the sentence "The PDF …"."""


@dataclass(frozen=True, slots=True)
class RenderedPage:
    """One rendered page. With a `problem` it has no image."""

    page_number: int
    page_count: int
    image: bytes = b""
    thumbnail: bytes = b""
    text: str = ""
    problem: str | None = None


class Slide(SavedFile):
    """A saved slide image with its text and thumbnail."""

    number: int
    text: str
    thumbnail: SavedFile


def get_url_suffix(url: str) -> str:
    """Return the suffix of the path of `url`, such as `.pdf`."""
    return PurePosixPath(unquote(urlsplit(url).path)).suffix.lower()


def is_pdf(path: Path) -> bool:
    """Return whether the file has a PDF header in its first 1024 bytes (PDF 1.7, implementation note 13)."""
    with path.open("rb") as file:
        return b"%PDF-" in file.read(1024)


def make_slide_file_names(number: int) -> tuple[str, str]:
    """Return the file names of the image and thumbnail of slide `number`. They sort in slide order."""
    return f"slide-{number:03}.jpg", f"slide-{number:03}-thumb.jpg"


def render_pages(path: Path, settings: SessionSettings) -> Generator[RenderedPage, None, None]:
    """Render the first `settings.max_pdf_pages` pages of the PDF at `path`.

    Raises:
        UnreadablePdf: The PDF is damaged or needs a password.
    """
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise UnreadablePdf("is protected by a password") from error
        raise UnreadablePdf("is damaged") from error
    with closing(document):
        page_count = len(document)
        for index in range(min(page_count, settings.max_pdf_pages)):
            yield _render_page(document, index, page_count, settings)


def _render_page(document: Any, index: int, page_count: int, settings: SessionSettings) -> RenderedPage:
    number = index + 1
    try:
        with closing(document[index]) as page:
            if problem := _find_problem(page, settings):
                return RenderedPage(number, page_count, problem=problem, text=_extract_text(page))
            with closing(page.render(scale=_compute_scale(page, settings), rev_byteorder=True)) as bitmap:
                # PDFium rounds up. The crop removes the extra pixel.
                sides = (min(side, settings.slide_max_side_px) for side in (bitmap.width, bitmap.height))
                image = bitmap.to_pil().convert("RGB").crop((0, 0, *sides))
            jpeg, thumbnail = _encode_jpeg(image, settings), _make_thumbnail(image, settings)
            return RenderedPage(number, page_count, jpeg, thumbnail, _extract_text(page))
    except (pypdfium2.PdfiumError, MemoryError):
        return RenderedPage(number, page_count, problem="is damaged")


def _compute_scale(page: Any, settings: SessionSettings) -> float:
    width, height = page.get_size()
    by_side: float = settings.slide_max_side_px / max(width, height)
    return min(by_side, math.sqrt(settings.max_image_pixels / (width * height)))


def _find_problem(page: Any, settings: SessionSettings) -> str | None:
    """Return why the page must not be rendered. A small file can contain an image with a billion pixels."""
    width, height = page.get_size()
    if not (math.isfinite(width * height) and width * height > 0):
        return "has no size"
    for image in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
        columns, rows = image.get_px_size()
        if columns * rows > settings.max_image_pixels:
            return f"contains an image of {columns} × {rows} pixels, more than allowed"
    return None


def _encode_jpeg(image: Image.Image, settings: SessionSettings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, optimize=True)
    return buffer.getvalue()


def _make_thumbnail(image: Image.Image, settings: SessionSettings) -> bytes:
    thumbnail = image.copy()
    thumbnail.thumbnail((settings.thumbnail_max_side_px,) * 2, Image.Resampling.LANCZOS)
    return _encode_jpeg(thumbnail, settings)


def _extract_text(page: Any) -> str:
    with closing(page.get_textpage()) as text:
        lines = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff]", " ", text.get_text_bounded()).splitlines()
    return "\n".join(words for line in lines if (words := " ".join(line.split())))[:MAX_PAGE_TEXT_CHARACTERS]
