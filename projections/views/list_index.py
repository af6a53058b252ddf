"""projections: under which headings a job or batch is listed. Every list query is one heading, newest first.

A heading is a scope (who looks: one name, everybody, or somebody who sees everything) and a facet (what is looked for:
all, a batch, a track …). A document carries all of its headings, and an index holds them with the time of creation,
another one with the status before it: so each question is answered by reading just the rows that are shown, and a user
among a million jobs of others pays for their own only. Of several facets the narrowest is looked up, the rest is looked
at. What changes often, the status, is in no heading: they are made once, and again only when access or contents change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import bson
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.domain.access import MAX_PRINCIPAL_NAME_CHARACTERS, Principal, list_readers
from jobledger.ledger.domain.limits import MAX_LIST_INDEX_BYTES, MAX_LIST_INDEX_ROWS, MAX_SEARCHED_CHARACTERS
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Document

Facet = tuple[str, str] | tuple[()]
"""A name and a value: `("track", "Main")`; empty for all."""
NO_FACET: Final[Facet] = ()
_UNRESTRICTED_SCOPE: Final = "*"
_PUBLIC_SCOPE: Final = "+"
_MAX_VALUE_CHARACTERS: Final = 80
_MAX_WORDS: Final = 40
_MIN_WORDS: Final = 5
_SURELY_FITS: Final = 200
"""Rows of which nobody needs to know the size: names have at most 200 characters, and values 80."""
_USUAL_FACETS: Final = 8
_USUAL_TEXT: Final = 16
_WORD: Final = re.compile(r"\w+")


class PageCursor(NamedTuple):
    """Where a page ended: the time of creation and the key of the last document on it."""

    created_at: datetime
    key: str


MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
OMITTED: Final = "omitted"
"""Stands in a page for a field that is not sent, because it is large."""
_BATCH: Final = 101
_RAW: Final = CodecOptions(document_class=RawBSONDocument)
_NEWEST: Final = [("created_at", DESCENDING), ("_id", DESCENDING)]
_BY_LIST_KEY: Final = [("list_keys", ASCENDING), *_NEWEST]
_BY_LIST_KEY_AND_STATUS: Final = [("list_keys", ASCENDING), ("status", ASCENDING), *_NEWEST]
_BY_SEARCH_KEY: Final = [("search_keys", ASCENDING), *_NEWEST]
INDEXES: Final = [IndexModel(keys) for keys in (_BY_LIST_KEY, _BY_LIST_KEY_AND_STATUS, _BY_SEARCH_KEY)]


def index_for(wanted: Document) -> list[tuple[str, int]]:
    """Return which of the indexes answers a query in its order. The database, left to itself, may read and sort."""
    if "search_keys" in wanted or "$and" in wanted:
        return _BY_SEARCH_KEY
    return _BY_LIST_KEY_AND_STATUS if "status" in wanted else _BY_LIST_KEY


def scopes_for_document(document: Mapping[str, Any]) -> list[str]:
    """Return from which points of view a document can be seen: `user_id`, `access_control` and `teams` decide."""
    access = document["access_control"]
    # Nobody can be called by a longer name, so nobody would look from there.
    named = [
        name
        for name in list_readers(document["user_id"], access, document["teams"])
        if len(name) <= MAX_PRINCIPAL_NAME_CHARACTERS
    ]
    public = [_PUBLIC_SCOPE] if access["visibility"] == "public" else []
    return [_UNRESTRICTED_SCOPE, *public, *(f"={name}" for name in named)]


def scopes_for_owner(user_id: str) -> list[str]:
    """Return from which points of view one sees what is its owner's alone."""
    return [_UNRESTRICTED_SCOPE, f"={user_id}"]


def scopes_for_principal(principal: Principal) -> list[str]:
    """Return the scopes that somebody looks from."""
    if principal.is_admin:
        return [_UNRESTRICTED_SCOPE]
    return [_PUBLIC_SCOPE, *sorted(f"={name}" for name in principal.identities)]


def build_list_keys(scopes: Sequence[str], facets: Sequence[Facet]) -> list[str]:
    """Return each facet in each scope. With very many scopes, the last of them are left out: see `is_cut`."""
    return _rows(scopes, [_facet_key(facet) for facet in facets])


def build_search_keys(scopes: Sequence[str], texts: Iterable[object]) -> list[str]:
    """Return the words under which a document is found, in each scope; the first of them, if there are many.

    The more scopes, the fewer words: each word is a row of the index in each scope.
    """
    most = max(_MIN_WORDS, min(_MAX_WORDS, MAX_LIST_INDEX_ROWS // len(scopes)))
    return _rows(scopes, split_words(_searched(texts))[:most])


def _searched(texts: Iterable[object]) -> str:
    """Return the beginning of the texts: a list of half a million speakers must not cost a second at each change."""
    found, characters = [], 0
    for text in texts:
        if isinstance(text, str):
            found.append(text[: MAX_SEARCHED_CHARACTERS - characters])
            characters += len(found[-1]) + 1
            if characters >= MAX_SEARCHED_CHARACTERS:
                break
    return " ".join(found)


def _rows(scopes: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return each text in each scope, for as many of the scopes as fit into the budget of a document."""
    rows = [_list_key(scope, text) for scope in scopes[: _scopes_within(scopes, texts)] for text in texts]
    if len(rows) > _SURELY_FITS and (used := _bytes(rows)) > MAX_LIST_INDEX_BYTES:
        while rows and used > MAX_LIST_INDEX_BYTES:
            last = rows[-len(texts) :]
            used -= _bytes(last)
            del rows[-len(texts) :]
    return rows


def _scopes_within(scopes: Sequence[str], texts: Sequence[str]) -> int:
    return min(len(scopes), MAX_LIST_INDEX_ROWS // max(1, len(texts)))


def _bytes(rows: Iterable[str]) -> int:
    return sum(len(row.encode()) + 12 for row in rows)


def is_truncated(rows: Sequence[str], scopes: Sequence[str], facets: Sequence[object]) -> bool:
    """Return whether `list_keys` has left out scopes: who looks from those does not find the document in lists."""
    return len(rows) < len(scopes) * len(facets)


_FEW_ROWS: Final = 100
_ROW_BYTES: Final = 64


def estimate_list_index_memory(document: Mapping[str, Any]) -> int:
    """Return about how many bytes the list index of a document takes in memory. Only many rows are measured."""
    rows, found = document.get("list_keys", ()), document.get("search_keys", ())
    count = len(rows) + len(found)
    return count * _ROW_BYTES if count <= _FEW_ROWS else count * _ROW_BYTES + sum(map(len, rows)) + sum(map(len, found))


def max_list_index_bytes(document: Mapping[str, Any]) -> int:
    """Return the most that the list index of a job or batch may take: `user_id`, `access_control`, `teams` decide."""
    found = scopes_for_document(document)
    rows = _USUAL_FACETS + max(_MIN_WORDS, min(_MAX_WORDS, MAX_LIST_INDEX_ROWS // len(found)))
    return min(2 * MAX_LIST_INDEX_BYTES, rows * sum(len(scope.encode()) + _USUAL_TEXT for scope in found))


def split_words(text: str) -> list[str]:
    """Return the different words of a text, as they are compared."""
    return list(dict.fromkeys(word[:_MAX_VALUE_CHARACTERS] for word in _WORD.findall(text.casefold())))


def build_query(principal: Principal, facet: Facet = NO_FACET, search: str = "") -> Document:
    """Return the database query for what a principal may see under a facet, with all the words of `search` in it."""
    seen_from = scopes_for_principal(principal)
    under = {"$in": build_list_keys(seen_from, [facet])}
    wanted = split_words(search)
    if not wanted:
        return {"list_keys": under}
    found = [{"search_keys": {"$in": [_list_key(scope, word) for scope in seen_from]}} for word in wanted]
    return {"$and": [*found, {"list_keys": under}]} if facet else {"$and": found}


def build_page_query(
    wanted: Document, after: PageCursor | None, *, newest_first: bool
) -> tuple[Document, list[tuple[str, int]]]:
    """Return the database query for what is behind a place, and its order."""
    direction = DESCENDING if newest_first else ASCENDING
    order = [("created_at", direction), ("_id", direction)]
    if after is None:
        return wanted, order
    beyond, edge = ("$lt", "$lte") if newest_first else ("$gt", "$gte")
    # The edge by itself is a bound of the index; the rest tells those of the same millisecond apart.
    bounds = {"created_at": {edge: after.created_at}}
    strict = [{"created_at": {beyond: after.created_at}}, {"_id": {beyond: after.key}}]
    return {"$and": [wanted, bounds, {"$or": strict}]}, order


async def find_page(
    collection: AsyncCollection[Document],
    wanted: Document,
    *,
    limit: int,
    skip: int = 0,
    after: PageCursor | None = None,
    newest_first: bool = True,
    projection: Mapping[str, Any] | None = None,
    max_bytes: int = MAX_PAGE_BYTES,
) -> tuple[list[Document], PageCursor | None]:
    """Return a page in the order of creation, and where the next one begins, None if this was the last.

    A page ends at `limit` documents, or before the document with which it would have more than `page_bytes` of BSON.
    It has at least one document. In memory are, beside the page, one batch of the server's: at most 16 MB.
    """
    asked_for, order = build_page_query(wanted, after, newest_first=newest_first)
    found: list[Document] = []
    used = 0
    raw = collection.with_options(codec_options=_RAW)
    async with raw.find(
        asked_for, projection, sort=order, limit=limit + 1, skip=skip, hint=index_for(wanted), batch_size=_BATCH
    ) as documents:
        async for document in documents:  # `to_list` would hold several of the server's batches
            used += len(document.raw)
            if len(found) == limit or (found and used > max_bytes):
                return found, PageCursor(found[-1]["created_at"], found[-1]["_id"])
            found.append(bson.decode(document.raw, codec_options=LENIENT_CODEC))
    return found, None


def omit_if_large(field: str, *, max_bytes: int, replacement: Any = OMITTED) -> Document:
    """Return the projection of a field that the database sends only if it takes at most `largest` bytes."""
    return {"$cond": [{"$gt": [{"$bsonSize": {"it": f"${field}"}}, max_bytes]}, replacement, f"${field}"]}


async def count(collection: AsyncCollection[Document], wanted: Document, *, limit: int) -> int:
    """Count documents, but never more than `most`: a count over everything would read everything."""
    return await collection.count_documents(wanted, limit=limit, hint=index_for(wanted))


def unrestricted_list_key(facet: Facet) -> str:
    """Return the heading of a facet for who sees everything."""
    return _list_key(_UNRESTRICTED_SCOPE, _facet_key(facet))


def _facet_key(facet: Facet) -> str:
    text = ""
    for part in facet:
        short = part if len(part) <= _MAX_VALUE_CHARACTERS else _digest(part)
        text += "/" + (short.replace("/", "//") if "/" in short else short)
    return text


def _digest(value: str) -> str:
    return blake2b(value.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _list_key(scope: str, text: str) -> str:
    """The length before the scope keeps two that begin alike apart, whatever is in their names."""
    return f"{len(scope)}{scope}{text}"
