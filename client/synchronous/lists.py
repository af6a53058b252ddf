# Generated from client/asynchronous/lists.py by `make reference`. Change that file instead.
"""Iterate over the lists of the API. A page is read when its first item is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobledger.client.responses import Model, read_models
from jobledger.client.submission import build_list_query
from jobledger.client.synchronous.transport import Transport


def iterate_list(
    transport: Transport, path: str, name: str, model: type[Model], filters: Mapping[str, Any], page_size: int
) -> Iterator[Model]:
    """Yield the items of a list that match all filters. Items that are added meanwhile are not returned twice.

    Raises:
        InvalidRequestError: A filter does not exist, or its value is invalid.
    """
    query = build_list_query(filters, page_size)
    while True:
        answer = transport.get(path, query)
        yield from read_models(model, answer.content, name, answer.url)
        cursor = answer.content.get("next_cursor")
        if not isinstance(cursor, str):
            return
        query["cursor"] = cursor
