"""Write the demo conference as a website and list its sessions for submission."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from jobledger.cli.demo_site.conference import Conference, Talk, load_conference
from jobledger.cli.demo_site.slides import write_slides
from jobledger.cli.demo_site.video import write_video


class SessionFields(TypedDict):
    """The 13 parameters of a session job in `POST /api/events/jobs`."""

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
    """Write the website to `directory` and return the paths of its files, relative to it.

    Takes about two seconds, mostly for encoding the videos.
    """
    conference = load_conference()
    pages = {name: _render(f"{name}.j2", conference=conference) for name in ("index.html", "style.css")}
    for talk in conference.talks:
        pages[f"{_page_path(talk)}index.html"] = _render("talk.html.j2", conference=conference, talk=talk)
    for name, text in pages.items():
        _create_parent(directory, name).write_text(text, encoding="utf-8")
    return [Path(name) for name in pages] + _write_media(directory)


def list_sessions(base_url: str) -> list[SessionFields]:
    """Return the parameters of all sessions of the site at `base_url`.

    English talks have the target language German, and German talks English.
    """
    conference = load_conference()
    root = base_url.rstrip("/")
    return [
        {
            "event": conference.name,
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
        for talk in conference.talks
    ]


def _write_media(directory: Path) -> list[Path]:
    """Write the slides and videos."""
    files = []
    for talk in load_conference().talks:
        if talk.slides:
            files.append(Path(_slides_path(talk)))
            write_slides(talk, _create_parent(directory, _slides_path(talk)))
        if talk.video:
            files.append(Path(_video_path(talk)))
            write_video(talk, talk.video, _create_parent(directory, _video_path(talk)))
    return files


def _create_parent(directory: Path, name: str) -> Path:
    """Return the path of `name` in `directory` after creating its parent directory."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _page_path(talk: Talk) -> str:
    return f"talks/{talk.slug}/"


def _slides_path(talk: Talk) -> str:
    return f"files/{talk.slug}.pdf"


def _video_path(talk: Talk) -> str:
    return f"media/{talk.slug}.{talk.video.container}" if talk.video else ""


def _render(template: str, **context: Conference | Talk) -> str:
    return _TEMPLATES.get_template(template).render(context)


_TEMPLATES = Environment(
    loader=PackageLoader("jobledger.cli.demo_site"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"page_path": _page_path, "slides_path": _slides_path, "video_path": _video_path}
