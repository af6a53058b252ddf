"""session: ask yt-dlp where the recording of a page is. `video_sites.py` runs this in the sandbox.

Reads a JSON object from its argument (`path` of the installed packages, `url`, `options`), writes one to standard
output: `media_url` or `error`. It imports the standard library only, and yt-dlp.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Look for the recording, download nothing."""
    asked = json.loads(sys.argv[1])
    sys.path.append(asked["path"])
    library: Any = importlib.import_module("yt_dlp")
    options = {**asked["options"], "logger": _Silent()}
    try:
        with library.YoutubeDL(options) as finder:
            found = finder.extract_info(asked["url"], download=False) or {}
        address = found.get("url") or next((entry.get("url") for entry in found.get("entries") or ()), None)
        said = {"media_url": address if isinstance(address, str) else None}
    except Exception as error:  # noqa: BLE001 - of a thousand extractors - each raises what it likes
        said = {"error": str(error) or type(error).__name__}
    print(json.dumps(said), flush=True)
    os._exit(0)


class _Silent:
    """Messages of yt-dlp may hold addresses with secrets."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...


if __name__ == "__main__":
    main()
