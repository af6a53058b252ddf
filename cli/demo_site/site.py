"""cli: the invented conference as files, and as sessions to submit."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from jobledger.cli.demo_site import talks
from jobledger.cli.demo_site.deck import write_deck
from jobledger.cli.demo_site.talks import Talk
from jobledger.cli.demo_site.video import write_video


class SessionFields(TypedDict):
    """The 13 fields of a session, as `POST /api/events/jobs` takes them."""

    event: str
    session: str
    url: str
    filename: str
    track: str
    day: str
    starttime: str
    endtime: str
    speakers: list[str]
    video_url: str | None
    attachments_url: str | None
    source_language: str
    target_language: str


def write_site(directory: Path) -> list[Path]:
    """Write the whole site below `directory` and return its files, relative to it.

    Takes about two seconds, most of it for the films.
    """
    pages = {"index.html": _page("index.html.j2"), "style.css": _page("style.css.j2")}
    pages |= {f"{_page_path(talk)}index.html": _page("talk.html.j2", talk=talk) for talk in talks.TALKS}
    for name, text in pages.items():
        _made(directory, name).write_text(text, encoding="utf-8")
    return [Path(name) for name in pages] + _downloads(directory)


def list_sessions(base_url: str) -> list[SessionFields]:
    """The conference's sessions when its site is served at `base_url`; English ones ask for German, and the reverse."""
    root = base_url.rstrip("/")
    return [
        {
            "event": talks.CONFERENCE,
            "session": talk.title,
            "url": f"{root}/{_page_path(talk)}",
            "filename": talk.filename,
            "track": talk.track,
            "day": talk.day,
            "starttime": talk.start,
            "endtime": talk.end,
            "speakers": [speaker.name for speaker in talk.speakers],
            "video_url": f"{root}/{quote(_video_path(talk))}" if talk.video else None,
            "attachments_url": f"{root}/{quote(_slides_path(talk))}" if talk.slides else None,
            "source_language": talk.language,
            "target_language": "en" if talk.language == "de" else "de",
        }
        for talk in talks.TALKS
    ]


def _downloads(directory: Path) -> list[Path]:
    """Write decks and films."""
    files = []
    for talk in talks.TALKS:
        if talk.slides:
            files.append(Path(_slides_path(talk)))
            write_deck(talk, _made(directory, _slides_path(talk)))
        if talk.video:
            files.append(Path(_video_path(talk)))
            write_video(talk, talk.video, _made(directory, _video_path(talk)))
    return files


def _made(directory: Path, name: str) -> Path:
    """The path of `name` below `directory`, its folder made."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _page_path(talk: Talk) -> str:
    return f"talks/{talk.slug}/"


def _slides_path(talk: Talk) -> str:
    return f"files/{talk.slug}.pdf"


def _video_path(talk: Talk) -> str:
    return f"media/{talk.slug}.{talk.video.container}" if talk.video else ""


def _page(template: str, **context: Talk) -> str:
    return _TEMPLATES.get_template(template).render(context)


_TEMPLATES = Environment(
    loader=PackageLoader("jobledger.cli.demo_site"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"site": talks, "page_path": _page_path, "slides_path": _slides_path, "video_path": _video_path}
