"""Find the media URL of a web page with yt-dlp. `video_sites` runs this script in the sandbox.

The argument is a JSON object with `path` (of the installed packages), `url` and `options`. The script prints a JSON
object with `media_url` or `error`. It imports only the standard library and yt-dlp.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from typing import Any


def main() -> None:
    """Find the media URL without downloading the file."""
    request = json.loads(sys.argv[1])
    sys.path.append(request["path"])
    library: Any = importlib.import_module("yt_dlp")
    logger = logging.getLogger("yt-dlp")
    logger.disabled = True  # its messages may contain URLs with secrets
    options = {**request["options"], "logger": logger}
    try:
        with library.YoutubeDL(options) as downloader:
            info = downloader.extract_info(request["url"], download=False) or {}
        media_url = info.get("url") or next((entry.get("url") for entry in info.get("entries") or ()), None)
        response = {"media_url": media_url}
    except Exception as error:  # noqa: BLE001 - the extractors raise exceptions of any type
        response = {"error": str(error) or type(error).__name__}
    print(json.dumps(response), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
