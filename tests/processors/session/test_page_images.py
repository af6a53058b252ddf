"""Images of a page are stored as new files, or linked. They cost neither the job nor the memory."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobledger.workers.processors.session.page_images import (
    UnusableImage,
    decode_data_url,
    encode_image,
    place_images,
)
from jobledger.workers.processors.session.settings import SessionSettings
from tests.processors.session.fixtures import RecordingJob, Site, SiteResponse, html, make_parameters, read_document
from tests.processors.session.test_session_processor import run

SETTINGS = SessionSettings()
TEXT = "<p>This talk is about an append-only log, which makes the recovery of crashed workers simple for everyone.</p>"


def make_image(
    size: tuple[int, int] = (100, 60), image_format: str = "PNG", mode: str = "RGB", **options: Any
) -> bytes:
    buffer = io.BytesIO()
    image = Image.radial_gradient("L").resize(size).convert(mode)
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def make_png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims to have the size, with almost no data."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND")
    parts = (struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) for data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_image_is_encoded_again_without_metadata(image_format: str) -> None:
    content = make_image(image_format=image_format) + b"<script>hostile</script>"
    encoded = encode_image(content, SETTINGS)
    assert encoded is not None
    assert b"hostile" not in encoded.content
    with Image.open(io.BytesIO(encoded.content)) as image:
        assert image.size == (100, 60)
        assert image.format == {"png": "PNG", "jpg": "JPEG"}[encoded.suffix]


def test_large_image_is_scaled_and_photo_is_jpeg() -> None:
    photo = Image.effect_noise((3000, 1500), 80).convert("RGB")
    photo.putpixel((0, 0), (255, 0, 0))
    colors = Image.merge(
        "RGB", [photo.getchannel("R"), photo.getchannel("G").rotate(90), photo.getchannel("B").rotate(180)]
    )
    buffer = io.BytesIO()
    colors.save(buffer, "PNG")
    encoded = encode_image(buffer.getvalue(), SETTINGS)
    assert encoded is not None
    assert encoded.media_type == "image/jpeg"
    with Image.open(io.BytesIO(encoded.content)) as image:
        assert image.size == (1280, 640)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"%PDF-1.7",
        make_image()[:60],
        make_image(image_format="BMP"),
    ],
    ids=["empty", "svg", "pdf", "damaged", "bmp"],
)
def test_other_files_are_rejected(content: bytes) -> None:
    with pytest.raises(UnusableImage):
        encode_image(content, SETTINGS)


def test_image_with_too_many_pixels_is_not_decoded() -> None:
    with pytest.raises(UnusableImage, match="11000 × 10000 pixels"):
        encode_image(make_png_header(11_000, 10_000), SETTINGS)


def test_tiny_image_is_decoration() -> None:
    assert encode_image(make_image((16, 200)), SETTINGS) is None


def test_data_url_is_decoded() -> None:
    assert decode_data_url(f"data:image/png;base64,{base64.b64encode(b'abc').decode()}") == b"abc"
    assert decode_data_url("data:image/png,a%20b") == b"a b"
    for broken in ("data:image/png;base64", "data:image/png;base64,abc"):
        with pytest.raises(UnusableImage):
            decode_data_url(broken)


def test_images_that_are_not_stored_become_links() -> None:
    markdown = (
        "![a \\[b\\]](assets/page-image-1) [![c](assets/page-image-2)](https://x.example) ![d](assets/page-image-3)"
    )
    urls = ["https://a.example/1 (2).png", "https://a.example/2.png", "data:image/png;base64,AA"]
    assert place_images(markdown, urls, {}) == (
        "[a \\[b\\]](https://a.example/1%20%282%29.png) [c](https://x.example) d"
    )
    assert place_images(markdown, urls, {1: None}).startswith("a \\[b\\] [c]")


async def test_images_of_page_are_assets_of_the_job(site: Site, tmp_path: Path) -> None:
    site.put("/good.png", SiteResponse(make_image()))
    site.put("/wrong.png", SiteResponse(b"<html>"))
    data = f"data:image/png;base64,{base64.b64encode(make_image()).decode()}"
    url = site.put(
        "/talk",
        html(
            f"<html lang=en><body><main><h1>Talk</h1>{TEXT}"
            "<p><img src=good.png alt=Diagram><img src=wrong.png alt=Wrong>"
            f"<img src=gone.png alt=Gone><img src='{data}' alt=Inline><img src=good.png alt=Again></p>{TEXT}</main>"
        ),
    )
    job = RecordingJob(make_parameters(url=url), tmp_path)
    results = await run(job)
    markdown = read_document(job, results)
    assert [asset.path.rpartition("/")[2] for asset in results.assets] == ["page-image-1.png", "page-image-4.png"]
    assert "![Diagram](assets/page-image-1.png)" in markdown
    assert "![Inline](assets/page-image-4.png)" in markdown
    assert "![Again](assets/page-image-1.png)" in markdown
    assert f"[Wrong]({site.url('/wrong.png')})" in markdown
    assert f"[Gone]({site.url('/gone.png')})" in markdown
    assert "base64" not in markdown


async def test_slow_and_surplus_images_are_linked(site: Site, tmp_path: Path) -> None:
    site.put("/1.png", SiteResponse(make_image()))
    slow = site.put_hanging("/2.png")
    images = "".join(f"<img src=/{number}.png alt=Picture{number}>" for number in (1, 2, 3))
    url = site.put("/talk", html(f"<html lang=en><body><main>{TEXT}<p>{images}</p>{TEXT}</main>"))
    job = RecordingJob(make_parameters(url=url), tmp_path)
    results = await run(job, page_max_images=2, page_images_timeout_seconds=0.5)
    markdown = read_document(job, results)
    assert [asset.path.rpartition("/")[2] for asset in results.assets] == ["page-image-1.png"]
    assert f"[Picture2]({slow})[Picture3]({site.url('/3.png')})" in markdown
    assert "/3.png" not in site.requested_paths
    assert any("only linked: 1. They were not fetched within 0.5 seconds." in warning for warning in job.warnings)


@pytest.mark.parametrize(
    "failure",
    [SiteResponse(status=503), SiteResponse(status=429), SiteResponse(make_image()[:100], content_length=5000)],
    ids=["unavailable", "too many requests", "cut"],
)
async def test_image_is_fetched_again_after_transient_error(failure: SiteResponse, site: Site, tmp_path: Path) -> None:
    site.put("/1.png", SiteResponse(make_image()))
    site.failures["/1.png"] = [failure, failure]
    url = site.put("/talk", html(f"<html lang=en><body><main>{TEXT}<p><img src=/1.png alt=Picture></p>{TEXT}</main>"))
    job = RecordingJob(make_parameters(url=url), tmp_path)
    assert "![Picture](assets/page-image-1.png)" in read_document(job, await run(job))
    assert not [warning for warning in job.warnings if "mage" in warning]


async def test_restart_fetches_images_that_failed(site: Site, tmp_path: Path) -> None:
    site.put("/1.png", SiteResponse(make_image()))
    site.put("/2.png", SiteResponse(status=503))
    images = "".join(f"<img src=/{number}.png alt=Picture{number}>" for number in (1, 2))
    url = site.put("/talk", html(f"<html lang=en><body><main>{TEXT}<p>{images}</p>{TEXT}</main>"))
    first = RecordingJob(make_parameters(url=url), tmp_path)
    document = read_document(first, await run(first))
    assert f"[Picture2]({site.url('/2.png')})" in document
    [warning] = [warning for warning in first.warnings if "mage" in warning]
    assert warning.startswith("Images of the page that are only linked: 1.")
    assert "503" in warning
    site.put("/2.png", SiteResponse(make_image()))
    second = RecordingJob(first.parameters, tmp_path, attempt=2, steps=first.get_steps_after_restart())
    assert "![Picture2](assets/page-image-2.png)" in read_document(second, await run(second))
    assert not [warning for warning in second.warnings if "mage" in warning]


async def test_missing_image_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    url = site.put("/talk", html(f"<html lang=en><body><main>{TEXT}<p><img src=/1.png alt=Picture></p>{TEXT}</main>"))
    job = RecordingJob(make_parameters(url=url), tmp_path)
    await run(job)
    assert site.requested_paths.count("/1.png") == 1
    assert job.get_steps_after_restart() == job.steps
    assert not [warning for warning in job.warnings if "mage" in warning]


async def test_shared_page_gives_each_job_its_own_images(site: Site, tmp_path: Path) -> None:
    site.put("/1.png", SiteResponse(make_image()))
    url = site.put("/talk", html(f"<html lang=en><body><main>{TEXT}<p><img src=/1.png alt=Picture></p>{TEXT}</main>"))
    first = RecordingJob(make_parameters(url=url), tmp_path)
    await run(first)
    second = RecordingJob(make_parameters(url=url), tmp_path, job_id="job-2", steps=first.steps)
    results = await run(second)
    assert results.markdown is not None
    folder = results.markdown.path.rpartition("/")[0]
    assert [asset.path for asset in results.assets] == [f"{folder}/assets/page-image-1.png"]
    assert site.requested_paths.count("/1.png") == 1
