"""Measure submissions by the Python client beside the same POST by httpx alone, one after the other."""

from __future__ import annotations

import asyncio
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
import orjson

from benchmarks.measurement import Result, compare_latencies, open_empty_database
from benchmarks.processes import run_processes, run_role
from jobledger.client.synchronous.client import Client
from jobledger.ledger.mongo.connection import Connection

SLOTS = 10
MAX_RATIO = 1.3
_WARM_UP_CALLS = 20
_PARAMETERS = {"file": False}
_NOT_BEFORE = datetime(2100, 1, 1, tzinfo=UTC)
_BODY = {"job_type": "echo", "not_before": "2100-01-01T00:00:00Z", "parameters": _PARAMETERS}


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Compare the latencies of both. They alternate, so both meet the same load of the machine."""
    with tempfile.TemporaryDirectory() as directory:
        async with (
            open_empty_database(connection),
            run_processes(1, run_role, connection, Path(directory), "api", SLOTS) as [api],
        ):
            bare, client = await asyncio.to_thread(_measure, api.ready, max(50, events // 200) * rounds)
    name = "client: Client.submit; baseline: httpx, without Idempotency-Key"
    return [compare_latencies(name, bare, client, max_ratio=MAX_RATIO)]


def _measure(url: str, calls: int) -> tuple[list[float], list[float]]:
    """Return the latencies of httpx and of the client in seconds."""
    bare: list[float] = []
    by_client: list[float] = []
    with httpx.Client(base_url=url, trust_env=False) as http, Client(url) as client:
        for number in range(calls + _WARM_UP_CALLS):
            begin = time.perf_counter()
            body = orjson.dumps(_BODY)
            response = http.post("/api/events/jobs", content=body, headers={"Content-Type": "application/json"})
            assert response.json()["job_id"]  # noqa: S101 - checks the benchmark itself
            middle = time.perf_counter()
            client.submit("echo", _PARAMETERS, not_before=_NOT_BEFORE)
            end = time.perf_counter()
            if number >= _WARM_UP_CALLS:
                bare.append(middle - begin)
                by_client.append(end - middle)
    return bare, by_client
