"""benchmarks: every claim about speed, measured against the plain driver in the same run: `make bench`.

    python -m benchmarks [append] [subscribe] [jobs] [http] [http-scale] [maintenance]
                         [--events 20000] [--rounds 7] [--strict]

On a mongod of its own, or on the replica set that JOBLEDGER_TEST_MONGODB_URI names (a database that is dropped again).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from pymongo import MongoClient

from benchmarks import append_throughput, http_latency, job_throughput, log_maintenance, subscriptions
from benchmarks.measurement import Result, print_results
from jobledger.cli.composition import tune_garbage_collector
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded import EmbeddedServer

BENCHMARKS = {
    "append": append_throughput.run,
    "subscribe": subscriptions.run,
    "jobs": job_throughput.run,
    "http": http_latency.run,
    "http-scale": http_latency.run_at_scale,
    "maintenance": log_maintenance.run,
}
DATABASE = f"jobledger-bench-{os.getpid()}"


def main() -> int:
    """Measure, print the table, and say with the exit code whether all aims were reached (with --strict)."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description="Jobledger against the plain driver.")
    options.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(BENCHMARKS)} (all)")
    options.add_argument("--events", type=int, default=20_000, help="a round")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--strict", action="store_true", help="fail if an aim was missed")
    asked = options.parse_args()
    if unknown := set(asked.parts) - BENCHMARKS.keys():
        options.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with _server() as uri:
        results = asyncio.run(
            _measure(Connection(uri, DATABASE), asked.parts or list(BENCHMARKS), asked.events, asked.rounds)
        )
    print_results(results)
    return 1 if asked.strict and not all(result.is_met for result in results) else 0


async def _measure(connection: Connection, parts: list[str], events: int, rounds: int) -> list[Result]:
    tune_garbage_collector()
    results: list[Result] = []
    for name in parts:
        sys.stderr.write(f"measuring: {name}\n")
        results += await BENCHMARKS[name](connection, events=events, rounds=rounds)
    return results


@contextmanager
def _server() -> Iterator[str]:
    if uri := os.environ.get("JOBLEDGER_TEST_MONGODB_URI"):
        with MongoClient[dict[str, object]](uri) as client:
            client.drop_database(DATABASE)
            yield uri
            client.drop_database(DATABASE)
        return
    with tempfile.TemporaryDirectory() as data, EmbeddedServer.start(Path(data)) as server:
        yield server.uri


if __name__ == "__main__":
    sys.exit(main())
