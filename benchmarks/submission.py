"""Measure single submissions over HTTP, one after the other, while the other roles follow them."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.measurement import Result, compare_rates, measure_rate, open_empty_database
from benchmarks.processes import Child, Pipe, read_cpu_seconds, read_server_cpu_seconds, run_processes, run_role
from jobledger.cli.hosting.server import open_listener
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database

SLOTS = 100
CPU_LIMIT_MS = 3.0
"""CPU time of all processes for one submission, in milliseconds."""
_NOT_DUE = orjson.dumps({"job_type": "echo", "parameters": {"file": False}, "not_before": "2100-01-01T00:00:00Z"})
_DUE = orjson.dumps({"job_type": "echo", "parameters": {"file": False}})


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Compare submissions, with a projector and a worker, with a route that inserts a document."""
    requests = max(50, events // 40)
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory)
        async with (
            open_empty_database(connection) as (db, _event_store),
            run_processes(1, run_role, connection, store, "projector", SLOTS) as projectors,
            run_processes(1, run_role, connection, store, "worker", SLOTS) as workers,
            run_processes(1, run_role, connection, store, "api", SLOTS) as [api],
            run_processes(1, _serve_baseline, connection) as [baseline],
        ):
            port, roles = int(api.ready.rpartition(":")[2]), [*projectors, *workers, api]
            cpu_ms: list[float] = []

            async def submit_not_due() -> float:
                before = await _read_cpu_seconds(db, roles)
                rate = await _measure_rate(port, "/api/events/jobs", _NOT_DUE, requests)
                cpu_ms.append((await _read_cpu_seconds(db, roles) - before) * 1000 / requests)
                return rate

            async def insert() -> float:
                return await _measure_rate(baseline.ready, "/", _NOT_DUE, requests)

            waiting = await compare_rates(
                "submit: POST one by one, not due; driver: Starlette route with one insert",
                insert,
                submit_not_due,
                rounds=rounds,
                min_ratio=0.5,
            )
            running = await compare_rates(
                "submit: POST one by one, with a worker that runs the jobs",
                insert,
                lambda: _measure_rate(port, "/api/events/jobs", _DUE, requests),
                rounds=rounds,
                min_ratio=0.3,
            )
    cpu = statistics.median(cpu_ms)
    total = Result(
        "submit: CPU of all roles and the database for one POST",
        "",
        f"{cpu:.1f} ms",
        f"≤ {CPU_LIMIT_MS:g} ms",
        cpu <= CPU_LIMIT_MS,
    )
    return [waiting, running, total]


async def _read_cpu_seconds(db: Database, roles: Sequence[Child]) -> float:
    return await read_server_cpu_seconds(db) + sum(read_cpu_seconds(role.process) for role in roles)


async def _measure_rate(port: int, path: str, body: bytes, requests: int) -> float:
    """Return the requests per second on one connection, one at a time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = ["Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    request = "\r\n".join([f"POST {path} HTTP/1.1", *headers, "", ""]).encode() + body

    async def send_all() -> None:
        for _ in range(requests):
            writer.write(request)
            response = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(response.partition(b"content-length:")[2].split(b"\r\n")[0])
            answer = await reader.readexactly(length)
            status = response.partition(b"\r\n")[0]
            assert b" 202" in status, (status, answer)  # noqa: S101 - checks the benchmark itself

    rate = await measure_rate(requests, send_all())
    writer.close()
    return rate


def _serve_baseline(connection: Connection, pipe: Pipe) -> None:
    async def serve() -> None:
        async with connection.create_client() as client:
            jobs = client[connection.db_name].get_collection("submissions", write_concern=DURABLE)

            async def submit(request: Request) -> Response:
                result = await jobs.insert_one(orjson.loads(await request.body()))
                return Response(orjson.dumps({"job_id": str(result.inserted_id)}), 202, media_type="application/json")

            app = Starlette(routes=[Route("/", submit, methods=["POST"])])
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
            with open_listener("127.0.0.1", 0) as listener:
                pipe.send(listener.getsockname()[1])
                await server.serve(sockets=[listener])

    asyncio.run(serve())
