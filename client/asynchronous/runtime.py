"""What differs between the two clients: how to sleep, to call blocking functions, and which client of httpx sends.

`synchronous/runtime.py` has the same names. The other modules there are generated from those beside this one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import httpx

from jobledger.client.urls import get_http_options

P = ParamSpec("P")
R = TypeVar("R")


async def sleep(seconds: float) -> None:
    """Wait."""
    await asyncio.sleep(seconds)


async def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that may block, in a thread."""
    return await asyncio.to_thread(function, *args, **kwargs)


def create_http_client(url: httpx.URL) -> httpx.AsyncClient:
    """Return a client of httpx for this URL."""
    return httpx.AsyncClient(**get_http_options(url))


def get_connection_owner() -> object:
    """Return what connections belong to. Another event loop, or another process after a fork, cannot use them."""
    return os.getpid(), asyncio.get_running_loop()
