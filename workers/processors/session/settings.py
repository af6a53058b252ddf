"""session: the section `processors.session` of config.yaml. Every key has a default that works."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MEBIBYTE = 1024 * 1024


def _names_hosts(entries: list[str]) -> list[str]:
    for entry in entries:
        try:
            ip_network(entry, strict=False)
        except ValueError:
            if not entry or "/" in entry or ":" in entry or any(character.isspace() for character in entry):
                raise ValueError(
                    f"{entry!r} is neither an IP address, nor a network like 10.0.0.0/8, nor a host name without port"
                ) from None
    return entries


def _base_address(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
        raise ValueError("expected the base address of an OpenAI-compatible API, such as https://api.openai.com/v1")
    return url.rstrip("/")


class _Endpoint(BaseModel):
    """An OpenAI-compatible API. It is the operator's choice: it may be on a private address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str | None, AfterValidator(_base_address)] = Field(
        default=None, description="Its base address, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1."
    )
    model: str | None = Field(default=None, min_length=1, description="The model's name there.")
    api_key_file: Path | None = Field(default=None, description="A file with the key; none: without a key.")

    def require_endpoint(self, backend: str) -> None:
        """Make sure that there is an address and a model.

        Raises:
            ValueError: something is missing.
        """
        if backend == "openai" and (self.url is None or self.model is None):
            raise ValueError("the backend `openai` needs `url` and `model`")


class TranscriptionSettings(_Endpoint):
    """Who listens to the recordings."""

    backend: Literal["none", "pocketsphinx", "openai"] = Field(
        default="none",
        description="`none`: no transcripts, and no video is downloaded unless `keep_audio` is set. `openai`: an "
        "OpenAI-compatible `/audio/transcriptions` endpoint, hosted or local. `pocketsphinx`: offline, English only, "
        "for demonstrations and tests, not for quality; needs `pip install pocketsphinx`.",
    )
    chunk_seconds: float = Field(default=300, ge=10, le=780, description="So much sound is sent at a time.")
    max_concurrent: int = Field(default=2, ge=1, le=20, description="So many pieces at the same time.")
    timeout_seconds: float = Field(default=300, gt=0, description="For the text of one piece.")

    @model_validator(mode="after")
    def _complete(self) -> TranscriptionSettings:
        self.require_endpoint(self.backend)
        return self


class LanguageModelSettings(_Endpoint):
    """Who summarises and translates."""

    backend: Literal["none", "openai"] = Field(
        default="none", description="`openai`: an OpenAI-compatible `/chat/completions` endpoint, hosted or local."
    )
    timeout_seconds: float = Field(default=120, gt=0, description="For one answer.")
    chunk_characters: int = Field(default=6000, ge=500, description="So much is translated at a time.")
    max_characters: int = Field(default=200_000, ge=1000, description="Longer texts are not translated.")
    temperature: float | None = Field(default=0.2, ge=0, le=2, description="null: as the model has it.")

    @model_validator(mode="after")
    def _complete(self) -> LanguageModelSettings:
        self.require_endpoint(self.backend)
        return self


class SessionSettings(BaseModel):
    """What the session processor may do, and how long and how much at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_timeout_seconds: float = Field(default=10, gt=0, description="To find and reach a server.")
    read_timeout_seconds: float = Field(default=30, gt=0, description="Silence of a server in mid-answer.")
    page_timeout_seconds: float = Field(default=60, gt=0, description="For the whole step `page`.")
    transcript_timeout_seconds: float = Field(default=1800, gt=0, description="For the whole step `transcript`.")
    slides_timeout_seconds: float = Field(default=300, gt=0, description="For the whole step `slides`.")

    page_max_bytes: int = Field(default=10 * MEBIBYTE, gt=0, description="Largest page, after decompression.")
    video_max_bytes: int = Field(default=4096 * MEBIBYTE, gt=0, description="Largest recording.")
    slides_max_bytes: int = Field(default=200 * MEBIBYTE, gt=0, description="Largest attachment.")

    max_redirects: int = Field(default=5, ge=0, description="Redirects followed before giving up.")
    max_fetches_per_host: int = Field(
        default=4, ge=1, le=100, description="Fetches from one host at a time, by all workers of a machine together."
    )
    allowed_private_hosts: Annotated[list[str], AfterValidator(_names_hosts)] = Field(
        default=[],
        description="IP addresses, networks (10.0.0.0/8) and host names that may be fetched from although they are not "
        "on the public internet. Everything else private, loopback or link-local is refused.",
    )
    user_agent: str = Field(
        default="jobledger (conference session processor)", description="How we introduce ourselves to servers."
    )

    slide_max_side_px: int = Field(default=1280, ge=16, le=8192, description="Of a slide's image, in pixels.")
    thumbnail_max_side_px: int = Field(default=320, ge=16, le=2048, description="Of its small version, in pixels.")
    jpeg_quality: int = Field(default=85, ge=1, le=95, description="Of both, 1 to 95.")
    max_pdf_pages: int = Field(
        default=500, gt=0, description="Pages of a PDF that become images; the rest is left out."
    )
    max_image_pixels: int = Field(
        default=80_000_000, gt=0, description="Largest image rendered, or opened from inside a PDF: width × height."
    )

    video_sites: list[str] = Field(
        default=["youtube.com", "youtu.be", "vimeo.com", "dailymotion.com"],
        description="Sites on whose pages yt-dlp may look for the recording, with their subdomains. It fetches those "
        "pages by itself. Needs `pip install yt-dlp`, and to keep that up to date.",
    )
    libreoffice_command: str | None = Field(
        default="soffice",
        min_length=1,
        description="The program that makes a PDF of PowerPoint, OpenDocument and Keynote files. Where it is not "
        "installed, or with null, they are only linked.",
    )

    transcription: TranscriptionSettings = Field(default=TranscriptionSettings(), description="Speech to text.")
    language_model: LanguageModelSettings = Field(
        default=LanguageModelSettings(), description="Summary, tags and translation."
    )
    enrich_timeout_seconds: float = Field(default=900, gt=0, description="For the whole step `enrich`.")
    keep_audio: bool = Field(default=False, description="Keep the extracted audio (WAV) among the results.")
    max_audio_seconds: float = Field(default=8 * 3600, gt=0, description="Audio taken from one recording.")

    template: Path | None = Field(
        default=None, description="A Jinja2 file to use instead of the built-in `document.md.j2`."
    )
