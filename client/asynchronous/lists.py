"""Iterate over the lists of the API. A page is read when its first item is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from jobledger.client.asynchronous.transport import AsyncTransport
from jobledger.client.responses import Model, read_models
from jobledger.client.submission import build_list_query


async def iterate_list(
    transport: AsyncTransport, path: str, name: str, model: type[Model], filters: Mapping[str, Any], page_size: int
) -> AsyncIterator[Model]:
    """Yield the items of a list that match all filters. Items that are added meanwhile are not returned twice.

    Raises:
        InvalidRequestError: A filter does not exist, or its value is invalid.
    """
    query = build_list_query(filters, page_size)
    while True:
        answer = await transport.get(path, query)
        for item in read_models(model, answer.content, name, answer.url):
            yield item
        cursor = answer.content.get("next_cursor")
        if not isinstance(cursor, str):
            return
        query["cursor"] = cursor
