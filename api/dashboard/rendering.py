"""Render dashboard templates: in the language of the reader, with relative URLs that work under any path prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final

import orjson
from jinja2 import ChainableUndefined, Environment, PackageLoader, pass_context
from jinja2.runtime import Context
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.dashboard.html_budget import HtmlBudget
from jobledger.api.dashboard.translations import format_number, get_script_messages, get_translator, negotiate_language
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import EVENT_TYPES

DASHBOARD_PATH: Final = "/monitoring/events"
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'"
)
_MAX_INDENTED_BYTES: Final = 16 * 1024
_MAX_LABEL_CHARACTERS: Final = 200
STATIC_MEDIA_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_budget: ContextVar[HtmlBudget] = ContextVar("budget")
"""Budget of the page that is being rendered. A context variable, because imported macros do not see page variables."""


def render_page(request: Request, template: str, *, status: int = 200, **context: Any) -> Response:
    """Render a template of the dashboard with the variables in `context`.

    The variable `live_source` selects the stream that updates the page, with the events after `position`.
    """
    language = negotiate_language(request.headers.get("accept-language", ""))
    principal: Principal | None = request.scope.get("principal")
    budget = HtmlBudget()
    _budget.set(budget)
    text = (
        _create_environment()
        .get_template(template)
        .render(
            t=get_translator(language),
            script_messages=get_script_messages(language),
            language=language,
            root_path=get_root_path(request),
            path=request.url.path,
            budget=budget,
            principal=principal,
            event_types=sorted(EVENT_TYPES),
            static_version=compute_static_files_digest(),
            uses_session_cookie=request.scope.get("uses_session_cookie", False),
            status=status,
            **{"position": None, "live_source": None, **context},
        )
    )
    headers = {
        "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
        "Cache-Control": "private, no-store",
        "Content-Language": language,
        "Referrer-Policy": "same-origin",  # without a policy, browsers send no Origin with the forms
        "Vary": "Accept-Language, Cookie",
    }
    return Response(text, status, headers, "text/html")


def get_root_path(request: Request) -> str:
    """Return the relative URL from the requested page to the root of the API, such as `../../`."""
    return "../" * (request.url.path.count("/") - 1) or "./"


@cache
def load_static_files() -> Mapping[str, bytes]:
    """Return the content of scripts, style sheets and icons by file name."""
    folder = files(__package__).joinpath("static")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@cache
def compute_static_files_digest() -> str:
    """Compute a digest of all static files. It is part of their URLs, so browsers load changed files again."""
    digest = sha256()
    for name, content in sorted(load_static_files().items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


@cache
def _create_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("jobledger.api.dashboard", "templates"),
        autoescape=True,
        finalize=_render_value,
        undefined=ChainableUndefined,  # events of other types lack some fields
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "format_bytes": format_bytes,
        "format_changed_names": format_changed_names,
        "format_duration": format_duration,
        "format_json": format_json,
        "format_rounded": format_rounded,
        "format_job_label": format_job_label,
        "limit_rows": limit_rows,
    }
    environment.filters |= filters
    environment.globals |= {"dashboard_path": DASHBOARD_PATH.removeprefix("/")}
    return environment


def _render_value(value: Any) -> Any:
    budget = _budget.get(None)  # not set while Jinja compiles a template
    return value if budget is None else budget.render_value(value)


def limit_rows(items: Iterable[Any]) -> Iterator[Any]:
    """Yield items until the budget of the page is used up."""
    return _budget.get().limit_rows(items)


def format_json(value: Any) -> str:
    """Return a value as JSON. Small values are indented; indentation could enlarge large values a hundredfold."""
    text = orjson.dumps(value)
    if len(text) <= _MAX_INDENTED_BYTES:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    return text.decode()


def format_job_label(job: Mapping[str, Any]) -> str:
    """Return the name of a job, or else the title of its conference session, or else its ID."""
    session = job["parameters"].get("session")
    name = job["job_name"] or (session if isinstance(session, str) else "") or job["job_id"]
    return str(name)[:_MAX_LABEL_CHARACTERS]


def format_changed_names(difference: Any) -> str:
    """Return the names of changed parameters, separated by commas. In a damaged event, `difference` may be anything."""
    changes = difference if isinstance(difference, list) else []
    names = (change.get("name") for change in changes if isinstance(change, dict))
    return ", ".join(name for name in names if isinstance(name, str))


@pass_context
def format_rounded(context: Context, number: float) -> str:
    """Return a number with three significant digits, as it is written in the language of the page."""
    return format_number(float(f"{number:.3g}"), context["language"])


@pass_context
def format_bytes(context: Context, size_bytes: int) -> str:
    """Return a size with its unit: `1.5 MB`."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size_bytes >= scale:
            return f"{format_number(round(size_bytes / scale, 1), context['language'])} {unit}"
    return f"{size_bytes} B"


@pass_context
def format_duration(context: Context, seconds: float | None) -> str:
    """Return a duration with its unit: `0.42 s`, `75 s`, `12:30 min`, `3:05:00 h`."""
    if seconds is None:
        return ""
    if seconds < 100:
        rounded = float(f"{seconds:.2g}") if seconds < 10 else round(seconds)
        return f"{format_number(rounded, context['language'])} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
