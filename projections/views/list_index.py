"""Build the list index of jobs, batches and deliveries: the keys by which lists and searches find a document.

A list key consists of a list scope and a facet. The scope says for whom the document is listed: one name, the public,
or principals without restrictions. The facet says by what it is listed: everything, a batch, a track and so on. A
document carries all its list keys in `list_keys`, and a search key for each word and scope in `search_keys`.

One index holds the list keys with the creation time, a second one also the status, a third one the search keys. A list
reads only the index entries that it shows, however many documents other users have. If a query names several facets,
the index looks up the most selective one, and the database filters by the others. The status is in no key because it
changes often. Keys are built once, and again only when access or contents change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.domain.access import MAX_PRINCIPAL_NAME_CHARACTERS, Principal, list_readers
from jobledger.ledger.domain.limits import MAX_LIST_INDEX_BYTES, MAX_LIST_INDEX_ROWS, MAX_SEARCHED_CHARACTERS
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views.documents import set_name_in_list

Facet = tuple[str, str] | tuple[()]
"""A name and a value, such as `("track", "Main")`. Empty: the facet of all documents."""
NO_FACET: Final[Facet] = ()
_UNRESTRICTED_SCOPE: Final = "*"
_PUBLIC_SCOPE: Final = "+"
_MAX_VALUE_CHARACTERS: Final = 80
_MAX_WORDS: Final = 40
_MIN_WORDS: Final = 5
_MAX_UNMEASURED_KEYS: Final = 200
"""This many keys always fit into the budget: names have at most 200 characters, values 80."""
_USUAL_FACETS: Final = 8
"""Facets of a session in a batch: all, batch, user, type, track, event, day, language. Only failed jobs have more."""
_USUAL_KEY_CHARACTERS: Final = 16
_WORD: Final = re.compile(r"\w+")

_NEWEST: Final = [("created_at", DESCENDING), ("_id", DESCENDING)]
_BY_LIST_KEY: Final = [("list_keys", ASCENDING), *_NEWEST]
_BY_LIST_KEY_AND_STATUS: Final = [("list_keys", ASCENDING), ("status", ASCENDING), *_NEWEST]
_BY_SEARCH_KEY: Final = [("search_keys", ASCENDING), *_NEWEST]
INDEXES: Final = [IndexModel(keys) for keys in (_BY_LIST_KEY, _BY_LIST_KEY_AND_STATUS, _BY_SEARCH_KEY)]


# Keys of a document -------------------------------------------------------------------------------------------------


def get_document_scopes(document: Mapping[str, Any]) -> list[str]:
    """Return the scopes in which a job or batch is listed, from its `user_id`, `access_control` and `teams`."""
    access = document["access_control"]
    public = [_PUBLIC_SCOPE] if access["visibility"] == "public" else []
    # No principal can have a longer name, so no query would use such a scope.
    readers = list_readers(document["user_id"], access, document["teams"])
    names = [f"={name}" for name in readers if len(name) <= MAX_PRINCIPAL_NAME_CHARACTERS]
    return [_UNRESTRICTED_SCOPE, *public, *names]


def set_list_index(document: Document, facets: Sequence[Facet], texts: Iterable[object]) -> None:
    """Set the list keys and search keys of a job or batch.

    If there are too many scopes for all keys, the document is flagged as truncated: the lists of some principals do not
    show it.
    """
    scopes = get_document_scopes(document)
    document["list_keys"] = build_list_keys(scopes, facets)
    document["search_keys"] = build_search_keys(scopes, texts)
    is_truncated = len(document["list_keys"]) < len(scopes) * len(facets)
    set_name_in_list(document, "truncated", "list_keys", is_listed=is_truncated)


def get_owner_scopes(user_id: str) -> list[str]:
    """Return the scopes of a document that only its owner and unrestricted principals may see."""
    return [_UNRESTRICTED_SCOPE, f"={user_id}"]


def build_list_keys(scopes: Sequence[str], facets: Sequence[Facet]) -> list[str]:
    """Return one key for each facet in each scope. The last of very many scopes are left out."""
    return _build_keys(scopes, [_build_facet_key(facet) for facet in facets])


def build_search_keys(scopes: Sequence[str], texts: Iterable[object]) -> list[str]:
    """Return one key for each word of the texts in each scope.

    The more scopes there are, the fewer words get a key: each word is an index row in each scope.
    """
    max_words = max(_MIN_WORDS, min(_MAX_WORDS, MAX_LIST_INDEX_ROWS // len(scopes)))
    return _build_keys(scopes, split_words(_join_searched(texts))[:max_words])


def split_words(text: str) -> list[str]:
    """Return the distinct words of a text, normalized for comparison."""
    return list(dict.fromkeys(word[:_MAX_VALUE_CHARACTERS] for word in _WORD.findall(text.casefold())))


def _join_searched(texts: Iterable[object]) -> str:
    """Return the beginning of the texts, because joining half a million speakers takes a second for each change."""
    parts, characters = [], 0
    for text in texts:
        if isinstance(text, str):
            parts.append(text[: MAX_SEARCHED_CHARACTERS - characters])
            characters += len(parts[-1]) + 1
            if characters >= MAX_SEARCHED_CHARACTERS:
                break
    return " ".join(parts)


def _build_keys(scopes: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Return each text in each scope, for as many scopes as fit into the budget of a document."""
    max_scopes = min(len(scopes), MAX_LIST_INDEX_ROWS // max(1, len(texts)))
    keys = [_build_list_key(scope, text) for scope in scopes[:max_scopes] for text in texts]
    used = _count_bytes(keys) if len(keys) > _MAX_UNMEASURED_KEYS else 0
    while used > MAX_LIST_INDEX_BYTES:
        used -= _count_bytes(keys[-len(texts) :])
        del keys[-len(texts) :]
    return keys


def _count_bytes(keys: Iterable[str]) -> int:
    return sum(len(key.encode()) + 12 for key in keys)


def _build_facet_key(facet: Facet) -> str:
    text = ""
    for part in facet:
        short = part if len(part) <= _MAX_VALUE_CHARACTERS else _compute_digest(part)
        text += "/" + (short.replace("/", "//") if "/" in short else short)
    return text


def _compute_digest(value: str) -> str:
    return blake2b(value.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _build_list_key(scope: str, text: str) -> str:
    """Return the key of a text in a scope. The length prefix separates scopes of which one begins with the other."""
    return f"{len(scope)}{scope}{text}"


# Size ---------------------------------------------------------------------------------------------------------------

_FEW_KEYS: Final = 100
_KEY_MEMORY_BYTES: Final = 64


def estimate_list_index_memory(document: Mapping[str, Any]) -> int:
    """Estimate the bytes that the list index of a document takes in memory. Only many keys are measured."""
    list_keys, search_keys = document.get("list_keys", ()), document.get("search_keys", ())
    count = len(list_keys) + len(search_keys)
    fixed = count * _KEY_MEMORY_BYTES
    return fixed if count <= _FEW_KEYS else fixed + sum(map(len, list_keys)) + sum(map(len, search_keys))


def estimate_list_index_bytes(document: Mapping[str, Any]) -> int:
    """Estimate the size of the list index of a job or batch in bytes.

    Args:
        document: `user_id`, `access_control` and `teams`. The number and length of its facets and words are assumed.
    """
    scopes = get_document_scopes(document)
    rows = _USUAL_FACETS + max(_MIN_WORDS, min(_MAX_WORDS, MAX_LIST_INDEX_ROWS // len(scopes)))
    return min(2 * MAX_LIST_INDEX_BYTES, rows * sum(len(scope.encode()) + _USUAL_KEY_CHARACTERS for scope in scopes))


# Queries ------------------------------------------------------------------------------------------------------------


def get_principal_scopes(principal: Principal) -> list[str]:
    """Return the scopes that a principal may list."""
    if principal.is_admin:
        return [_UNRESTRICTED_SCOPE]
    return [_PUBLIC_SCOPE, *sorted(f"={name}" for name in principal.identities)]


def build_unrestricted_list_key(facet: Facet) -> str:
    """Return the list key of a facet in the scope of unrestricted principals."""
    return _build_list_key(_UNRESTRICTED_SCOPE, _build_facet_key(facet))


def build_query(
    principal: Principal,
    facets: Sequence[tuple[str, str, str | None]],
    *,
    equal: Mapping[str, Any],
    search: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> Document:
    """Return the database query for the documents that a principal may see and that match all filters.

    Args:
        facets: Facet name, document field and value, the most selective facet first. The index looks up the first
            facet that has a value, and the database filters by the fields of the others.
        equal: Values of other document fields. None matches any value.
        search: A text. All of its words must be in the document.
    """
    selected = [(name, field, value) for name, field, value in facets if value is not None]
    facet: Facet = (selected[0][0], selected[0][2]) if selected else NO_FACET
    scopes = get_principal_scopes(principal)
    query: Document = {"list_keys": {"$in": build_list_keys(scopes, [facet])}}
    if words := split_words(search or ""):
        by_words = [{"search_keys": {"$in": [_build_list_key(scope, word) for scope in scopes]}} for word in words]
        query = {"$and": [*by_words, query] if facet else by_words}
    query |= {field: value for _, field, value in selected[1:]}
    query |= {field: value for field, value in equal.items() if value is not None}
    if created_after or created_before:
        bounds = {"$gt": created_after, "$lt": created_before}
        query["created_at"] = {operator: time for operator, time in bounds.items() if time is not None}
    return query


def select_index(query: Document) -> list[tuple[str, int]]:
    """Return the index that answers a query in list order. Without a hint, the database may read and sort instead."""
    if "search_keys" in query or "$and" in query:
        return _BY_SEARCH_KEY
    return _BY_LIST_KEY_AND_STATUS if "status" in query else _BY_LIST_KEY
