"""The URL of the API: check it, and hide its password."""

from __future__ import annotations

import re
from typing import Any, Final

import httpx

_HOST: Final = re.compile(rb"(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?|(?=[^:]*:)[0-9a-fA-F:.]{2,45}")
_USER_INFO: Final = re.compile(r"//[^/@]*@")
_LOOPBACK_HOSTS: Final = ("127.0.0.1", "localhost", "::1")
_MAX_SHOWN_CHARACTERS: Final = 200


def parse_api_url(text: object) -> httpx.URL | None:
    """Return the URL of an API, None if `text` is no such URL."""
    if not isinstance(text, str):
        return None
    try:
        url = httpx.URL(text.strip().rstrip("/"))
    except httpx.InvalidURL:
        return None
    is_valid = url.scheme in ("http", "https") and _HOST.fullmatch(url.raw_host) is not None
    is_valid = is_valid and not url.query and not url.fragment and (url.port is None or 0 < url.port < 65_536)
    return url if is_valid else None


def format_invalid_url(text: object) -> str:
    """Return a text that is no URL as it can be shown: bounded, and without user name and password."""
    return repr(_USER_INFO.sub("//", text[:_MAX_SHOWN_CHARACTERS]) if isinstance(text, str) else text)


def remove_user_info(url: httpx.URL) -> httpx.URL:
    """Return a URL without user name and password."""
    return url.copy_with(userinfo=b"")


def check_path(path: str) -> str:
    """Return the path of a request.

    Raises:
        ValueError: It is not a path.
    """
    if not path.startswith("/") or not path.isascii() or not path.isprintable() or set(path) & set(" ?#"):
        raise ValueError(f"path must be a quoted path such as /api/events/jobs, without a query, got {path[:200]!r}")
    return path


def get_http_options(url: httpx.URL) -> dict[str, Any]:
    """Return the options of a client of httpx for the API at this URL."""
    return {
        "verify": url.scheme == "https",  # plain HTTP needs no certificates, and loading them is slow
        "trust_env": url.host not in _LOOPBACK_HOSTS,  # a proxy cannot reach this machine
    }
