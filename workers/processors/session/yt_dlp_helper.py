"""Find the media URL of a web page with yt-dlp. `video_sites` runs this script in the sandbox.

The argument is a JSON object with `path` (of the installed packages), `url` and `options`. The script prints a JSON
object with `media_url` or `error`. It imports only the standard library and yt-dlp.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Find the media URL without downloading the file."""
    request = json.loads(sys.argv[1])
    sys.path.append(request["path"])
    library: Any = importlib.import_module("yt_dlp")
    options = {**request["options"], "logger": _NullLogger()}
    try:
        with library.YoutubeDL(options) as downloader:
            info = downloader.extract_info(request["url"], download=False) or {}
        media_url = info.get("url") or next((entry.get("url") for entry in info.get("entries") or ()), None)
        response = {"media_url": media_url if isinstance(media_url, str) else None}
    except Exception as error:  # noqa: BLE001 - the extractors raise exceptions of any type
        response = {"error": str(error) or type(error).__name__}
    print(json.dumps(response), flush=True)
    os._exit(0)


class _NullLogger:
    """Discards the messages of yt-dlp, which may contain URLs with secrets."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...


if __name__ == "__main__":
    main()
