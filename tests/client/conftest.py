"""Run each test with the asynchronous and the synchronous client. Both are used in the same way by `Caller`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from jobledger import AsyncClient, Client
from tests.api.conftest import (
    Api,
    api,
    api_without_worker,
    header_auth,
    header_auth_api,
    run_without_worker,
)

__all__ = ["Api", "api", "api_without_worker", "header_auth", "header_auth_api", "run_without_worker"]


def list_names(directory: Path) -> list[str]:
    """Return the names in a directory."""
    return sorted(path.name for path in directory.iterdir())


class Caller:
    """Calls a client of either kind. A call of the synchronous client runs in a thread."""

    def __init__(self, kind: Literal["async", "sync"]) -> None:
        self.is_async = kind == "async"
        self._clients: list[Any] = []

    def create(self, url: str, **options: Any) -> Any:
        client: Any = AsyncClient(url, **options) if self.is_async else Client(url, **options)
        self._clients.append(client)
        return client

    async def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a method of a client returns."""
        if self.is_async:
            return await function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    async def take(self, items: Any, number: int | None = None) -> list[Any]:
        """Return the first items of an iterator, or all."""
        taken: list[Any] = []
        while number is None or len(taken) < number:
            item = await (anext(items, None) if self.is_async else asyncio.to_thread(next, items, None))
            if item is None:
                break
            taken.append(item)
        return taken

    async def close(self, closeable: Any) -> None:
        """Close a client or a stream."""
        await (closeable.aclose() if self.is_async else asyncio.to_thread(closeable.close))

    async def close_all(self) -> None:
        for client in self._clients:
            await self.close(client)


@pytest.fixture(params=["async", "sync"])
async def call(request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    """The caller of one kind of client."""
    caller = Caller(request.param)
    yield caller
    await caller.close_all()
