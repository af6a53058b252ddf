"""Find the media URL of a web page with yt-dlp. `video_sites` runs this script in the sandbox.

The argument is a JSON object with `path` (of the installed packages), `url` and `options`. The script prints a JSON
object with `media_url`, `subtitles_url`, `chapters` and `seconds`, or with `error` and `is_transient`. It imports only
the standard library and yt-dlp.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from typing import Any

_MAX_CAUSES = 20


def is_transient(error: BaseException) -> bool:
    """Return whether the cause of an error of yt-dlp is the network, or a server that is overloaded or fails."""
    causes = [error]
    for cause in causes:  # the list grows
        status = getattr(cause, "status", None)
        if isinstance(status, int):
            return status >= 500 or status in (408, 425, 429)
        if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__):
            return True
        inner = (*(getattr(cause, "exc_info", None) or ()), getattr(cause, "cause", None), cause.__cause__)
        if len(causes) < _MAX_CAUSES:
            causes += [value for value in inner if isinstance(value, BaseException)]
    return False


def main() -> None:
    """Find the URLs without downloading the files."""
    request = json.loads(sys.argv[1])
    sys.path.append(request["path"])
    library: Any = importlib.import_module("yt_dlp")
    logger = logging.getLogger("yt-dlp")
    logger.disabled = True  # its messages may contain URLs with secrets
    options = {**request["options"], "logger": logger}
    try:
        with library.YoutubeDL(options) as downloader:
            info = downloader.extract_info(request["url"], download=False) or {}
        if not info.get("url"):
            info = next(iter(info.get("entries") or ()), None) or {}
        subtitles = [track.get("url") for track in (info.get("requested_subtitles") or {}).values()]
        response = {
            "media_url": info.get("url"),
            "subtitles_url": subtitles[0] if subtitles else None,
            "chapters": [
                {"start_seconds": chapter.get("start_time"), "title": chapter.get("title")}
                for chapter in info.get("chapters") or ()
            ],
            "seconds": info.get("duration"),
        }
    except Exception as error:  # noqa: BLE001 - the extractors raise exceptions of any type
        response = {"error": str(error) or type(error).__name__, "is_transient": is_transient(error)}
    print(json.dumps(response), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
