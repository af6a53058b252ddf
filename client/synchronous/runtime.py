"""What differs between the two clients: see `asynchronous/runtime.py`. The other modules here are generated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import httpx

from jobledger.client.urls import get_http_options

P = ParamSpec("P")
R = TypeVar("R")


def sleep(seconds: float) -> None:
    """Wait."""
    time.sleep(seconds)


def run_blocking(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that may block."""
    return function(*args, **kwargs)


def create_http_client(url: httpx.URL) -> httpx.Client:
    """Return a client of httpx for this URL."""
    return httpx.Client(**get_http_options(url))


def get_connection_owner() -> object:
    """Return what connections belong to. Another process cannot use them after a fork."""
    return os.getpid()
