"""Pages of lists: cursors, list responses, and pages that are limited by count and by size."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

from jobledger.api.http.errors import build_json_response
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.slots import Views
from jobledger.projections.views.paging import MAX_COUNT, MAX_PAGE_BYTES, PageCursor, count


def encode_cursor(cursor: PageCursor) -> str:
    """Return the text that `Cursor` of api/schemas/request_models.py reads."""
    text = f"{round(cursor.created_at.timestamp() * 1000)} {cursor.key}"
    return urlsafe_b64encode(text.encode()).decode()


async def build_list_response(
    views: Views,
    name: str,
    items: Sequence[Document],
    next_page: PageCursor | None,
    db_query: Document,
    *,
    exact_total: int | None = None,
) -> Response:
    """Return a page of a list.

    Args:
        views: The views.
        name: The view, and the field of the items.
        items: The items of the page.
        next_page: Where the next page starts. None: this page is the last.
        db_query: The query of the list.
        exact_total: How many items match. None: count them, up to `MAX_COUNT`.
    """
    total = await count(views, name, db_query) if exact_total is None else exact_total
    content: dict[str, Any] = {"status": "success", "total": total, name: items}
    if exact_total is None and total >= MAX_COUNT:
        content["total_is_lower_bound"] = True
    if next_page is not None:
        content["next_cursor"] = encode_cursor(next_page)
    return build_json_response(content)


@dataclass(slots=True)
class JsonPage:
    """Encoded items of a page. It is full with `limit` items or `MAX_PAGE_BYTES` bytes."""

    limit: int
    items: list[orjson.Fragment] = field(default_factory=list)
    _size: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.items) >= self.limit or self._size >= MAX_PAGE_BYTES

    def add(self, text: bytes) -> None:
        """Append an encoded item."""
        self.items.append(orjson.Fragment(text))
        self._size += len(text)
