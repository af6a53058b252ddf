"""Find the recording on a page of a video site with yt-dlp if it is installed.

yt-dlp runs in the sandbox. It can reach the network only through a proxy in this process, which applies the URL policy
of all downloads. It is used only for configured sites and without its extractor `generic`. It returns URLs, which
`fetcher` downloads.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from jobledger.workers.processors.session import yt_dlp_helper
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.subtitles import build_chapters
from jobledger.workers.processors.session.transcript import Chapter, TranscriptUnavailable
from jobledger.workers.sandbox import runner
from jobledger.workers.sandbox.launcher import PROXY_PORT

_FORMAT: Final = (
    "bestaudio[language^={language}][protocol~='^https?$']/bestaudio[protocol~='^https?$']/"
    "best[protocol~='^https?$']/worst[protocol~='^https?$']/"
    "bestaudio[language^={language}][protocol^=m3u8]/bestaudio[protocol^=m3u8]/worst[protocol^=m3u8]"
)
"""One file over HTTP, or else segments in HLS. DASH is not supported."""
_HELPER: Final = str(Path(yt_dlp_helper.__file__).resolve())
_MAX_OUTPUT_BYTES: Final = 1024 * 1024


class _Chapter(BaseModel):
    start_seconds: float | None = None
    title: str | None = None


class _HelperResponse(BaseModel):
    media_url: str | None = None
    subtitles_url: str | None = None
    chapters: list[_Chapter] = []
    seconds: float | None = None
    error: str | None = None
    is_transient: bool = False


class VideoSiteFailed(TranscriptUnavailable):
    """The site or the network to it failed. Another try may succeed."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording on a page of a video site.

    Attributes:
        media_url: URL of a media file with the sound, or of an HLS playlist.
        subtitles_url: URL of subtitles that people wrote in the language of the talk.
        chapters: Chapters of the video.
        seconds: Length of the video.
    """

    media_url: str
    subtitles_url: str | None = None
    chapters: list[Chapter] = field(default_factory=list)
    seconds: float | None = None


def is_video_site_url(url: str, sites: Sequence[str]) -> bool:
    """Return whether the host of `url` is one of the sites or a subdomain of one."""
    host = (urlsplit(url).hostname or "").lower()
    return any(host == site or host.endswith(f".{site}") for site in sites)


async def find_recording(url: str, *, language: str, seconds: float, scratch: Path, fetcher: Fetcher) -> Recording:
    """Return the URLs of the sound and the subtitles of the video on the page `url`.

    Args:
        url: URL of the page.
        language: Language of the talk, such as `de`.
        seconds: Timeout of yt-dlp for each response.
        scratch: Directory for files of yt-dlp. It must not exist yet.
        fetcher: Provides the proxy for yt-dlp.

    Raises:
        TranscriptUnavailable: yt-dlp is not installed, cannot run in a sandbox, or finds no media URL.
        VideoSiteFailed: A transient error of the site or the network.
    """
    site = urlsplit(url).hostname
    package = await asyncio.to_thread(_find_package)
    if package is None:
        raise TranscriptUnavailable(
            f"The recording is on a page of {site}. yt-dlp, which could find it, is not installed. "
            "Install it with: pip install yt-dlp."
        )
    options = {
        "allowed_extractors": ["default", "-generic"],
        "format": _FORMAT.format(language=language),
        "writesubtitles": True,
        "subtitleslangs": [f"{language}.*"],
        "subtitlesformat": "vtt/srt/best",
        "noplaylist": True,
        "playlist_items": "1",
        "quiet": True,
        "no_warnings": True,
        "cachedir": False,
        "socket_timeout": seconds,
        "extractor_retries": 1,
        "proxy": f"http://127.0.0.1:{PROXY_PORT}",
    }
    await asyncio.to_thread(scratch.mkdir)
    request = json.dumps({"path": str(package.parent), "url": url, "options": options})
    program = runner.Program(runner.build_python_command(_HELPER, request), scratch, readable_paths=[package.parent])
    try:
        result = await runner.run_program(program, proxy=fetcher.serve_proxy, max_output=_MAX_OUTPUT_BYTES)
        response = _HelperResponse.model_validate_json(result.output)
    except runner.SandboxUnavailable as error:
        raise TranscriptUnavailable(
            f"The recording is on a page of {site}. yt-dlp cannot run in a sandbox: {error}"
        ) from error
    except ValidationError:
        response = _HelperResponse(error="yt-dlp returned no result")
    if response.error is not None:
        kind = VideoSiteFailed if response.is_transient else TranscriptUnavailable
        raise kind(f"The recording on a page of {site} is not available: {_format_reason(response.error)}.")
    if response.media_url is None:
        raise TranscriptUnavailable(f"The page of {site} has no recording that can be downloaded as one file.")
    chapters = [(chapter.start_seconds or 0.0, chapter.title or "") for chapter in response.chapters]
    return Recording(response.media_url, response.subtitles_url, build_chapters(chapters), response.seconds)


def _find_package() -> Path | None:
    """Return the directory of yt-dlp, or None if it is not installed."""
    spec = importlib.util.find_spec("yt_dlp")
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _format_reason(error: str) -> str:
    """Return the first line of the message without control characters and the request to report a bug."""
    line = error.partition("\n")[0].partition("; please report")[0].removeprefix("ERROR: ")
    words = "".join(character for character in line if character.isprintable()).strip().rstrip(".")
    return words[:300] or "unknown reason"
