"""Write the demo conference as a website, serve it, and list its sessions for submission."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from jobledger.cli.demo_site.conference import Talk, load_conference
from jobledger.cli.demo_site.slides import write_slides
from jobledger.cli.demo_site.video import write_video
from jobledger.cli.hosting.server import BackgroundServer
from jobledger.workers.processor import JSON


def write_site(directory: Path) -> list[Path]:
    """Write the website to `directory` and return the paths of its files, relative to it.

    Takes about two seconds, mostly for encoding the videos.
    """
    conference = load_conference()
    pages = {name: _render(f"{name}.j2") for name in ("index.html", "style.css")}
    files = []
    for talk in conference.talks:
        pages[f"{_make_page_path(talk)}index.html"] = _render("talk.html.j2", talk=talk)
        if talk.slides:
            files.append(_make_slides_path(talk))
            write_slides(talk, _create_parent(directory, _make_slides_path(talk)))
        if talk.video:
            files.append(_make_video_path(talk))
            write_video(talk, talk.video, _create_parent(directory, _make_video_path(talk)))
    for name, text in pages.items():
        _create_parent(directory, name).write_text(text, encoding="utf-8")
    return [Path(name) for name in (*pages, *files)]


def list_sessions(base_url: str) -> list[dict[str, JSON]]:
    """Return the parameters of a session job for each talk of the site at `base_url`.

    The target language is that of the talk, because a translation needs a language model.
    """
    conference = load_conference()
    root = base_url.rstrip("/")
    return [
        {
            "event": conference.name,
            "session": talk.title,
            "url": f"{root}/{_make_page_path(talk)}",
            "filename": talk.filename,
            "track": talk.track,
            "day": talk.day,
            "starttime": talk.start,
            "endtime": talk.end,
            "speakers": [speaker.name for speaker in talk.speakers],
            "video_url": f"{root}/{quote(_make_video_path(talk))}" if talk.video else None,
            "attachments_url": f"{root}/{quote(_make_slides_path(talk))}" if talk.slides else None,
            "source_language": talk.language,
            "target_language": talk.language,
        }
        for talk in conference.talks
    ]


@asynccontextmanager
async def serve_directory(directory: Path) -> AsyncIterator[str]:
    """Serve `directory` on a free port of 127.0.0.1 and yield the base URL without a trailing slash.

    Supports content types by file name, byte ranges and `index.html` for directories.
    """
    app = Starlette(routes=[Mount("/", StaticFiles(directory=directory, html=True))])
    server = BackgroundServer(
        uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]), name="demo site")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running


def _create_parent(directory: Path, name: str) -> Path:
    """Return the path of `name` in `directory` after creating its parent directory."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _make_page_path(talk: Talk) -> str:
    return f"talks/{talk.slug}/"


def _make_slides_path(talk: Talk) -> str:
    return f"files/{talk.slug}.pdf"


def _make_video_path(talk: Talk) -> str:
    return f"media/{talk.slug}.{talk.video.container}" if talk.video else ""


def _render(template: str, **context: Talk) -> str:
    return _TEMPLATES.get_template(template).render(context, conference=load_conference())


_TEMPLATES = Environment(
    loader=PackageLoader("jobledger.cli.demo_site"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"page_path": _make_page_path, "slides_path": _make_slides_path, "video_path": _make_video_path}
