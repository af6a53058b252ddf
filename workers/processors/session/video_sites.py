"""session: the recording behind a page of a video site, found by yt-dlp where it is installed.

yt-dlp goes to the net by itself, past the check of addresses. So it is asked only about sites the operator has named,
never guesses (its extractor `generic` is off), and says no more than an address: what is there is fetched by `fetch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final
from urllib.parse import urlsplit

from workers.processors.session.transcript import NoTranscript

_SOUND: Final = "bestaudio[protocol^=http]/best[protocol^=http]/worst[protocol^=http]"
"""One file over http(s): playlists of pieces (HLS, DASH) are not for us."""


def is_on_a_video_site(url: str, sites: Sequence[str]) -> bool:
    """Return whether an address is on one of these sites, or on a subdomain of one."""
    host = (urlsplit(url).hostname or "").lower()
    return any(host == site or host.endswith(f".{site}") for site in sites)


def media_address(url: str, *, seconds: float) -> str:
    """Return where the sound of the video on the page `url` is. Takes a while, and goes to the net.

    Raises:
        NoTranscript: yt-dlp is not installed, or finds nothing.
    """
    site = urlsplit(url).hostname
    try:
        library: ModuleType = importlib.import_module("yt_dlp")
    except ImportError as error:
        raise NoTranscript(
            f"The recording is on a page of {site}; yt-dlp, which could find it there, is not installed "
            "(pip install yt-dlp)."
        ) from error
    options = {
        "allowed_extractors": ["default", "-generic"],
        "format": _SOUND,
        "noplaylist": True,
        "playlist_items": "1",
        "quiet": True,
        "no_warnings": True,
        "logger": _Silent(),
        "cachedir": False,
        "socket_timeout": seconds,
        "extractor_retries": 1,
    }
    try:
        with library.YoutubeDL(options) as finder:
            found: Any = finder.extract_info(url, download=False)
    except Exception as error:  # of a thousand extractors - each raises what it likes
        raise NoTranscript(f"The recording on a page of {site} cannot be had: {_reason(error)}.") from error
    address = (found or {}).get("url") or next((entry.get("url") for entry in (found or {}).get("entries") or ()), None)
    if not isinstance(address, str):
        raise NoTranscript(f"There is no recording that can be fetched as one file on the page of {site}.")
    return address


class _Silent:
    """What yt-dlp says while it works is nobody's concern: it may hold addresses with secrets."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...


def _reason(error: Exception) -> str:
    """The first line of its message, without the colours and the plea to report a bug."""
    line = str(error).partition("\n")[0].partition("; please report")[0].removeprefix("ERROR: ")
    words = "".join(character for character in line if character.isprintable()).strip().rstrip(".")
    return words[:300] or type(error).__name__
