"""Store the images of a page as results of the job, and write the Markdown of those that cannot be stored.

Images are decoded and encoded again, so that no bytes of the site are published. SVG is active content and only linked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, ImageOps

from jobledger.workers.processor import ProcessorError, SavedFile
from jobledger.workers.processors.session.download import choose_retry_delay
from jobledger.workers.processors.session.page import PageText
from jobledger.workers.processors.session.safe_markdown import IMAGE_TARGET_PREFIX, escape_link_target
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.step_context import StepContext

MAX_CONCURRENT: Final = 4
_MAX_TRIES: Final = 3
MIN_PIXELS: Final = 24
"""Images with a shorter side are decoration."""
_MAX_PIXELS: Final = 50_000_000
"""Larger images are only linked. They are decoded in the memory of the job process."""
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
_PHOTO_COLORS: Final = 4096
"""An image with more colours is stored as JPEG, others as PNG."""
_IMAGE_IN_LINK: Final = re.compile(
    rf"\[!\[((?:[^\[\]\\]|\\.)*)\]\({IMAGE_TARGET_PREFIX}(\d+)\)\](?=\()|!\[((?:[^\[\]\\]|\\.)*)\]\({IMAGE_TARGET_PREFIX}(\d+)\)"
)


class UnusableImage(Exception):
    """The image cannot be stored. The message continues the sentence "The image …"."""


class EncodedImage(NamedTuple):
    """An image that was encoded again. It is decoration if `content` is empty."""

    content: bytes
    suffix: str

    @property
    def media_type(self) -> str:
        return "image/png" if self.suffix == "png" else "image/jpeg"


async def store_images(ctx: StepContext, page: PageText) -> PageText:
    """Return the page with the first images stored as assets, and links instead of the others.

    A problem with an image is logged and costs only this image. There are limits for number, size and time. If the
    problem may be gone when the job is restarted, there is a warning.
    """
    settings = ctx.settings
    urls = page.image_urls[: settings.page_max_images]
    stored: dict[int, SavedFile | None] = {}
    problems: list[str] = []
    slots = asyncio.Semaphore(MAX_CONCURRENT)
    deadline = asyncio.get_running_loop().time() + settings.page_images_timeout_seconds

    async def store(number: int, url: str) -> None:
        async with slots:
            ctx.raise_if_cancelled()
            try:
                stored[number] = await _store_image(ctx, number, url, deadline)
            except (ProcessorError, UnusableImage) as error:
                shown = "in the page" if url.startswith("data:") else url
                await ctx.job.log("info", f"The image {shown} is not stored: {error}")
                if isinstance(error, ProcessorError) and error.transient:
                    problems.append(error.message)

    tasks = [asyncio.create_task(store(number, url)) for number, url in enumerate(urls, 1)]
    try:
        if tasks:
            await ctx.job.report_progress(15, "Fetching the images of the page")
            await asyncio.wait(tasks, timeout=settings.page_images_timeout_seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    late = sum(task.cancelled() for task in tasks)
    problems += [f"They were not fetched within {settings.page_images_timeout_seconds:g} seconds."] * late
    warnings = [f"Images of the page that are only linked: {len(problems)}. {problems[0]}"] if problems else []
    return page.model_copy(
        update={
            "markdown": place_images(page.markdown, page.image_urls, stored),
            "images": [file for _, file in sorted(stored.items()) if file is not None],
            "image_urls": [],
            "warnings": [*page.warnings, *warnings],
            "may_change": page.may_change or bool(problems),
        }
    )


async def _store_image(ctx: StepContext, number: int, url: str, deadline: float) -> SavedFile | None:
    """Store one image. Return None if it is decoration."""
    if url.startswith("data:"):
        content = decode_data_url(url)
    elif urlsplit(url).path.lower().endswith((".svg", ".svgz")):
        raise UnusableImage("is an SVG file, which may contain scripts")
    else:
        content = await _fetch_image(ctx, url, deadline)
    image = await asyncio.to_thread(partial(encode_image, content, ctx.settings))
    if image is None:
        return None
    path = ctx.result_layout.build_asset_path(f"{IMAGE_TARGET_PREFIX.rpartition('/')[2]}{number}.{image.suffix}")
    return await ctx.job.save(path, image.content, image.media_type)


async def _fetch_image(ctx: StepContext, url: str, deadline: float) -> bytes:
    """Fetch an image. Try again after a transient error if the deadline, in the time of the loop, permits it."""
    loop, tries = asyncio.get_running_loop(), 1
    while True:
        try:
            response = await ctx.fetcher.fetch(
                url,
                max_bytes=ctx.settings.page_image_max_bytes,
                timeout_seconds=ctx.settings.page_images_timeout_seconds,
                accept="image/png, image/jpeg, image/webp, image/gif",
            )
        except ProcessorError as error:
            delay = choose_retry_delay(tries, error) if error.transient and tries < _MAX_TRIES else None
            if delay is None or loop.time() + delay >= deadline:
                raise
            tries += 1
            await ctx.sleep(delay)
        else:
            return response.body


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a `data:` URL (RFC 2397).

    Raises:
        UnusableImage: The URL is malformed.
    """
    head, comma, data = url.partition(",")
    try:
        content = unquote_to_bytes(data)
        if not comma:
            raise ValueError("no comma")
        return base64.b64decode(content) if head.endswith(";base64") else content
    except (ValueError, binascii.Error) as error:
        raise UnusableImage("is not a valid data URL") from error


def encode_image(content: bytes, settings: SessionSettings) -> EncodedImage | None:
    """Decode an image and encode it as PNG or JPEG without metadata. Of an animation, the first frame is kept.

    Returns:
        None if the image is so small that it is decoration.

    Raises:
        UnusableImage: The image has another format, is damaged, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images, which are checked below
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > min(_MAX_PIXELS, settings.max_image_pixels):
                    raise UnusableImage(f"has {width} × {height} pixels, more than allowed")
                if min(width, height) < MIN_PIXELS:
                    return None
                image.draft("RGB", (settings.slide_max_side_px,) * 2)
                return _encode(ImageOps.exif_transpose(image), settings)
    except UnusableImage:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise UnusableImage("is damaged, or not a PNG, JPEG, WebP or GIF file") from error


def _encode(image: Image.Image, settings: SessionSettings) -> EncodedImage:
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((settings.slide_max_side_px,) * 2, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    is_photo = image.mode == "RGB" and image.getcolors(_PHOTO_COLORS) is None
    if is_photo:
        image.save(buffer, "JPEG", quality=settings.jpeg_quality, optimize=True)
    else:
        image.save(buffer, "PNG", optimize=True)
    return EncodedImage(buffer.getvalue(), "jpg" if is_photo else "png")


def place_images(markdown: str, urls: Sequence[str], stored: dict[int, SavedFile | None]) -> str:
    """Write the names of stored images. Others become links, or their alternative text; decoration is removed."""

    def place(match: re.Match[str]) -> str:
        alt, number, is_in_link = (match[1], int(match[2]), True) if match[2] else (match[3], int(match[4]), False)
        file = stored.get(number)
        if file is not None:
            name = file.path.rpartition("/")[2]
            image = f"![{alt}](assets/{name})"
            return f"[{image}]" if is_in_link else image
        url = urls[number - 1] if number <= len(urls) else ""
        is_decoration = number in stored
        if is_in_link:
            return f"[{alt}]"
        if is_decoration or not url.startswith(("https://", "http://")):
            return alt
        return f"[{alt}]({escape_link_target(url)})"

    return _IMAGE_IN_LINK.sub(place, markdown)
