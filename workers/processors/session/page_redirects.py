"""Find redirects that a browser follows and HTTP does not have: `Refresh`, scripts, and frames. Pure."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urldefrag, urljoin

from jobledger.workers.processors.session.page_source import PageSource

MAX_DELAY_SECONDS: Final = 30
"""A page that waits longer is meant to be read."""
_IMMEDIATE_SECONDS: Final = 1
_MAX_WORDS: Final = 40
"""A script redirects from an otherwise empty page. Longer pages redirect only under conditions, such as a click."""
_MAX_SCRIPT: Final = 20_000
# https://html.spec.whatwg.org/multipage/semantics.html#shared-declarative-refresh-steps
_REFRESH: Final = re.compile(
    r"\s*(\d+)?(?:\.[\d.]*)?(?:\s*[;,]\s*|\s+|$)(?:url\s*=\s*)?(.*)", re.IGNORECASE | re.DOTALL
)
_SCRIPT: Final = re.compile(
    r"""(?<![\w.])(?:(?:window|document|self|top|parent|globalThis)\s*\.\s*)*location"""
    r"""(?:\s*\.\s*href)?\s*(?:=|\.\s*(?:replace|assign)\s*\()\s*(["'`])([^"'`\s]{1,2000})\1\s*[;)\n}]"""
)


def find_redirect(source: PageSource, *, refresh_header: str = "", is_talk: bool) -> str | None:
    """Return the URL to which a browser would go from this page, or None.

    Args:
        source: The page.
        refresh_header: The HTTP header `Refresh`.
        is_talk: Whether the page names the talk or its speakers. It is then left only if its readers never see it.
    """
    refreshes = [refresh_header] if refresh_header else []
    refreshes += [
        element.get("content", "")
        for element in source.tree.iter("meta")
        if element.get("http-equiv", "").strip().lower() == "refresh"
        and next(element.iterancestors("noscript"), None) is None
    ]
    for text in refreshes:
        delay, target = _parse_refresh(text)
        if target and delay <= (_IMMEDIATE_SECONDS if is_talk else MAX_DELAY_SECONDS):
            return _resolve(source, target)
    if is_talk or len(source.words) > _MAX_WORDS:
        return None
    return _find_script_redirect(source) or _find_frame(source)


def find_canonical(source: PageSource) -> str | None:
    """Return the URL that a nearly empty page names as canonical, or None. The page there may have the content."""
    if len(source.words) > _MAX_WORDS:
        return None
    urls = source.tree.xpath("//link[contains(concat(' ', normalize-space(@rel), ' '), ' canonical ')]/@href")
    return _resolve(source, urls[0]) if len(set(urls)) == 1 else None


def _parse_refresh(text: str) -> tuple[int, str]:
    """Return the delay in seconds and the target, which is empty if the page reloads itself."""
    match = _REFRESH.match(text)
    if match is None or (match[1] is None and not text.lstrip().startswith(".")):
        return 0, ""
    target = match[2].strip()
    if target[:1] in ("'", '"'):
        target = target[1:].partition(target[0])[0]
    return int(match[1][:6] if match[1] else 0), target.strip()


def _find_script_redirect(source: PageSource) -> str | None:
    for script in source.tree.iter("script"):
        if match := _SCRIPT.search((script.text or "")[:_MAX_SCRIPT] + "\n"):
            return _resolve(source, match[2].replace("\\/", "/"))
    for handler in source.tree.xpath("//body/@onload")[:1]:
        if match := _SCRIPT.search(f"{handler}\n"):
            return _resolve(source, match[2])
    return None


def _find_frame(source: PageSource) -> str | None:
    """Return the URL of the only frame of a frameset, or of the only element of the page if that is a frame."""
    frames = [frame.get("src") for frame in source.tree.xpath("//frameset//frame | //body//iframe") if frame.get("src")]
    return _resolve(source, frames[0]) if len(frames) == 1 and not source.words else None


def _resolve(source: PageSource, target: str) -> str | None:
    """Return the absolute URL, or None if it is the page itself or no web page."""
    try:
        base = urljoin(source.url, next(iter(source.tree.xpath("//base/@href")), ""))
        url = urljoin(base, target.strip())
    except ValueError:
        return None
    is_web_page = url.startswith(("http://", "https://"))
    return url if is_web_page and urldefrag(url).url != urldefrag(source.url).url else None
