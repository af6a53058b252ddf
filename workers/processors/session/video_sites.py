"""session: the recording behind a page of a video site, found by yt-dlp where it is installed.

yt-dlp runs in the sandbox. Its only way to the network is a proxy in this process, which connects to addresses that the
policy of all fetches allows. It is asked only about sites that the operator has named, never guesses (its extractor
`generic` is off), and answers an address: what is there is fetched by `fetch`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from jobledger.workers.processors.session import yt_dlp_helper
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.transcript import TranscriptUnavailable
from jobledger.workers.sandbox import runner
from jobledger.workers.sandbox.launcher import PROXY_PORT

_SOUND: Final = "bestaudio[protocol^=http]/best[protocol^=http]/worst[protocol^=http]"
"""One file over http(s): playlists of pieces (HLS, DASH) are not for us."""
_HELPER: Final = str(Path(yt_dlp_helper.__file__).resolve())
_MAX_ANSWER_BYTES: Final = 1024 * 1024


def is_video_site_url(url: str, sites: Sequence[str]) -> bool:
    """Return whether an address is on one of these sites, or on a subdomain of one."""
    host = (urlsplit(url).hostname or "").lower()
    return any(host == site or host.endswith(f".{site}") for site in sites)


async def resolve_media_url(url: str, *, seconds: float, scratch: Path, fetcher: Fetcher) -> str:
    """Return where the sound of the video on the page `url` is.

    Args:
        url: The page.
        seconds: How long yt-dlp waits for each answer of a server.
        scratch: A directory that does not exist yet, for yt-dlp to write to.
        fetcher: Connects for yt-dlp.

    Raises:
        NoTranscript: yt-dlp is not installed, cannot be run safely here, or finds nothing.
    """
    site = urlsplit(url).hostname
    package = await asyncio.to_thread(_package)
    if package is None:
        raise TranscriptUnavailable(
            f"The recording is on a page of {site}; yt-dlp, which could find it there, is not installed "
            "(pip install yt-dlp)."
        )
    options = {
        "allowed_extractors": ["default", "-generic"],
        "format": _SOUND,
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
    asked = json.dumps({"path": str(package.parent), "url": url, "options": options})
    program = runner.Program(runner.python_command(_HELPER, asked), scratch, readable_paths=[package.parent])
    try:
        ended = await runner.run_program(program, proxy=fetcher.serve_proxy, max_output=_MAX_ANSWER_BYTES)
        said: dict[str, Any] = orjson.loads(ended.output)
    except runner.SandboxUnavailable as error:
        raise TranscriptUnavailable(
            f"The recording is on a page of {site}; yt-dlp cannot be run safely: {error}"
        ) from error
    except orjson.JSONDecodeError as error:
        raise TranscriptUnavailable(
            f"The recording on a page of {site} cannot be had: yt-dlp ended without a result."
        ) from error
    if "error" in said:
        raise TranscriptUnavailable(f"The recording on a page of {site} cannot be had: {_reason(str(said['error']))}.")
    address = said.get("media_url")
    if not isinstance(address, str):
        raise TranscriptUnavailable(f"There is no recording that can be fetched as one file on the page of {site}.")
    return address


def _package() -> Path | None:
    """Return the directory of yt-dlp, None if it is not installed."""
    try:
        found = importlib.util.find_spec("yt_dlp")
    except ValueError:
        return None
    return Path(found.origin).resolve().parent if found is not None and found.origin else None


def _reason(error: str) -> str:
    """The first line of its message, without the colours and the plea to report a bug."""
    line = error.partition("\n")[0].partition("; please report")[0].removeprefix("ERROR: ")
    words = "".join(character for character in line if character.isprintable()).strip().rstrip(".")
    return words[:300] or "no reason was given"
