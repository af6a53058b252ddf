"""api: the OpenAPI document, the same as a page to read, which needs no script, and where to begin."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any, Final

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.context import get_api_context
from jobledger.api.http.conditional import Conditional, compute_etag
from jobledger.api.http.errors import json_response

_METHODS: Final = ("get", "post", "put", "delete")


class Docs:
    """The document as it is sent, as JSON and as a page. Each is made when it is first asked for: it takes a moment."""

    def __init__(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        self._describe = describe

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """What the interface is."""
        return self._describe()

    @cached_property
    def json(self) -> _Content:
        """It, for programs."""
        return _Content(orjson.dumps(self.document), "application/json", {})

    @cached_property
    def page(self) -> _Content:
        """It, for people."""
        text = _page_of(self.document)
        style = text.partition("<style>")[2].partition("</style>")[0]
        policy = f"default-src 'none'; style-src 'sha256-{_base64_digest(style)}'; base-uri 'none'; form-action 'none'"
        return _Content(text.encode(), "text/html", {"Content-Security-Policy": policy})


class _Content:
    def __init__(self, body: bytes, media_type: str, headers: Mapping[str, str]) -> None:
        self._body = body
        self._media_type = media_type
        self._headers = {**headers, "Cache-Control": "no-cache"}
        self._etag = compute_etag(body, media_type, *headers.values())

    def answer(self, request: Request) -> Response:
        return Conditional(request.headers, self._etag).respond(self._body, self._media_type, self._headers)


async def get_index(request: Request) -> Response:
    """GET /"""
    prefix = get_api_context(request).signed_links.path_prefix
    return json_response(
        {
            "status": "success",
            "service": "jobledger",
            "jobs": f"{prefix}/api/events/jobs",
            "batches": f"{prefix}/api/events/batches",
            "statistics": f"{prefix}/api/monitoring/events/stats",
            "log": f"{prefix}/api/ledger/stream",
            "openapi": f"{prefix}/api/openapi.json",
            "docs": f"{prefix}/api/docs",
            "dashboard": f"{prefix}/monitoring/events",
        }
    )


async def get_openapi_document(request: Request) -> Response:
    """GET /api/openapi.json"""
    made: Docs = request.app.state.docs
    return (await asyncio.to_thread(lambda: made.json)).answer(request)


async def get_docs_page(request: Request) -> Response:
    """GET /api/docs"""
    made: Docs = request.app.state.docs
    return (await asyncio.to_thread(lambda: made.page)).answer(request)


def _base64_digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


def _page_of(document: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("jobledger.api", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    marked = MarkdownIt("commonmark", {"html": False})
    environment.filters |= {
        "markdown": lambda text: Markup(marked.render(text)),  # noqa: S704 - HTML in the text is escaped
        "inline": lambda text: Markup(marked.renderInline(text)),  # noqa: S704 - as above
        "pretty": lambda content: orjson.dumps(content, option=orjson.OPT_INDENT_2).decode(),
        "kind": describe_type,
    }
    return environment.get_template("docs.html.j2").render(document=document, groups=_groups(document))


def _groups(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the operations by their tags, in the document's order."""
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                groups[item[method]["tags"][0]].append({"method": method.upper(), "path": path, **item[method]})
    return groups


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return in a few words what fits a schema; components by their names."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " | ".join(describe_type(one) for one in schema[several])
    named = str(schema.get("type", "any"))
    if named == "array":
        return f"[{describe_type(schema.get('items', {}))}]"
    if named == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"{{name: {describe_type(schema['additionalProperties'])}}}"
    return f"{named}{_bounds(schema)}"


def _bounds(schema: Mapping[str, Any]) -> str:
    least = schema.get("minimum", schema.get("minLength"))
    most = schema.get("maximum", schema.get("maxLength"))
    parts = [str(schema["format"])] if "format" in schema else []
    if "exclusiveMinimum" in schema:
        parts.append(f"> {schema['exclusiveMinimum']}")
    if least is not None or most is not None:
        parts.append(f"{'' if least is None else least} … {'' if most is None else most}".strip())
    return f" ({', '.join(parts)})" if parts else ""
