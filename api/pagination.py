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
from jobledger.projections.views.list_index import ListQuery
from jobledger.projections.views.paging import MAX_PAGE_BYTES, PageCursor, count


def encode_cursor(cursor: PageCursor) -> str:
    """Return the text that `Cursor` of api/schemas/request_models.py reads."""
    text = f"{round(cursor.created_at.timestamp() * 1000)} {cursor.key}"
    return urlsafe_b64encode(text.encode()).decode()


@dataclass(frozen=True, slots=True)
class ListTotal:
    """How many items of a list match its filters. `is_lower_bound`: there may be more."""

    count: int
    is_lower_bound: bool = False


async def count_total(views: Views, db_query: ListQuery) -> ListTotal:
    """Count the documents that match the query of a list, up to a limit."""
    return ListTotal(*await count(views, db_query))


def build_list_response(
    field_name: str, items: Sequence[Document], next_page: PageCursor | None, total: ListTotal
) -> Response:
    """Return a page of a list.

    Args:
        field_name: The field of the response that holds the items.
        items: The items of the page.
        next_page: Where the next page starts. None: this page is the last.
        total: How many items match.
    """
    content: dict[str, Any] = {"status": "success", "total": total.count, field_name: items}
    if total.is_lower_bound:
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
