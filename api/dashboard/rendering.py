"""api: from a template to an answer, in the reader's language, at whatever path prefix a proxy has put us."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, Final

import orjson
from jinja2 import ChainableUndefined, Environment, PackageLoader
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import who_asks
from jobledger.api.dashboard.locales import preferred, said_by_scripts, words_in
from jobledger.api.dashboard.login import uses_cookie
from jobledger.api.dashboard.page_budget import PageBudget
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import EVENT_TYPES

PREFIX: Final = "/monitoring/events"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'"
)
_LARGEST_INDENTED_BYTES: Final = 16 * 1024
_LABEL_CHARACTERS: Final = 200
_budget: ContextVar[PageBudget] = ContextVar("budget")
"""The budget of the page that is being rendered. Imported macros do not see the variables of a page."""
_TYPES: Final = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


def page(request: Request, template: str, *, status: int = 200, **content: Any) -> Response:
    """Return a page of the dashboard."""
    language = preferred(request.headers.get("accept-language", ""))
    principal: Principal | None = request.scope.get("principal")
    budget = PageBudget()
    _budget.set(budget)
    text = (
        _environment()
        .get_template(template)
        .render(
            t=words_in(language),
            said=said_by_scripts(language),
            language=language,
            root="../" * (request.url.path.count("/") - 1) or "./",
            path=request.url.path,
            budget=budget,
            query=dict(request.query_params),
            me=principal,
            event_types=sorted(EVENT_TYPES),
            version=version(),
            signed_by_cookie=uses_cookie(request),
            **{"position": None, "live": None, **content},
        )
    )
    headers = {
        "Content-Security-Policy": _POLICY,
        "Cache-Control": "private, no-store",
        "Content-Language": language,
        "Referrer-Policy": "same-origin",  # without one, a browser does not say where a form was sent from
        "Vary": "Accept-Language, Cookie",
    }
    return Response(text, status, headers, "text/html")


def is_monitor(request: Request) -> bool:
    """Whether who asks may see how everything is."""
    return bool(who_asks(request).roles & {"admin", "monitor"})


@cache
def statics() -> Mapping[str, bytes]:
    """Return the scripts and styles by their names."""
    folder = files(__package__).joinpath("static")
    return {file.name: file.read_bytes() for file in folder.iterdir() if PurePosixPath(file.name).suffix in _TYPES}


@cache
def version() -> str:
    """Return what changes when a script or style does: a part of their addresses."""
    digest = sha256()
    for name, content in sorted(statics().items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


def static(name: str) -> Response | None:
    """Return a script or style. Its address changes with it, so a browser need not ask again."""
    content = statics().get(name)
    if content is None:
        return None
    kind = _TYPES[PurePosixPath(name).suffix]
    return Response(content, headers={"Cache-Control": "public, max-age=31536000, immutable"}, media_type=kind)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobledger.api.dashboard", "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=ChainableUndefined,  # what an event of another type does not have, is empty
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "bytes": in_words,
        "label": label,
        "pretty": pretty,
        "rows": _rows,
        "seconds": seconds_in_words,
    }
    environment.filters |= filters
    environment.globals |= {"prefix": PREFIX.removeprefix("/")}
    return environment


def _shown(value: Any) -> Any:
    budget = _budget.get(None)  # there is none while a template is compiled
    return value if budget is None else budget.shown(value)


def _rows(items: Iterable[Any]) -> Iterator[Any]:
    return _budget.get().rows(items)


def pretty(value: Any) -> str:
    """Return a value as JSON for people: indented, unless it is large. Indents can be a hundred times the content."""
    text = orjson.dumps(value)
    if len(text) <= _LARGEST_INDENTED_BYTES:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    return text.decode()


def label(job: Mapping[str, Any]) -> str:
    """Return what a job is called: its name, its session or its ID."""
    session = job["parameters"].get("session")
    name = job["job_name"] or (session if isinstance(session, str) else "") or job["job_id"]
    return str(name)[:_LABEL_CHARACTERS]


def in_words(size: int) -> str:
    """A number of bytes for people: `1.5 MB`."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def seconds_in_words(seconds: float | None) -> str:
    """A duration for people: `0.42 s`, `75 s`, `12:30 min`, `3:05:00 h`."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
