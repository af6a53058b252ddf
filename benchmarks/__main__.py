"""Measure each performance claim against the plain driver in the same run: `make bench`.

    python -m benchmarks [append] [subscribe] [pickup] [jobs] [submit] [client] [http] [http-scale] [maintenance]
                         [--events 20000] [--rounds 7] [--strict]

The benchmarks start their own mongod. If JOBLEDGER_TEST_MONGODB_URI names a replica set, they use a database of it and
drop the database afterwards.
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

from benchmarks import (
    append_throughput,
    client_submission,
    http_latency,
    job_throughput,
    log_maintenance,
    submission,
    subscriptions,
)
from benchmarks.measurement import Result, print_results
from jobledger.cli.hosting.process_tuning import tune_garbage_collector
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded import EmbeddedServer

BENCHMARKS = {
    "append": append_throughput.run,
    "subscribe": subscriptions.run,
    "pickup": job_throughput.run_pickup,
    "jobs": job_throughput.run,
    "submit": submission.run,
    "client": client_submission.run,
    "http": http_latency.run,
    "http-scale": http_latency.run_at_scale,
    "maintenance": log_maintenance.run,
}
DATABASE = f"jobledger-bench-{os.getpid()}"


def main() -> int:
    """Run the benchmarks and print the results. With --strict, return 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare Jobledger with the plain MongoDB driver."
    )
    parser.add_argument("names", nargs="*", metavar="benchmark", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--events", type=int, default=20_000, help="events per round (default: 20000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per comparison (default: 7)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target was missed")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))} (choose from {', '.join(BENCHMARKS)})")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with _run_server() as uri:
        results = asyncio.run(
            _measure(Connection(uri, DATABASE), options.names or list(BENCHMARKS), options.events, options.rounds)
        )
    print_results(results)
    return 1 if options.strict and not all(result.is_met for result in results) else 0


async def _measure(connection: Connection, names: list[str], events: int, rounds: int) -> list[Result]:
    tune_garbage_collector()
    results: list[Result] = []
    for name in names:
        sys.stderr.write(f"measuring: {name}\n")
        results += await BENCHMARKS[name](connection, events=events, rounds=rounds)
    return results


@contextmanager
def _run_server() -> Iterator[str]:
    if uri := os.environ.get("JOBLEDGER_TEST_MONGODB_URI"):
        with MongoClient[dict[str, object]](uri) as client:
            client.drop_database(DATABASE)
            yield uri
            client.drop_database(DATABASE)
        return
    with tempfile.TemporaryDirectory() as data_dir, EmbeddedServer.start(Path(data_dir)) as server:
        yield server.uri


if __name__ == "__main__":
    sys.exit(main())
