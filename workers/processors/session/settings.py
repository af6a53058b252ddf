"""The settings in `processors.session` of config.yaml. Every setting has a working default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from jobledger.ledger.net.url_policy import validate_host_or_network
from jobledger.ledger.system.settings_section import SettingsSection
from jobledger.workers.processors.session.parameters import TranslatedPart

MEBIBYTE = 1024 * 1024


def _check_base_url(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
        raise ValueError("must be the base URL of an OpenAI-compatible API, such as https://api.openai.com/v1")
    return url.rstrip("/")


class OpenAiSettings(SettingsSection):
    """An OpenAI-compatible API. The operator chooses it, so it may have a private address."""

    backend: str
    url: Annotated[str | None, AfterValidator(_check_base_url)] = Field(
        default=None, description="Base URL, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."
    )
    model: str | None = Field(default=None, min_length=1, description="Name of the model.")
    api_key_file: Path | None = Field(default=None, description="File that contains the API key. Default: no key.")
    timeout_seconds: float

    @model_validator(mode="after")
    def _require_url_and_model(self) -> Self:
        if self.backend == "openai" and (self.url is None or self.model is None):
            raise ValueError("the backend `openai` needs `url` and `model`")
        return self


class TranscriptionSettings(OpenAiSettings):
    """Speech to text."""

    backend: Literal["none", "pocketsphinx", "openai"] = Field(
        default="none",
        description="`none`: no speech recognition, and no video is downloaded unless `keep_audio` or "
        "`use_subtitles: always` is set. `openai`: an "
        "OpenAI-compatible `/audio/transcriptions` service, hosted or local. `pocketsphinx`: offline, English only, "
        "low quality, for demonstrations and tests; needs `pip install pocketsphinx`.",
    )
    chunk_seconds: float = Field(default=300, ge=10, le=780, description="Length of the audio chunks that are sent.")
    max_concurrent: int = Field(default=2, ge=1, le=20, description="Chunks transcribed at the same time.")
    timeout_seconds: float = Field(default=300, gt=0, description="Timeout for one chunk.")


class LanguageModelSettings(OpenAiSettings):
    """Summary and translation by a language model."""

    backend: Literal["none", "openai"] = Field(
        default="none", description="`openai`: an OpenAI-compatible `/chat/completions` service, hosted or local."
    )
    timeout_seconds: float = Field(default=120, gt=0, description="Timeout for one response.")
    chunk_characters: int = Field(default=6000, ge=500, description="Size of the text chunks that are translated.")
    max_characters: int = Field(
        default=200_000, ge=1000, description="A longer page, transcript or deck is not translated."
    )
    translate: list[TranslatedPart] = Field(
        default=["page"],
        description="What is translated: `page`, `transcript` (about ten times as long) and `slides` (descriptions of "
        "the images, texts and notes). A job can choose other parts.",
    )
    temperature: float | None = Field(default=0.2, ge=0, le=2, description="Sampling temperature. null: model default.")


class SessionSettings(SettingsSection):
    """Settings and limits of the session processor."""

    connect_timeout_seconds: float = Field(default=10, gt=0, description="Timeout for DNS and connecting to a server.")
    read_timeout_seconds: float = Field(default=30, gt=0, description="Timeout for the next bytes of a response.")
    page_timeout_seconds: float = Field(default=60, gt=0, description="Timeout for the step `page`.")
    transcript_timeout_seconds: float = Field(default=1800, gt=0, description="Timeout for the step `transcript`.")
    slides_timeout_seconds: float = Field(default=300, gt=0, description="Timeout for the step `slides`.")

    page_max_bytes: int = Field(default=10 * MEBIBYTE, gt=0, description="Maximum size of a page after decompression.")
    video_max_bytes: int = Field(default=4096 * MEBIBYTE, gt=0, description="Maximum size of a recording.")
    slides_max_bytes: int = Field(default=200 * MEBIBYTE, gt=0, description="Maximum size of an attachment.")

    page_max_images: int = Field(
        default=20, ge=0, le=200, description="Images of a page that are stored. Further images are only linked."
    )
    page_image_max_bytes: int = Field(default=10 * MEBIBYTE, gt=0, description="Maximum size of an image of a page.")
    page_images_timeout_seconds: float = Field(
        default=30, gt=0, description="Timeout for all images of a page. Images that are not fetched are only linked."
    )

    max_redirects: int = Field(default=5, ge=0, description="Maximum number of redirects.")
    max_fetches_per_host: int = Field(
        default=4, ge=1, le=100, description="Concurrent downloads from one host by all workers of a machine."
    )
    allowed_private_hosts: list[Annotated[str, AfterValidator(validate_host_or_network)]] = Field(
        default=[],
        description="IP addresses, networks (10.0.0.0/8) and host names outside the public internet that may be "
        "fetched. All other private, loopback and link-local addresses are rejected.",
    )
    user_agent: str = Field(
        default="jobledger (conference session processor)", description="User-Agent header of all requests."
    )

    slide_max_side_px: int = Field(default=1280, ge=16, le=8192, description="Longer side of a slide image, in pixels.")
    thumbnail_max_side_px: int = Field(
        default=320, ge=16, le=2048, description="Longer side of a slide thumbnail, in pixels."
    )
    jpeg_quality: int = Field(default=85, ge=1, le=95, description="JPEG quality of images and thumbnails, 1 to 95.")
    max_pdf_pages: int = Field(default=500, gt=0, description="PDF pages that are rendered. Further pages are omitted.")
    slide_timeout_seconds: float = Field(
        default=30, gt=0, description="Timeout for one page of the slides. A page that takes longer is not shown."
    )
    max_image_pixels: int = Field(
        default=400_000_000,
        gt=0,
        description="Maximum size (width × height) of a picture in a PDF, or of one that is the attachment. Pages with "
        "larger ones are not shown. A low `event_worker.memory_limit_mb` reduces it.",
    )
    merge_overlays: bool = Field(
        default=True,
        description="Omit pages of a PDF that the next page shows completely, such as the steps of an animation.",
    )
    ocr: Literal["auto", "never"] = Field(
        default="auto",
        description="`auto`: recognize the text of slides without a text layer with Tesseract if it is installed "
        "with the source language of the job (Debian: `apt install tesseract-ocr tesseract-ocr-deu`).",
    )

    render: Literal["auto", "never", "always"] = Field(
        default="auto",
        description="When a page is rendered by a headless Chromium in the sandbox. `auto`: if it has no content "
        "without JavaScript. `never`: such pages fail. `always`: every page is rendered.",
    )
    render_timeout_seconds: float = Field(
        default=25, gt=0, description="Timeout for rendering. What the page shows then is used."
    )
    chromium_command: str | None = Field(
        default=None,
        min_length=1,
        description="Program that renders pages. Default: `chromium-headless-shell` or `chrome-headless-shell`.",
    )

    video_sites: list[str] = Field(
        default=["youtube.com", "youtu.be", "vimeo.com", "dailymotion.com"],
        description="Sites, including subdomains, where yt-dlp looks for the recording on a page. Needs "
        "`pip install 'jobledger[video-sites]'`; keep it up to date.",
    )
    libreoffice_command: str | None = Field(
        default="soffice",
        min_length=1,
        description="Command that converts PowerPoint, OpenDocument and Keynote files to PDF. If it is null or not "
        "installed, results contain only the text of PowerPoint (.pptx) and OpenDocument files, and a link. Keynote "
        "files are only linked.",
    )

    transcription: TranscriptionSettings = Field(default=TranscriptionSettings(), description="Speech to text.")
    language_model: LanguageModelSettings = Field(
        default=LanguageModelSettings(), description="Summary, tags and translation."
    )
    enrich_timeout_seconds: float = Field(default=900, gt=0, description="Timeout for the step `enrich`.")
    keep_audio: bool = Field(default=False, description="Store the extracted audio (WAV) as a result.")
    use_subtitles: Literal["never", "auto", "always"] = Field(
        default="auto",
        description="Subtitles in the language of the talk replace speech recognition if they cover most of the "
        "recording. `auto`: of recordings that are downloaded anyway. `always`: recordings are downloaded for their "
        "subtitles even without a transcription backend.",
    )
    max_audio_seconds: float = Field(
        default=8 * 3600, gt=0, le=24 * 3600, description="Maximum length of audio extracted from a recording."
    )

    template: Path | None = Field(
        default=None, description="Jinja2 template to use instead of the built-in `document.md.j2`."
    )
