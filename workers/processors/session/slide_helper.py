"""Render the pages of a PDF, or a picture. `pdf_rendering` runs this script in the sandbox.

The argument is a JSON object with the attributes of `Request`. The script writes frames to standard output: first the
number of pages or an error, then two for each page, its text and its image. It imports only the standard library,
pypdfium2 and Pillow.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import re
import resource
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import pypdfium2
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError

HEADER: Final = struct.Struct(">4I")
"""Sizes of the parts of a frame: metadata as JSON, image, thumbnail, image for text recognition."""
MAX_PAGE_CHARACTERS: Final = 20_000
MAX_ANNOTATIONS: Final = 200
MAX_NOTE_CHARACTERS: Final = 4_000
MAX_LABELS: Final = 2_000
RECOGNITION_SIDE: Final = 2_000
"""Longer side of the image for text recognition, in pixels. Tesseract needs letters of at least 20 pixels."""
_BYTES_PER_PIXEL: Final = 4
"""Memory for an embedded image in the worst case, a progressive JPEG. PDFium decodes most others line by line."""
_OTHER_MEMORY: Final = 256 * 2**20
_COMPARED_SIDE: Final = 320
_EDGE_CONTRAST: Final = 16
_OTHER_COLOR: Final = 48
_MARGIN: Final = 0.1
"""Height of the header and of the footer, as a fraction of the page."""
_MAX_LOST_PIXELS: Final = 4
_MAX_NUMBER_PIXELS: Final = 24
"""How many of the compared pixels may change; the second if the page number changes."""
_MIN_CORRELATION: Final = 0.7
_MIN_SPREAD_WIDTH: Final = 2.4
"""Width of a page with notes beside the slide, as a multiple of its height. The narrowest is twice 5:4."""
_WORD: Final = re.compile(r"\w+")

Frame = tuple[dict[str, Any], bytes, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Request:
    """What to render.

    Attributes:
        source: Path of the file.
        is_picture: Whether it is a picture instead of a PDF.
        first_page: Number of the first page to render.
        max_pages: Number of the last page to render.
        max_side: Longer side of an image, in pixels.
        thumbnail_side: Longer side of a thumbnail, in pixels.
        quality: JPEG quality.
        max_pixels: Largest image that is rendered or decoded.
        merges_overlays: Whether pages are compared with the page before.
        recognizes_text: Whether pages without text have an image for text recognition.
    """

    source: str
    is_picture: bool
    first_page: int
    max_pages: int
    max_side: int
    thumbnail_side: int
    quality: int
    max_pixels: int
    merges_overlays: bool
    recognizes_text: bool


@dataclass(frozen=True, slots=True)
class _Appearance:
    """A page as far as it is compared with its neighbours."""

    words: list[str]
    words_without_number: list[str]
    label: str
    small: Image.Image
    edges: Image.Image


def main() -> None:
    """Write the frames of the file: `page_count` or `error`, then text and image of each page."""
    request = Request(**json.loads(sys.argv[1]))
    for metadata, *images in render(request):
        parts = [json.dumps(metadata).encode(), *images]
        sys.stdout.buffer.write(HEADER.pack(*map(len, parts)) + b"".join(parts))
        sys.stdout.buffer.flush()
    os._exit(0)  # skips PDFium's cleanup, which may crash on damaged files


def render(request: Request) -> Iterator[Frame]:
    """Yield the frames of a PDF or a picture."""
    return _render_picture(request) if request.is_picture else _render_pdf(request)


def _render_pdf(request: Request) -> Iterator[Frame]:
    try:
        document = pypdfium2.PdfDocument(request.source)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_SUCCESS:  # PDFium opens no PDF without pages
            yield _make_frame(page_count=0)
        else:
            is_locked = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
            yield _make_frame(error="password" if is_locked else "damaged")
        return
    count = len(document)
    yield _make_frame(page_count=count)
    last = min(count, request.max_pages)
    labels = [_read_label(document, index) for index in range(min(last, MAX_LABELS))]
    has_overlay_labels = any(label and label == following for label, following in pairwise(labels))
    is_spread = _has_notes_beside_slides(document, last)
    previous: _Appearance | None = None
    for index in range(request.first_page - 1, last):
        try:
            with closing(document[index]) as page:
                lines, notes = _read_text(page, is_spread=is_spread)
                yield _make_frame(page=index + 1, lines=lines, notes=notes)
                if problem := _find_problem(page, request):
                    yield _make_frame(page=index + 1, problem=problem)
                    previous = None
                    continue
                image = _render_page(page, request.max_side, request, is_spread=is_spread)
                needs_recognition = request.recognizes_text and not lines
                for_recognition = (
                    _render_page(page, RECOGNITION_SIDE, request, is_spread=is_spread) if needs_recognition else None
                )
            label = labels[index] if index < len(labels) else ""
            current = _compute_appearance(image, lines, index + 1, label) if request.merges_overlays else None
            is_extension = bool(
                previous and current and _is_overlay(previous, current, has_overlay_labels=has_overlay_labels)
            )
            yield _make_image_frame(request, index + 1, image, for_recognition, is_extension=is_extension)
            previous = current
        except (pypdfium2.PdfiumError, MemoryError, OSError, ValueError):
            yield _make_frame(page=index + 1, problem="is damaged")
            previous = None


def _make_frame(**metadata: Any) -> Frame:
    return metadata, b"", b"", b""


def _make_image_frame(
    request: Request,
    number: int,
    image: Image.Image,
    for_recognition: Image.Image | None,
    *,
    is_extension: bool = False,
) -> Frame:
    thumbnail = image.copy()
    thumbnail.thumbnail((request.thumbnail_side,) * 2, Image.Resampling.LANCZOS)
    metadata = {"page": number, "is_extension": is_extension, "is_blank": _is_blank(image)}
    recognized = _encode(for_recognition.convert("L"), 90) if for_recognition and not metadata["is_blank"] else b""
    return metadata, _encode(image, request.quality), _encode(thumbnail, request.quality), recognized


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def _is_blank(image: Image.Image) -> bool:
    return all(low == high for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]  # one pair per band


def _find_problem(page: Any, request: Request) -> str | None:
    """Return why the page must not be rendered."""
    width, height = page.get_size()
    if not (math.isfinite(width * height) and width * height > 0):
        return "has no size"
    max_pixels = _limit_pixels(request)
    for image in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE]):
        columns, rows = image.get_px_size()
        if columns * rows > max_pixels:
            return f"contains an image of {columns} × {rows} pixels, more than allowed"
    return None


def _limit_pixels(request: Request) -> int:
    """Return the size of the largest image for which the memory suffices. With less, PDFium omits it silently."""
    limits = [resource.getrlimit(name)[0] for name in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if not (finite := [limit for limit in limits if limit != resource.RLIM_INFINITY]):
        return request.max_pixels
    memory = min(finite)
    return min(request.max_pixels, max(0, memory - _OTHER_MEMORY) // _BYTES_PER_PIXEL)


def _render_page(page: Any, max_side: int, request: Request, *, is_spread: bool) -> Image.Image:
    width, height = page.get_size()
    crop = (0, 0, width / 2, 0) if is_spread else (0, 0, 0, 0)
    width -= crop[2]
    scale = min(max_side / max(width, height), math.sqrt(request.max_pixels / (width * height)))
    with closing(page.render(scale=scale, crop=crop, rev_byteorder=True)) as bitmap:
        # PDFium rounds up. The crop removes the extra pixel.
        sides = (min(side, max_side) for side in (bitmap.width, bitmap.height))
        image: Image.Image = bitmap.to_pil().convert("RGB").crop((0, 0, *sides))
    return image


# Text ---------------------------------------------------------------------------------------------------------------


def _read_text(page: Any, *, is_spread: bool) -> tuple[list[tuple[str, float]], str]:
    """Return the lines of the slide, each with its vertical position (0 is the top, 1 the bottom), and the notes."""
    with closing(page.get_textpage()) as textpage:
        lines = _read_lines(page, textpage)
    annotations = _read_annotations(page)
    if not is_spread:
        return [(text, top) for text, _, top in lines], "\n".join(annotations)
    slide = [(text, top) for text, left, top in lines if left < 0.5]
    own = {" ".join(text.split()) for text, _ in slide}
    beside = [text for text, left, _ in lines if left >= 0.5 and " ".join(text.split()) not in own]
    return slide, "\n".join([*beside, *annotations])[:MAX_NOTE_CHARACTERS]


def _read_lines(page: Any, textpage: Any) -> list[tuple[str, float, float]]:
    """Return the lines inside the page with their left and top positions as fractions of its size."""
    lines, start = [], 0
    text = textpage.get_text_range(0, min(textpage.count_chars(), MAX_PAGE_CHARACTERS))
    for line in re.split(r"(\r?\n)", text):
        first = start + len(line) - len(line.lstrip())
        start += len(line)
        if line.strip() and (place := _find_place(page, textpage, first)) is not None:
            lines.append((line, *place))
    return lines


def _find_place(page: Any, textpage: Any, index: int) -> tuple[float, float] | None:
    """Return the position of a character, or None if it is outside the page."""
    try:
        left, bottom, right, top = textpage.get_charbox(index)
    except (pypdfium2.PdfiumError, IndexError):
        return 0.0, 0.5
    x, y, size = ctypes.c_int(), ctypes.c_int(), 10_000
    pypdfium2.raw.FPDF_PageToDevice(
        page, 0, 0, size, size, 0, (left + right) / 2, (bottom + top) / 2, ctypes.byref(x), ctypes.byref(y)
    )
    return (x.value / size, y.value / size) if 0 <= x.value <= size and 0 <= y.value <= size else None


def _read_annotations(page: Any) -> list[str]:
    """Return the texts of the page's notes: annotations of the type Text (PDF 1.7, 12.5.6.4)."""
    raw, notes = pypdfium2.raw, []
    for index in range(min(raw.FPDFPage_GetAnnotCount(page), MAX_ANNOTATIONS)):
        annotation = raw.FPDFPage_GetAnnot(page, index)
        if not annotation:
            continue
        try:
            if raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_TEXT:
                notes.append(_read_contents(annotation))
        finally:
            raw.FPDFPage_CloseAnnot(annotation)
    return [note for note in notes if note.strip()]


def _read_contents(annotation: Any) -> str:
    size = pypdfium2.raw.FPDFAnnot_GetStringValue(annotation, b"Contents", None, 0)
    if not 2 < size <= 100 * MAX_NOTE_CHARACTERS:
        return ""
    buffer = (ctypes.c_ushort * (size // 2))()
    pypdfium2.raw.FPDFAnnot_GetStringValue(annotation, b"Contents", buffer, size)
    return bytes(buffer).decode("utf-16-le", errors="ignore").rstrip("\0")[:MAX_NOTE_CHARACTERS]


def _has_notes_beside_slides(document: Any, last: int) -> bool:
    """Return whether the right half of each page is a page of notes (Beamer: `show notes on second screen`)."""
    try:
        if "beamer" not in document.get_metadata_value("Creator").lower():
            return False
        return last > 0 and all(_is_spread(document, index) for index in range(min(last, 10)))
    except (pypdfium2.PdfiumError, ValueError):
        return False


def _is_spread(document: Any, index: int) -> bool:
    with closing(document[index]) as page, closing(page.get_textpage()) as textpage:
        width, height = page.get_size()
        if width < _MIN_SPREAD_WIDTH * height:
            return False
        boxes = (textpage.get_rect(number) for number in range(min(textpage.count_rects(), 1_000)))
        return all(right <= width / 2 or left >= width / 2 for left, _, right, _ in boxes)


# Overlays -----------------------------------------------------------------------------------------------------------


def _read_label(document: Any, index: int) -> str:
    try:
        label: str = document.get_page_label(index)
    except (pypdfium2.PdfiumError, ValueError):
        return ""
    return label


def _compute_appearance(image: Image.Image, lines: list[tuple[str, float]], number: int, label: str) -> _Appearance:
    small = image.convert("L")
    small.thumbnail((_COMPARED_SIDE,) * 2, Image.Resampling.BOX)
    brightest, darkest = small.filter(ImageFilter.MaxFilter(3)), small.filter(ImageFilter.MinFilter(3))
    edges = ImageChops.subtract(brightest, darkest).point(lambda contrast: 255 if contrast > _EDGE_CONTRAST else 0)
    return _Appearance(_list_words(lines), _list_words(lines, number), label, small, edges)


def _list_words(lines: list[tuple[str, float]], number: int | None = None) -> list[str]:
    """Return the words of a page. In its header and footer, `number` is replaced by `#`."""
    words: list[str] = []
    for text, top in lines:
        is_margin = top < _MARGIN or top > 1 - _MARGIN
        words += ["#" if is_margin and word == str(number) else word for word in _WORD.findall(text)]
    return words


def _is_overlay(previous: _Appearance, current: _Appearance, *, has_overlay_labels: bool) -> bool:
    """Return whether the page shows all of the previous page, and perhaps more.

    Pages of one Beamer frame have the same label. There, text may change its colour.
    """
    has_same_label = has_overlay_labels and previous.label == current.label != ""
    if (has_overlay_labels and not has_same_label) or previous.small.size != current.small.size:
        return False
    tolerance = _MAX_LOST_PIXELS
    if not _is_contained(previous.words, current.words):
        if not _is_contained(previous.words_without_number, current.words_without_number):
            return False
        tolerance = _MAX_NUMBER_PIXELS
    if _count(previous.edges) == 0 and not previous.words:
        return has_same_label
    if _count(ImageChops.subtract(previous.edges, current.edges.filter(ImageFilter.MaxFilter(3)))) > tolerance:
        return False
    changed = ImageChops.difference(previous.small, current.small).point(lambda by: 255 if by > _OTHER_COLOR else 0)
    changed_edges = ImageChops.darker(previous.edges, changed)
    if _count(changed_edges) <= tolerance:
        return True
    return has_same_label and bool(previous.words) and _is_recolored(previous.small, current.small, changed_edges)


def _is_contained(words: list[str], other_words: list[str]) -> bool:
    """Return whether all `words` are in `other_words`, in the same order."""
    remaining = iter(other_words)
    return all(word in remaining for word in words)


def _is_recolored(small: Image.Image, other: Image.Image, mask: Image.Image) -> bool:
    """Return whether the shapes near the pixels of `mask` are the same. Their contrast may differ."""
    near = mask.filter(ImageFilter.MaxFilter(5)).tobytes()
    contrasts = zip(near, _list_contrasts(small), _list_contrasts(other), strict=True)
    pairs = [pair for is_near, *pair in contrasts if is_near]
    product = sum(first * second for first, second in pairs)
    norm = math.sqrt(sum(first**2 for first, _ in pairs) * sum(second**2 for _, second in pairs))
    return product >= _MIN_CORRELATION * norm > 0


def _list_contrasts(small: Image.Image) -> list[int]:
    """Return the difference of each pixel from its surroundings."""
    blurred = small.filter(ImageFilter.BoxBlur(2))
    return [pixel - around for pixel, around in zip(small.tobytes(), blurred.tobytes(), strict=True)]


def _count(mask: Image.Image) -> int:
    return mask.histogram()[255]


# Pictures -----------------------------------------------------------------------------------------------------------


def _render_picture(request: Request) -> Iterator[Frame]:
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # the limit of the request applies
    try:
        with Image.open(request.source, formats=("PNG", "JPEG", "GIF", "WEBP")) as source:
            yield _make_frame(page_count=1)
            columns, rows = source.size
            if columns * rows > _limit_pixels(request):
                problem = f"contains an image of {columns} × {rows} pixels, more than allowed"
                yield _make_frame(page=1, problem=problem)
                return
            for_recognition = _scale(source, max(RECOGNITION_SIDE, request.max_side))
        image = for_recognition.copy()
        image.thumbnail((request.max_side,) * 2, Image.Resampling.LANCZOS)
        yield _make_frame(page=1, lines=[], notes="")
        yield _make_image_frame(request, 1, image, for_recognition if request.recognizes_text else None)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        yield _make_frame(error="damaged")
    except MemoryError:
        yield _make_frame(error="memory")


def _scale(source: Image.Image, max_side: int) -> Image.Image:
    """Return the picture in RGB on white, upright, with at most `max_side` pixels on its longer side."""
    source.draft("RGB", (max_side, max_side))  # makes the JPEG decoder scale
    factor = max(source.size) // (2 * max_side)
    has_palette = source.mode in ("1", "P")
    small = source.reduce(factor) if factor > 1 and not has_palette else source
    if has_palette or "transparency" in small.info:
        small = small.convert("RGBA")
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    small = ImageOps.exif_transpose(small)
    if small.mode in ("RGBA", "LA", "PA"):
        small = small.convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    return small.convert("RGB")


if __name__ == "__main__":
    main()
