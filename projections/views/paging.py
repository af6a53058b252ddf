"""Read and count the documents of a view, page by page, in order of creation.

The lists of jobs, batches and deliveries share this module. Each query is answered by one of the indexes of
projections/views/list_index.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

import bson
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import ASCENDING, DESCENDING

from jobledger.ledger.mongo.connection import LENIENT_CODEC, Document, translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views.list_index import ListQuery

MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
MAX_COUNT: Final = 10_000
"""The highest number that `count` returns for one facet. A count without a limit would read the whole index range."""
MAX_COMBINED_COUNT: Final = 1000
"""The same for several facets or words, of which the database can find only one by the index."""
MAX_LISTED_FIELD_BYTES: Final = 16 * 1024
"""A list omits a field with more bytes of BSON."""
OMITTED: Final = "omitted"
"""Placeholder in a page for a field that the database does not send because it is large."""
_READ_BATCH_DOCUMENTS: Final = 101
RAW: Final = CodecOptions(document_class=RawBSONDocument)


class PageCursor(NamedTuple):
    """The end of a page: creation time and key of its last document."""

    created_at: datetime
    key: str


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which page of a list to read.

    Attributes:
        limit: Maximum number of documents.
        skip: Number of documents to skip.
        after: Cursor of the previous page.
        newest_first: Whether to sort by descending creation time.
        max_bytes: The page ends before the document that would exceed this number of bytes of BSON. A page has at
            least one document.
    """

    limit: int
    skip: int = 0
    after: PageCursor | None = None
    newest_first: bool = True
    max_bytes: int = MAX_PAGE_BYTES


def build_page_query(
    query: Document, after: PageCursor | None, *, newest_first: bool
) -> tuple[Document, list[tuple[str, int]]]:
    """Return the database query for the documents after a cursor, and the sort order."""
    direction = DESCENDING if newest_first else ASCENDING
    order = [("created_at", direction), ("_id", direction)]
    if after is None:
        return query, order
    beyond, beyond_or_equal = ("$lt", "$lte") if newest_first else ("$gt", "$gte")
    # The first condition is a bound of the index. The second one orders documents of the same millisecond.
    bound = {"created_at": {beyond_or_equal: after.created_at}}
    strict = [{"created_at": {beyond: after.created_at}}, {"_id": {beyond: after.key}}]
    return {"$and": [query, bound, {"$or": strict}]}, order


async def find_page(
    views: Views, query: ListQuery, request: PageRequest, *, projection: Mapping[str, Any] | None = None
) -> tuple[list[Document], PageCursor | None]:
    """Return one page of a view's documents in order of creation, and the cursor of the next page, if any.

    Memory holds the page and one batch of the server's (at most 16 MB).
    """
    page_query, order = build_page_query(query.filter, request.after, newest_first=request.newest_first)
    page: list[Document] = []
    used_bytes = 0
    collection = views[query.view].with_options(codec_options=RAW)
    with translate_errors(f"listing {query.view}"):
        async with collection.find(
            page_query,
            projection,
            sort=order,
            limit=request.limit + 1,
            skip=request.skip,
            hint=query.hint,
            batch_size=_READ_BATCH_DOCUMENTS,
        ) as documents:
            async for document in documents:  # `to_list` would hold several of the server's batches
                used_bytes += len(document.raw)
                if len(page) == request.limit or (page and used_bytes > request.max_bytes):
                    return page, PageCursor(page[-1]["created_at"], page[-1]["_id"])
                page.append(bson.decode(document.raw, codec_options=LENIENT_CODEC))
    return page, None


async def count(views: Views, query: ListQuery) -> tuple[int, bool]:
    """Count the documents that match a query, up to a limit. Also return whether there may be more."""
    limit = MAX_COUNT if len(query.filter["$and"]) == 1 else MAX_COMBINED_COUNT
    with translate_errors(f"counting {query.view}"):
        number = await views[query.view].count_documents(query.filter, limit=limit, hint=query.hint)
    return number, number >= limit


def omit_if_large(field: str, *, max_bytes: int, replacement: Any = OMITTED) -> Document:
    """Return the projection of a field that the database replaces if it has more than `max_bytes` of BSON."""
    return {"$cond": [{"$gt": [{"$bsonSize": {"it": f"${field}"}}, max_bytes]}, replacement, f"${field}"]}
