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

from jobledger.api.auth.permissions import get_principal
from jobledger.api.dashboard.html_budget import HtmlBudget
from jobledger.api.dashboard.locales import negotiate_language, script_messages, translator_for
from jobledger.api.dashboard.session_cookie import uses_session_cookie
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import EVENT_TYPES

DASHBOARD_PATH: Final = "/monitoring/events"
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'"
)
_MAX_INDENTED_BYTES: Final = 16 * 1024
_MAX_LABEL_CHARACTERS: Final = 200
_budget: ContextVar[HtmlBudget] = ContextVar("budget")
"""The budget of the page that is being rendered. Imported macros do not see the variables of a page."""
_MEDIA_TYPES: Final = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def render_page(request: Request, template: str, *, status: int = 200, **context: Any) -> Response:
    """Return a page of the dashboard."""
    language = negotiate_language(request.headers.get("accept-language", ""))
    principal: Principal | None = request.scope.get("principal")
    budget = HtmlBudget()
    _budget.set(budget)
    text = (
        _environment()
        .get_template(template)
        .render(
            t=translator_for(language),
            said=script_messages(language),
            language=language,
            root="../" * (request.url.path.count("/") - 1) or "./",
            path=request.url.path,
            budget=budget,
            query=dict(request.query_params),
            me=principal,
            event_types=sorted(EVENT_TYPES),
            version=static_files_digest(),
            signed_by_cookie=uses_session_cookie(request),
            **{"position": None, "live": None, **context},
        )
    )
    headers = {
        "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
        "Cache-Control": "private, no-store",
        "Content-Language": language,
        "Referrer-Policy": "same-origin",  # without one, a browser does not say where a form was sent from
        "Vary": "Accept-Language, Cookie",
    }
    return Response(text, status, headers, "text/html")


def has_monitor_access(request: Request) -> bool:
    """Whether who asks may see how everything is."""
    return bool(get_principal(request).roles & {"admin", "monitor"})


@cache
def load_static_files() -> Mapping[str, bytes]:
    """Return the scripts and styles by their names."""
    folder = files(__package__).joinpath("static")
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if PurePosixPath(file.name).suffix in _MEDIA_TYPES
    }


@cache
def static_files_digest() -> str:
    """Return what changes when a script or style does: a part of their addresses."""
    digest = sha256()
    for name, content in sorted(load_static_files().items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


def static_file_response(name: str) -> Response | None:
    """Return a script or style. Its address changes with it, so a browser need not ask again."""
    content = load_static_files().get(name)
    if content is None:
        return None
    kind = _MEDIA_TYPES[PurePosixPath(name).suffix]
    return Response(content, headers={"Cache-Control": "public, max-age=31536000, immutable"}, media_type=kind)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobledger.api.dashboard", "templates"),
        autoescape=True,
        finalize=_finalize,
        undefined=ChainableUndefined,  # what an event of another type does not have, is empty
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "bytes": format_bytes,
        "label": job_label,
        "pretty": format_json,
        "rows": _limit_rows,
        "seconds": format_duration,
    }
    environment.filters |= filters
    environment.globals |= {"prefix": DASHBOARD_PATH.removeprefix("/")}
    return environment


def _finalize(value: Any) -> Any:
    budget = _budget.get(None)  # there is none while a template is compiled
    return value if budget is None else budget.render_value(value)


def _limit_rows(items: Iterable[Any]) -> Iterator[Any]:
    return _budget.get().limit_rows(items)


def format_json(value: Any) -> str:
    """Return a value as JSON for people: indented, unless it is large. Indents can be a hundred times the content."""
    text = orjson.dumps(value)
    if len(text) <= _MAX_INDENTED_BYTES:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    return text.decode()


def job_label(job: Mapping[str, Any]) -> str:
    """Return what a job is called: its name, its session or its ID."""
    session = job["parameters"].get("session")
    name = job["job_name"] or (session if isinstance(session, str) else "") or job["job_id"]
    return str(name)[:_MAX_LABEL_CHARACTERS]


def format_bytes(size_bytes: int) -> str:
    """A number of bytes for people: `1.5 MB`."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def format_duration(seconds: float | None) -> str:
    """A duration for people: `0.42 s`, `75 s`, `12:30 min`, `3:05:00 h`."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
