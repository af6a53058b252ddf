"""Find the recording on a page of a video site with yt-dlp if it is installed.

yt-dlp runs in the sandbox. It can reach the network only through a proxy in this process, which applies the URL policy
of all downloads. It is used only for configured sites and without its extractor `generic`. It returns a media URL,
which `fetcher` downloads.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from jobledger.workers.processors.session import yt_dlp_helper
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.transcript import TranscriptUnavailable
from jobledger.workers.sandbox import runner
from jobledger.workers.sandbox.launcher import PROXY_PORT

_FORMAT: Final = "bestaudio[protocol^=http]/best[protocol^=http]/worst[protocol^=http]"
"""One file over HTTP. Segmented formats (HLS, DASH) are not supported."""
_HELPER: Final = str(Path(yt_dlp_helper.__file__).resolve())
_MAX_OUTPUT_BYTES: Final = 1024 * 1024


class _HelperResponse(BaseModel):
    media_url: str | None = None
    error: str | None = None


def is_video_site_url(url: str, sites: Sequence[str]) -> bool:
    """Return whether the host of `url` is one of the sites or a subdomain of one."""
    host = (urlsplit(url).hostname or "").lower()
    return any(host == site or host.endswith(f".{site}") for site in sites)


async def resolve_media_url(url: str, *, seconds: float, scratch: Path, fetcher: Fetcher) -> str:
    """Return the media URL of the audio of the video on the page `url`.

    Args:
        url: URL of the page.
        seconds: Timeout of yt-dlp for each response.
        scratch: Directory for files of yt-dlp. It must not exist yet.
        fetcher: Provides the proxy for yt-dlp.

    Raises:
        TranscriptUnavailable: yt-dlp is not installed, cannot run in a sandbox, or finds no media URL.
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
        "format": _FORMAT,
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
        reason = _format_reason(response.error)
        raise TranscriptUnavailable(f"The recording on a page of {site} is not available: {reason}.")
    if response.media_url is None:
        raise TranscriptUnavailable(f"The page of {site} has no recording that can be downloaded as one file.")
    return response.media_url


def _find_package() -> Path | None:
    """Return the directory of yt-dlp, or None if it is not installed."""
    spec = importlib.util.find_spec("yt_dlp")
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _format_reason(error: str) -> str:
    """Return the first line of the message without control characters and the request to report a bug."""
    line = error.partition("\n")[0].partition("; please report")[0].removeprefix("ERROR: ")
    words = "".join(character for character in line if character.isprintable()).strip().rstrip(".")
    return words[:300] or "unknown reason"
