"""Build the list index of jobs, batches and deliveries: the keys by which lists and searches find a document.

A list key consists of a list scope and a facet. The scope says for whom the document is listed: one name, the public,
or principals without restrictions. The facet says by what it is listed: everything, a batch, a track and so on. A
document carries all its list keys in `list_keys`, and a search key for each word and scope in `search_keys`.

One index holds the list keys with the creation time, another one the search keys. A list reads only the index entries
that it shows, however many documents other users have. If a query names several facets, the database tries each of them
and continues with the one that finds the page first. The status is a facet, too. Because it changes often, the list
keys of jobs are in separate rows (projections/views/job_list.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
_ALWAYS_LISTED_SCOPES: Final = _MAX_UNMEASURED_KEYS // 10
"""No document has more than ten facets: status, batch, user, type, error, track, event, day, language and all."""
_FIXED_SCOPES: Final = 3
"""Unrestricted principals, the public and the owner."""
_MIN_CHARGED_CHARACTERS: Final = 20
"""At least this is charged for the text of a key, so that the budget does not depend on the status."""
_USUAL_FACETS: Final = 9
"""Facets of a session in a batch: all of these except the error."""
_USUAL_KEY_CHARACTERS: Final = 16
_KEY_OVERHEAD_BYTES: Final = 12
"""What BSON adds to a key in a list."""
_WORD: Final = re.compile(r"\w+")

_NEWEST: Final = [("created_at", DESCENDING), ("_id", DESCENDING)]
_BY_LIST_KEY: Final = [("list_keys", ASCENDING), *_NEWEST]
_BY_SEARCH_KEY: Final = [("search_keys", ASCENDING), *_NEWEST]
_BY_ID: Final = [("_id", ASCENDING)]
_LAST_CHARACTER: Final = "\U0010ffff"
"""Greater than every character of an ID."""
LIST_INDEX: Final = IndexModel(_BY_LIST_KEY)
SEARCH_INDEX: Final = IndexModel(_BY_SEARCH_KEY)


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
    """Set the list keys and search keys of a document."""
    set_search_keys(document, lambda: facets, texts)
    document["list_keys"] = build_list_keys(get_document_scopes(document), facets)


def set_search_keys(document: Document, build_facets: Callable[[], Sequence[Facet]], texts: Iterable[object]) -> None:
    """Set the search keys of a document whose list keys are in another view.

    If there are too many scopes for all list keys, the document is flagged as truncated: the lists of some principals
    do not show it.
    """
    scopes = get_document_scopes(document)
    document["search_keys"] = build_search_keys(scopes, texts)
    is_truncated = len(scopes) > _ALWAYS_LISTED_SCOPES and (
        _count_listed_scopes(scopes, [_build_facet_key(facet) for facet in build_facets()]) < len(scopes)
    )
    set_name_in_list(document, "truncated", "list_keys", is_listed=is_truncated)


def lists_all_scopes(document: Mapping[str, Any]) -> bool:
    """Return whether a document has so few scopes that each of them certainly has all list keys."""
    access = document["access_control"]
    names = len(access["read_access"]) + len(access["write_access"]) + len(access["admin_access"])
    return _FIXED_SCOPES + names + len(document["teams"]) <= _ALWAYS_LISTED_SCOPES


def get_owner_scopes(user_id: str) -> list[str]:
    """Return the scopes of a document that only its owner and unrestricted principals may see."""
    return [_UNRESTRICTED_SCOPE, f"={user_id}"]


def build_list_keys(scopes: Sequence[str], facets: Sequence[Facet]) -> list[str]:
    """Return one key for each facet in each scope, facet by facet. The last of very many scopes are left out."""
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
    listed = scopes[: _count_listed_scopes(scopes, texts)]
    return [_build_list_key(scope, text) for text in texts for scope in listed]


def _count_listed_scopes(scopes: Sequence[str], texts: Sequence[str]) -> int:
    """Return for how many of the scopes all texts fit into the budget of a document."""
    count = min(len(scopes), MAX_LIST_INDEX_ROWS // max(1, len(texts)))
    if count * len(texts) <= _MAX_UNMEASURED_KEYS:
        return count
    text_bytes = sum(max(len(text.encode()), _MIN_CHARGED_CHARACTERS) for text in texts)
    used = 0
    for number, scope in enumerate(scopes[:count]):
        used += len(texts) * (len(_build_list_key(scope, "").encode()) + _KEY_OVERHEAD_BYTES) + text_bytes
        if used > MAX_LIST_INDEX_BYTES:
            return number
    return count


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


@dataclass(frozen=True, slots=True)
class ListQuery:
    """A query for the documents of a list.

    Attributes:
        view: Name of the view that answers it.
        filter: The database query.
        scopes: The scopes that the principal may list. A document has at least one of them.
        is_search: Whether the search keys answer it, or else the list keys.
        document_filter: If the view has the rows of other documents: what these must still match when they are read.
        has_id_prefix: Whether the filter contains a range of IDs. There are few, so the index of IDs answers it.
    """

    view: str
    filter: Document
    scopes: frozenset[str]
    is_search: bool = False
    document_filter: Document = field(default_factory=dict)
    has_id_prefix: bool = False

    @property
    def hint(self) -> list[tuple[str, int]]:
        """The index that answers the query in list order. Without it, the database may read and sort instead."""
        if self.has_id_prefix:
            return _BY_ID
        return _BY_SEARCH_KEY if self.is_search else _BY_LIST_KEY

    def with_id_prefix(self, prefix: str | None) -> ListQuery:
        """Return the query for the documents of this one whose IDs begin with a prefix. None: for all of them."""
        if prefix is None:
            return self
        id_range = {"_id": {"$gte": prefix, "$lt": prefix + _LAST_CHARACTER}}
        return replace(self, filter=self.filter | id_range, has_id_prefix=True)


def get_principal_scopes(principal: Principal) -> list[str]:
    """Return the scopes that a principal may list."""
    if principal.is_admin:
        return [_UNRESTRICTED_SCOPE]
    return [_PUBLIC_SCOPE, *sorted(f"={name}" for name in principal.identities)]


def build_unrestricted_list_key(facet: Facet) -> str:
    """Return the list key of a facet in the scope of unrestricted principals."""
    return _build_list_key(_UNRESTRICTED_SCOPE, _build_facet_key(facet))


def build_query(
    view: str,
    principal: Principal,
    facets: Mapping[str, str | Sequence[str] | None],
    *,
    conditions: Mapping[str, Any],
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    owner: str | None = None,
    document_conditions: Mapping[str, Any] | None = None,
) -> ListQuery:
    """Return the query for the documents that a principal may see and that match all filters.

    Args:
        view: A view whose documents have list keys.
        facets: Values by facet, of which a document has one. None matches any value.
        conditions: Values of, or database conditions on, other document fields. None matches any value.
        owner: The value of the facet `user`, if there is one.
        document_conditions: Like `conditions`, for `ListQuery.document_filter`.
    """
    selected: list[list[Facet]] = [
        [(name, value)] if isinstance(value, str) else [(name, one_value) for one_value in value]
        for name, value in facets.items()
        if value is not None
    ]
    scopes = get_principal_scopes(principal)
    # An owner's scope combines the other facets with the owner. So few documents of other users are examined.
    has_scope = owner is not None and len(owner) <= MAX_PRINCIPAL_NAME_CHARACTERS
    other_scopes = [f"={owner}"] if has_scope and principal.is_admin else scopes
    by_facet = [
        {"list_keys": {"$in": build_list_keys(scopes if values == [("user", owner)] else other_scopes, values)}}
        for values in selected or [[NO_FACET]]
    ]
    query_filter = {"$and": by_facet, **_build_conditions(conditions, created_after, created_before)}
    document_filter = _build_conditions(document_conditions or {})
    return ListQuery(view, query_filter, frozenset(scopes), document_filter=document_filter)


def build_search(
    view: str,
    principal: Principal,
    words: Sequence[str],
    *,
    conditions: Mapping[str, Any],
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> ListQuery:
    """Return the query for the documents that a principal may see, that contain all words and match the conditions.

    Args:
        view: A view whose documents have search keys.
        words: From `split_words`, at least one.
        conditions: Values of, or database conditions on, document fields. None matches any value.
    """
    scopes = get_principal_scopes(principal)
    by_word = [{"search_keys": {"$in": [_build_list_key(scope, word) for scope in scopes]}} for word in words]
    query_filter = {"$and": by_word, **_build_conditions(conditions, created_after, created_before)}
    return ListQuery(view, query_filter, frozenset(scopes), is_search=True)


def _build_conditions(
    conditions: Mapping[str, Any], created_after: datetime | None = None, created_before: datetime | None = None
) -> Document:
    built = {field: value for field, value in conditions.items() if value is not None}
    bounds = {"$gt": created_after, "$lt": created_before}
    if created := {operator: time for operator, time in bounds.items() if time is not None}:
        built["created_at"] = created
    return built
