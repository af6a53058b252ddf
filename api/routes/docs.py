"""The OpenAPI document, the same as an HTML page without scripts, and the index of the service."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from jobledger.api.http.conditional import ConditionalRequest, compute_etag
from jobledger.api.http.errors import build_json_response
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.response_models import IndexResponse

_METHODS: Final = ("get", "post", "put", "delete")


class Docs:
    """The OpenAPI document as JSON and as a page. Each is built at the first request, because this takes a moment."""

    def __init__(self, build_document: Callable[[], Mapping[str, Any]]) -> None:
        self._build_document = build_document

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """The OpenAPI document."""
        return self._build_document()

    @cached_property
    def json(self) -> _StaticContent:
        """The document as JSON."""
        return _StaticContent(orjson.dumps(self.document), "application/json", {})

    @cached_property
    def page(self) -> _StaticContent:
        """The document as an HTML page."""
        text = _render_page(self.document)
        style = text.partition("<style>")[2].partition("</style>")[0]
        digest = b64encode(sha256(style.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        return _StaticContent(text.encode(), "text/html", {"Content-Security-Policy": policy})


@dataclass(frozen=True, slots=True)
class _StaticContent:
    """Content that does not change while the process runs. `headers` belong to the representation."""

    body: bytes
    media_type: str
    headers: Mapping[str, str]

    def build_response(self, request: Request) -> Response:
        """Return the content, or 304 if the client has it."""
        etag = compute_etag(self.body, self.media_type, *self.headers.values())
        headers = {**self.headers, "Cache-Control": "no-cache"}
        return ConditionalRequest(request.headers, etag).respond(self.body, self.media_type, headers)


@Operation("GET", "/", response=IndexResponse)
async def get_index(request: Request) -> Response:
    """List the URLs of the service."""
    prefix = get_api_context(request).signed_links.path_prefix
    return build_json_response(
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


@Operation("GET", "/api/openapi.json", response="application/json", is_conditional=True)
async def get_openapi_document(request: Request) -> Response:
    """Read this OpenAPI document."""
    docs: Docs = request.app.state.docs
    return (await asyncio.to_thread(lambda: docs.json)).build_response(request)


@Operation("GET", "/api/docs", response="text/html", is_conditional=True)
async def get_docs_page(request: Request) -> Response:
    """Read this document as an HTML page."""
    docs: Docs = request.app.state.docs
    return (await asyncio.to_thread(lambda: docs.page)).build_response(request)


def _render_page(document: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("jobledger.api", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    markdown = MarkdownIt("commonmark", {"html": False})
    environment.filters |= {
        "markdown": lambda text: Markup(markdown.render(text)),  # noqa: S704 - HTML in the text is escaped
        "inline": lambda text: Markup(markdown.renderInline(text)),  # noqa: S704 - as above
        "format_json": lambda content: orjson.dumps(content, option=orjson.OPT_INDENT_2).decode(),
        "describe_type": describe_type,
    }
    return environment.get_template("docs.html.j2").render(document=document, groups=_group_operations(document))


def _group_operations(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the operations by tag, in the order of the document."""
    shared = {f"#/components/responses/{name}": value for name, value in document["components"]["responses"].items()}
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                operation = {"method": method.upper(), "path": path, **item[method]}
                operation["responses"] = {
                    status: {**shared.get(response.get("$ref"), {}), **response}
                    for status, response in operation["responses"].items()
                }
                groups[operation["tags"][0]].append(operation)
    return groups


def describe_type(schema: Mapping[str, Any]) -> str:
    """Return a short text for a schema. References are shown as the names of their components."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return " | ".join(describe_type(choice) for choice in schema[keyword])
    name = str(schema.get("type", "any"))
    if name == "array":
        return f"[{describe_type(schema.get('items', {}))}]"
    if name == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"{{name: {describe_type(schema['additionalProperties'])}}}"
    return f"{name}{_format_bounds(schema)}"


def _format_bounds(schema: Mapping[str, Any]) -> str:
    minimum = schema.get("minimum", schema.get("minLength"))
    maximum = schema.get("maximum", schema.get("maxLength"))
    parts = [str(schema["format"])] if "format" in schema else []
    if "exclusiveMinimum" in schema:
        parts.append(f"> {schema['exclusiveMinimum']}")
    if minimum is not None or maximum is not None:
        parts.append(f"{'' if minimum is None else minimum} … {'' if maximum is None else maximum}".strip())
    return f" ({', '.join(parts)})" if parts else ""
