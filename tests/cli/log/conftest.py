"""A ledger, the commands for it, and histories of events."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from pymongo import MongoClient

from jobledger.ledger.domain.commands import CancelJob, FailAttempt, RestartJob
from jobledger.ledger.domain.events import ErrorInfo
from jobledger.ledger.mongo.connection import Connection
from tests.projections.expected_views import assert_views_match_log, make_results, run_random_history
from tests.support.in_process_command import run_command_in_process
from tests.support.installation import CommandOutcome
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_results

Work = Callable[[RunningRoles], Coroutine[Any, Any, Any]]


class LedgerCommands:
    """A ledger and the commands for it, run in the process of the test."""

    def __init__(
        self,
        uri: str,
        db_name: str,
        directory: Path,
        capfd: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.connection = Connection(uri, db_name)
        self.directory = directory
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def run(self, *arguments: str, database: str | None = None) -> CommandOutcome:
        self._monkeypatch.setenv("JOBLEDGER_MONGODB__DB_NAME", database or self.connection.db_name)
        self._monkeypatch.setenv("COLUMNS", "250")
        return run_command_in_process(*arguments, capfd=self._capfd, monkeypatch=self._monkeypatch)

    def json(self, *arguments: str, exit_code: int = 0, database: str | None = None) -> Any:
        outcome = self.run(*arguments, "--json", database=database)
        assert outcome.exit_code == exit_code, outcome
        return json.loads(outcome.out)

    def run_with_roles(self, work: Work, *, database: str | None = None) -> Any:
        connection = Connection(self.connection.uri, database or self.connection.db_name)

        async def start_and_run() -> Any:
            async with run_roles_in_process(connection, self.directory / "results", projector=True) as roles:
                result = await work(roles)
                await roles.wait_for_views()
                return result

        return asyncio.run(start_and_run())


@pytest.fixture
def ledger(
    mongodb_uri: str, db_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LedgerCommands]:
    configured = {"mongodb": {"uri": mongodb_uri, "db_name": db_name}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield LedgerCommands(mongodb_uri, db_name, tmp_path, capfd, monkeypatch)
    structlog.reset_defaults()  # the command configured it for a stderr that is closed after the test


@pytest.fixture
def other_database(mongodb_uri: str, db_name: str) -> Iterator[str]:
    name = f"{db_name}_b"
    yield name
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client.drop_database(name)


async def write_job_history(roles: RunningRoles) -> str:
    """Write a job that fails, is restarted and completes, and a pending one. Return the ID of the first."""
    job_id = await roles.submit({"text": "Grüße"}, job_name="Die Rede")
    attempt = await roles.claim(job_id, "worker-7")
    retry_at = datetime.now(UTC) + timedelta(minutes=5)
    await roles.handle_commands(
        job_id, FailAttempt("worker-7", attempt, ErrorInfo(code="BROKEN", message="it broke"), retry_at)
    )
    await roles.handle_commands(job_id, CancelJob("user:ada", "no longer wanted"), RestartJob("user:ada"))
    attempt = await roles.claim(job_id, "worker-8")
    await roles.handle_commands(job_id, report_results("worker-8", attempt, make_results(job_id)))
    await roles.submit()
    return job_id


async def write_long_history(roles: RunningRoles) -> None:
    await run_random_history(roles, random.Random(40), steps=60)
    await write_job_history(roles)
    await assert_views_match_log(roles)
