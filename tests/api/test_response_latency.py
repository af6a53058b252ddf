"""Latency of small responses."""

from __future__ import annotations

import statistics
import time

from tests.api.conftest import Api


async def test_small_response_is_not_delayed_by_nagle(api_without_worker: Api) -> None:
    """With Nagle's algorithm, the body of each response after the first few arrived 40 ms after the headers."""
    seconds = []
    for _ in range(31):
        start = time.perf_counter()
        assert (await api_without_worker.get("/healthz")).status_code == 200
        seconds.append(time.perf_counter() - start)
    # Every response would be late, so the fastest ones show the delay even on a busy machine.
    assert statistics.quantiles(seconds[10:], n=4)[0] < 0.03
