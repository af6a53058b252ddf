"""Render each page of a PDF as image and thumbnail, and extract its text and notes. Pictures are rendered as well.

PDFium runs in a helper process (`slide_helper.py`) in the sandbox, because a hostile page can keep it busy for ever,
take all memory or crash it. Then the process is killed, and another one continues with the next page.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

import PIL
import pypdfium2
from pydantic import BaseModel, ValidationError

from jobledger.workers.processor import SavedFile
from jobledger.workers.processors.session import slide_helper
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.slide_text import TextLine
from jobledger.workers.sandbox import runner

_HELPER: Final = str(Path(slide_helper.__file__).resolve())
_START_CODE: Final = (
    "import json, runpy, sys; sys.path += json.loads(sys.argv.pop(1)); "
    "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)
"""Run a script with packages that a bare interpreter does not find."""
_PACKAGE_PATHS: Final = sorted({str(Path(str(module.__file__)).resolve().parents[1]) for module in (PIL, pypdfium2)})
_LIMITS: Final = runner.ResourceLimits(memory_bytes=2 * 1024**3, file_bytes=0, processes=16)
_MAX_METADATA_BYTES: Final = 1024 * 1024
_MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024
_JPEG_START: Final = b"\xff\xd8"


class UnreadablePdf(Exception):
    """The PDF or picture cannot be opened. The message is a sentence without full stop."""


@dataclass(frozen=True, slots=True)
class RenderedPage:
    """One rendered page. With a `problem` it has no image.

    Attributes:
        page_number: Its number in the PDF.
        page_count: Number of pages of the PDF.
        image: JPEG.
        thumbnail: JPEG.
        lines: Lines of the slide.
        notes: Speaker notes in the PDF.
        is_extension: It shows all of the previous page, and perhaps more.
        is_blank: It has one colour and no text.
        recognition_image: JPEG for text recognition, if the page has no text.
        problem: Why it is not shown. Continues the sentence "The page …".
    """

    page_number: int
    page_count: int
    image: bytes = b""
    thumbnail: bytes = b""
    lines: list[TextLine] = field(default_factory=list)
    notes: str = ""
    is_extension: bool = False
    is_blank: bool = False
    recognition_image: bytes = b""
    problem: str | None = None


class Slide(SavedFile):
    """A saved slide image with its text, speaker notes and thumbnail. `number` is that of the page."""

    number: int
    text: str
    thumbnail: SavedFile
    notes: str = ""
    is_recognized: bool = False


_ERRORS: Final = {
    "password": "is protected by a password",
    "damaged": "is damaged",
    "memory": "needs too much memory",
}


class _Metadata(BaseModel):
    """The first part of a frame of the helper. Its other parts are images."""

    error: Literal["password", "damaged", "memory"] | None = None
    page_count: int | None = None
    problem: str | None = None
    lines: list[TextLine] | None = None
    notes: str = ""
    is_extension: bool = False
    is_blank: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    metadata: _Metadata
    image: bytes
    thumbnail: bytes
    recognition_image: bytes


class _HelperTimeout(Exception):
    """The helper has not written a frame in time."""


class _InvalidFrame(Exception):
    """The output of the helper does not match the protocol."""


def get_url_suffix(url: str) -> str:
    """Return the suffix of the path of `url`, such as `.pdf`."""
    return PurePosixPath(unquote(urlsplit(url).path)).suffix.lower()


def is_pdf(path: Path) -> bool:
    """Return whether the file has a PDF header in its first 1024 bytes (PDF 1.7, implementation note 13).

    A ZIP archive may contain a PDF there.
    """
    with path.open("rb") as file:
        begin = file.read(1024)
    return b"%PDF-" in begin and not begin.startswith(b"PK\x03\x04")


def is_picture(path: Path) -> bool:
    """Return whether the file is a picture in a format that is shown: PNG, JPEG, GIF or WebP."""
    with path.open("rb") as file:
        begin = file.read(12)
    return begin.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")) or (begin[:4], begin[8:]) == (b"RIFF", b"WEBP")


def make_slide_file_names(number: int) -> tuple[str, str]:
    """Return the file names of the image and thumbnail of slide `number`. They sort in slide order."""
    return f"slide-{number:03}.jpg", f"slide-{number:03}-thumb.jpg"


async def render_pages(
    path: Path, settings: SessionSettings, scratch: Path, *, is_picture: bool = False, recognizes_text: bool = False
) -> AsyncGenerator[RenderedPage, None]:
    """Render the first `settings.max_pdf_pages` pages of the file at `path`. Use with `contextlib.aclosing`.

    Args:
        path: Absolute path of a PDF or a picture.
        settings: Sizes and limits.
        scratch: A directory. Nothing is written to it.
        is_picture: The file is a picture.
        recognizes_text: Pages without text get an image for text recognition.

    Raises:
        UnreadablePdf: The file is damaged, needs a password, or takes too long to open.
    """
    request = slide_helper.Request(
        source=str(path),
        is_picture=is_picture,
        first_page=1,
        max_pages=settings.max_pdf_pages,
        max_side=settings.slide_max_side_px,
        thumbnail_side=settings.thumbnail_max_side_px,
        quality=settings.jpeg_quality,
        max_pixels=settings.max_image_pixels,
        merges_overlays=settings.merge_overlays,
        recognizes_text=recognizes_text,
    )
    subject = "The picture" if is_picture else "The PDF"
    page = RenderedPage(1, 0)  # what is known of the page that is being rendered
    while page.page_count == 0 or page.page_number <= min(page.page_count, settings.max_pdf_pages):
        problem = "could not be rendered: the renderer crashed or ran out of memory"
        try:
            async with aclosing(_read_frames(request, scratch, settings.slide_timeout_seconds)) as frames:
                async for frame in frames:
                    metadata = frame.metadata
                    if metadata.error is not None:
                        raise UnreadablePdf(f"{subject} {_ERRORS[metadata.error]}")
                    if metadata.page_count == 0:
                        raise UnreadablePdf(f"{subject} has no pages")
                    if metadata.page_count is not None:
                        page = replace(page, page_count=metadata.page_count)
                    elif metadata.lines is not None:
                        page = replace(page, lines=metadata.lines, notes=metadata.notes)
                    elif page.page_number <= min(page.page_count, settings.max_pdf_pages):
                        yield _add_image(page, frame)
                        page = RenderedPage(page.page_number + 1, page.page_count)
                    else:
                        return
        except _HelperTimeout:
            problem = f"was not rendered within {settings.slide_timeout_seconds:g} seconds"
        if page.page_count == 0:
            raise UnreadablePdf(f"{subject} {problem}")
        if page.page_number <= min(page.page_count, settings.max_pdf_pages):
            yield replace(page, problem=problem)
            page = RenderedPage(page.page_number + 1, page.page_count)
            request = replace(request, first_page=page.page_number)


def _add_image(page: RenderedPage, frame: _Frame) -> RenderedPage:
    if frame.metadata.problem is not None or not (frame.image and frame.thumbnail):
        return replace(page, problem=frame.metadata.problem or "has no image")
    return replace(
        page,
        image=frame.image,
        thumbnail=frame.thumbnail,
        recognition_image=frame.recognition_image,
        is_extension=frame.metadata.is_extension,
        is_blank=frame.metadata.is_blank and not page.lines,
    )


async def _read_frames(
    request: slide_helper.Request, scratch: Path, timeout_seconds: float
) -> AsyncGenerator[_Frame, None]:
    """Start the helper and yield its frames until it ends.

    Raises:
        _HelperTimeout: There was no frame for `timeout_seconds`.
    """
    command = runner.build_python_command(
        "-c", _START_CODE, json.dumps(_PACKAGE_PATHS), _HELPER, json.dumps(asdict(request))
    )
    readable_paths = [Path(request.source), *map(Path, _PACKAGE_PATHS)]
    program = runner.Program(command, scratch, readable_paths, limits=_LIMITS, can_run_unconfined=True)
    async with runner.start_program(program) as output:
        while True:
            try:
                async with asyncio.timeout(timeout_seconds):
                    frame = await _read_frame(output)
            except (asyncio.IncompleteReadError, _InvalidFrame):
                return
            except TimeoutError as error:
                raise _HelperTimeout from error
            yield frame


async def _read_frame(output: asyncio.StreamReader) -> _Frame:
    """Read a frame. The helper is not trusted after it has read a hostile file.

    Raises:
        asyncio.IncompleteReadError: The helper has ended.
        _InvalidFrame: The frame is too large or does not match the protocol.
    """
    metadata_size, *image_sizes = slide_helper.HEADER.unpack(await output.readexactly(slide_helper.HEADER.size))
    if metadata_size > _MAX_METADATA_BYTES or max(image_sizes) > _MAX_IMAGE_BYTES:
        raise _InvalidFrame
    try:
        metadata = _Metadata.model_validate_json(await output.readexactly(metadata_size))
    except ValidationError as error:
        raise _InvalidFrame from error
    images = [await output.readexactly(size) for size in image_sizes]
    if not all(image.startswith(_JPEG_START) for image in images if image):
        raise _InvalidFrame
    return _Frame(metadata, *images)
