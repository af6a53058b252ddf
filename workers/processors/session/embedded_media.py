"""Describe the images and players of a page: their URLs and titles. Pure."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from importlib.resources import files
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict

_MIN_IMAGE_PIXELS: Final = 40
"""Smaller images are icons. They are replaced by their alternative text."""
_MAX_NAME_CHARACTERS: Final = 80
_MAX_TRACKS: Final = 50
FEATURED_ATTRIBUTE: Final = "data-jobledger-featured"
"""Marks the image that stands for the talk."""
_PREFERRED_WIDTH: Final = 1600
_LAZY_SOURCES: Final = (
    "data-src",
    "data-lazy-src",
    "data-original",
    "data-original-src",
    "data-lazy",
    "data-url",
    "data-full-url",
    "data-orig-file",
)
_LAZY_SOURCE_SETS: Final = ("data-srcset", "data-lazy-srcset", "srcset")
_LAZY_FRAME_SOURCES: Final = (
    "src",
    "data-src",
    "data-lazy-src",
    "data-cmp-src",
    "data-cookieblock-src",
    "data-iframe-src",
    "data-cookie-src",
    "data-url",
)
_PLACEHOLDER: Final = re.compile(
    r"data:image/(gif|svg\+xml)|/(?:spacer|blank|pixel|transparent|placeholder|lazy|1x1)[\w-]*\.(?:gif|png|svg)", re.I
)
_EMOJI_CLASSES: Final = frozenset({"emoji", "wp-smiley", "emojione", "twemoji", "g-emoji", "smiley"})
_VIDEO_FILE: Final = re.compile(r"\.(mp4|webm|m4v|mov|ogv|m3u8|mkv)$|^/(w|videos/watch)/")
_AUDIO_FILE: Final = re.compile(r"\.(mp3|ogg|opus|m4a|flac|wav|aac)$")
_NO_TITLE: Final = re.compile(r"(youtube|vimeo)?\s*(video)?\s*(player|embed|iframe)?", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"[\w-]{1,64}")
_IDENTIFIERS: Final = (
    *("videoid", "video-id", "data-videoid", "data-video-id", "data-youtube-id", "data-youtube", "data-yt"),
    "data-plyr-embed-id",
)
_TITLES: Final = ("playlabel", "videotitle", "data-title", "title", "aria-label")


class Player(NamedTuple):
    """An embedded player. `kind` is `Video`, `Audio` or empty."""

    kind: str
    title: str
    url: str


class VideoTrack(BaseModel):
    """Subtitles that a page has for a `video` element. All URLs are absolute."""

    model_config = ConfigDict(frozen=True)

    video_urls: list[str]
    url: str
    language: str | None = None


def find_video_tracks(tree: Any, url: str) -> list[VideoTrack]:
    """Return the subtitles and captions of the videos on a page.

    Args:
        tree: The page.
        url: The URL to which links of the page are relative.
    """
    tracks = []
    for track in tree.xpath("//video//track[@src] | //audio//track[@src]")[:_MAX_TRACKS]:
        media = next(track.iterancestors("video", "audio"))
        sources = [source for part in (media, *media.iter("source")) if (source := part.get("src"))]
        if sources and (track.get("kind") or "subtitles").lower() in ("subtitles", "captions"):
            with suppress(ValueError):  # of invalid URLs
                video_urls = [urljoin(url, source.strip()) for source in sources[:_MAX_TRACKS]]
                language = (track.get("srclang") or "").strip() or None
                track_url = urljoin(url, track.get("src").strip())
                tracks.append(VideoTrack(video_urls=video_urls, url=track_url, language=language))
    return tracks


def mark_featured_image(tree: Any, url: str, title: str) -> None:
    """Mark the image that the page shows for the talk as a whole: that of WordPress, or the one in `og:image`.

    It is no link, as those of other talks are. Without an alternative text, it gets the title of the talk.
    """
    contents = tree.xpath("//meta[@property='og:image' or @name='og:image']/@content")
    shared = {_join_urls(url, content) for content in contents[:_MAX_TRACKS]}
    for image in tree.iter("img"):
        is_featured = "wp-post-image" in (image.get("class") or "").split()
        is_link = next(image.iterancestors("a"), None) is not None
        if (is_featured or _join_urls(url, find_image_source(image)) in shared) and not is_link:
            image.set(FEATURED_ATTRIBUTE, "")
            image.set("alt", (image.get("alt") or "").strip() or title)
            return


def _join_urls(url: str, target: str) -> str:
    try:
        return urljoin(url, target.strip()).partition("?")[0]
    except ValueError:
        return target


def find_image_source(image: Any) -> str:
    """Return the URL of an image: the largest of moderate size, also of images that a script would load."""
    sources = [image.get(name) for name in _LAZY_SOURCES]
    sets = [image.get(name) for name in _LAZY_SOURCE_SETS]
    picture = next(image.iterancestors("picture"), None)
    if picture is not None:
        sets += [source.get(name) for source in picture.iter("source") for name in _LAZY_SOURCE_SETS]
    own = (image.get("src") or "").strip()
    candidates = [*sources, *map(_choose_from_set, sets), own]
    usable = [url.strip() for url in candidates if url and url.strip() and not _PLACEHOLDER.search(url)]
    if own in usable and not any(image.get(name) for name in (*_LAZY_SOURCES, *_LAZY_SOURCE_SETS[:2])) and not sets[2]:
        return own
    return usable[0] if usable else ""


def _choose_from_set(source_set: str | None) -> str:
    """Return the URL of a `srcset` with the largest width up to 1600 pixels, or else the smallest."""
    options: list[tuple[float, str]] = []
    for match in re.finditer(
        r"([^\s,]\S*[^\s,]|[^\s,])(?:\s+([\d.]{1,8})([wx]))?\s*(?:,|$)", (source_set or "")[:20_000]
    ):
        size = float(match.group(2).strip(".") or 1) if match.group(2) and match.group(2).count(".") < 2 else 1.0
        options.append((size if match.group(3) == "w" else size * 800, match.group(1)))
    moderate = [option for option in options if option[0] <= _PREFERRED_WIDTH]
    return (max(moderate)[1] if moderate else min(options)[1]) if options else ""


@cache
def _load_sites() -> dict[str, Any]:
    sites: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("media_sites.yaml").read_text(encoding="utf-8"))
    return sites


@cache
def _compile_hosts(name: str) -> re.Pattern[str]:
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, _load_sites()[name].split()))})$")


def is_tracker(url: str) -> bool:
    """Return whether the URL belongs to advertising, tracking, consent or scripts of social networks."""
    if _compile_hosts("trackers").search(_get_host(url)):
        return True
    return any(re.search(path, url) for path in _load_sites()["tracker_paths"])


@cache
def _compile_item_pages() -> re.Pattern[str]:
    return re.compile(rf"(https?:)?//(www\.|m\.)?({'|'.join(_load_sites()['item_pages'])})", re.IGNORECASE)


def is_item_page(url: str) -> bool:
    """Return whether the URL is the page of one recording or one deck on a known site."""
    return _compile_item_pages().match(url.strip()) is not None


def _get_host(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def is_icon(image: Any) -> bool:
    """Return whether an image is an icon, an emoji or decoration by its attributes."""
    if set((image.get("class") or "").lower().split()) & _EMOJI_CLASSES:
        return True
    sides = [_read_pixels(image, name) for name in ("width", "height")]
    return any(side is not None and side < _MIN_IMAGE_PIXELS for side in sides)


def _read_pixels(element: Any, name: str) -> float | None:
    style = re.search(rf"(?:^|[;\s]){name}:\s*([\d.]{{1,7}})px", element.get("style") or "")
    value = style.group(1) if style else (element.get(name) or "").strip().removesuffix("px")
    return float(value) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value) else None


def is_invisible_frame(frame: Any) -> bool:
    """Return whether an embedded page has no visible area."""
    style = (frame.get("style") or "").replace(" ", "").lower()
    sides = [_read_pixels(frame, name) for name in ("width", "height")]
    return (
        frame.get("hidden") is not None
        or "display:none" in style
        or "visibility:hidden" in style
        or any(side is not None and side <= 2 for side in sides)
    )


def find_frame_source(frame: Any) -> str:
    """Return the URL of an `iframe`, `embed` or `object`, also of one that waits for consent."""
    names = (*_LAZY_FRAME_SOURCES, "data") if frame.tag == "object" else _LAZY_FRAME_SOURCES
    return next(
        (
            url
            for name in names
            if (url := (frame.get(name) or "").strip()) and not url.startswith(("about:", "data:", "javascript:"))
        ),
        "",
    )


def describe_player(url: str, title: str) -> Player:
    """Return the player at an absolute URL, with the URL of its page for visitors if it is known."""
    page = find_watch_page(url)
    path, host = urlsplit(page).path.lower(), _get_host(page)
    kind = ""
    if _compile_hosts("video").search(host) or _VIDEO_FILE.search(path):
        kind = "Video"
    elif _compile_hosts("audio").search(host) or _AUDIO_FILE.search(path):
        kind = "Audio"
    title = " ".join(title.split())
    if _NO_TITLE.fullmatch(title):
        file_name = path.rpartition("/")[2] if re.search(r"\.[a-z0-9]{2,5}$", path) else ""
        title = unquote(file_name)[:_MAX_NAME_CHARACTERS] or host
    return Player(kind, title, page)


def find_watch_page(url: str) -> str:
    """Return the page for visitors of an embedded player, or else `url`."""
    parts = urlsplit(url)
    host, query = _get_host(url), parse_qs(parts.query)
    values = {name: found[0] for name, found in query.items() if _PARAMETER.fullmatch(found[0])}
    for host_pattern, path_pattern, page in _load_sites()["watch_pages"]:
        if re.fullmatch(host_pattern, host) and (match := re.match(path_pattern, parts.path)):
            try:
                return str(page).format(*match.groups(), **values | {"host": parts.netloc})
            except KeyError:  # a parameter of the rule is not in the query
                continue
    wrapped = query.get(_load_sites()["wrappers"].get(host, ""), [""])[0]
    return wrapped if wrapped.startswith(("https://", "http://")) else url


def find_custom_player(element: Any) -> Player | None:
    """Return the player of an element that a script would replace, such as `lite-youtube`."""
    title = next((value for name in _TITLES if (value := element.get(name))), "")
    if element.tag == "script":
        identifier = element.get("data-id") or ""
        is_speaker_deck = "speakerdeck" in (element.get("class") or "") and re.fullmatch(r"\w{8,64}", identifier)
        return (
            Player("", title or "Speaker Deck", f"https://speakerdeck.com/player/{identifier}")
            if is_speaker_deck
            else None
        )
    identifier = next((value.strip() for name in _IDENTIFIERS if (value := element.get(name))), "")
    if not identifier:
        return None
    names = f"{element.tag} {element.get('class') or ''} {element.get('data-plyr-provider') or ''}".lower()
    if "vimeo" in names and re.fullmatch(r"\d{5,12}", identifier):
        return Player("Video", title or "vimeo.com", f"https://vimeo.com/{identifier}")
    is_youtube = "youtube" in names or element.get("data-youtube-id") or element.get("data-youtube")
    if is_youtube and re.fullmatch(r"[\w-]{11}", identifier):
        return Player("Video", title or "www.youtube.com", f"https://www.youtube.com/watch?v={identifier}")
    return None


def get_file_name(url: str) -> str:
    """Return the last component of the path of `url`, without its suffix."""
    return unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2]).rpartition(".")[0][:_MAX_NAME_CHARACTERS]
