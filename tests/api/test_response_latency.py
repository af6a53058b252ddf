"""How answers travel."""

from __future__ import annotations

import statistics
import time

from tests.api.conftest import Api


async def test_a_small_answer_does_not_wait_for_the_clients_acknowledgement(api_without_worker: Api) -> None:
    """With Nagle's algorithm on, the body of every answer after the first few came 40 ms after its head."""
    seconds = []
    for _ in range(31):
        begun = time.perf_counter()
        assert (await api_without_worker.get("/healthz")).status_code == 200
        seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < 0.03
