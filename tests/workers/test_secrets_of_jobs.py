"""No secret of a processor gets into the log or the views, although the processor reports what a service has echoed."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from jobledger.cli.settings import MongodbSettings
from jobledger.ledger.domain.commands import FailAttempt, ReportEvent, WorkerCommand
from jobledger.ledger.domain.events import ErrorInfo, JobLogged, LogEntry, StepCompleted
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers.attempts import secret_filter
from jobledger.workers.attempts.secret_filter import SecretFilter
from jobledger.workers.secrets.hidden_secrets import PLACEHOLDER, HiddenSecrets
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.secret_echoing_processors import ENVIRONMENT_SECRET, secret_echoing_processors

__all__ = ["secret_echoing_processors"]
pytestmark = pytest.mark.usefixtures("secret_echoing_processors")
FILE_SECRET = "sk-proj-AbCdEfGh0123456789/ijkl+mnop=="
DECLARED_SECRET = 'dEc1aRed"s3cReT"\\4711ä'
LISTED_SECRET = "hunter2!"
RANDOM_SECRETS = FILE_SECRET, DECLARED_SECRET
SECRETS = (FILE_SECRET, DECLARED_SECRET, LISTED_SECRET, ENVIRONMENT_SECRET)
TYPES = ["echo-secrets", "echo-secrets-inline"]


@asynccontextmanager
async def run_roles(connection: Connection, store: Path, tmp_path: Path) -> AsyncIterator[RunningRoles]:
    key_file = tmp_path / "key"
    if not key_file.exists():
        key_file.write_text(f"{FILE_SECRET}\n")
    settings = {"declared": DECLARED_SECRET, "passwords": [LISTED_SECRET], "api_key_file": str(key_file)}
    options = WorkerOptions(
        confinement="off", pass_environment=["TEST_API_KEY"], processors=dict.fromkeys(TYPES, settings)
    )
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        yield roles


async def run_action(roles: RunningRoles, job_type: str, action: str) -> dict[str, Any]:
    job_id = await roles.submit({"action": action}, job_type=job_type, max_attempts=1)
    return await roles.wait_until_finished(job_id)


async def read_reports(roles: RunningRoles) -> list[str]:
    """Return everything in the database as texts, without what is never changed: outputs, metadata and file paths."""
    texts: list[str] = []

    def collect(value: Any, name: str = "") -> None:
        if name == "answer":
            return
        if isinstance(value, dict):
            for key, item in value.items():
                texts.append(str(key))
                collect(item, str(key))
        elif isinstance(value, list):
            for item in value:
                collect(item, name)
        elif isinstance(value, str):
            texts.append(value)

    for name in await roles.db.list_collection_names():
        async for document in roles.db[name].find():
            collect(document)
    return texts


def find_parts(texts: list[str], secrets: Sequence[str] = SECRETS, *, length: int = 6) -> list[str]:
    """Return texts with the first or last characters of a secret."""
    parts = {part for secret in secrets for part in (secret[:length], secret[-length:])}
    return [text[-300:] for text in texts if any(part in text for part in parts)]


@pytest.mark.parametrize("job_type", TYPES)
@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("report", None),
        ("warn_only", None),
        ("raise_error", "PROCESSOR_FAULT"),
        ("raise_processor_error", "REJECTED"),
        ("raise_validation_error", "PROCESSOR_FAULT"),
        ("raise_group", "PROCESSOR_FAULT"),
        ("raise_in_step", "PROCESSOR_FAULT"),
    ],
)
async def test_reports_of_a_job_contain_no_secrets(
    connection: Connection, store: Path, tmp_path: Path, job_type: str, action: str, code: str | None
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        job = await run_action(roles, job_type, action)
        assert (job["error"] and job["error"]["code"]) == code
        texts = await read_reports(roles)
        assert find_parts(texts) == []
        assert [text for text in texts if PLACEHOLDER in text]


@pytest.mark.parametrize("job_type", TYPES)
async def test_results_and_outputs_of_steps_are_not_changed(
    connection: Connection, store: Path, tmp_path: Path, job_type: str
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        job = await run_action(roles, job_type, "report")
        answer = job["results"]["metadata"]["answer"]
        assert all(secret in answer for secret in SECRETS)
        [step] = [
            event.event
            for event in await roles.event_store.read_stream(job["_id"])
            if isinstance(event.event, StepCompleted)
        ]
        assert step.output == {"answer": answer}
        assert step.warnings == [f"Invalid key {', '.join([PLACEHOLDER] * len(SECRETS))}"]
        assert job["results"]["metadata"]["warnings"] == step.warnings * 2
        [file] = job["results"]["files"]
        content = await roles.store.open(file["sha256"], file["size"])
        assert b"".join([part async for part in content.read(0, file["size"])]).decode() == answer
        await content.close()


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("raise_large_details", "LARGE"),
        ("raise_many_keys", "MANY"),
        ("raise_very_many_keys", "MANY"),
        ("log_much", None),
        ("print_slowly", None),
    ],
)
async def test_reports_of_one_job_do_not_block_the_worker(
    connection: Connection, store: Path, tmp_path: Path, action: str, code: str | None
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        await run_action(roles, "echo-secrets", "warn_only")
        watch = asyncio.create_task(measure_longest_block())
        job = await run_action(roles, "echo-secrets", action)
        watch.cancel()
        assert await watch < 2
        assert (job["error"] and job["error"]["code"]) == code
        assert find_parts(await read_reports(roles), length=12) == []


async def measure_longest_block() -> float:
    """Return the longest time in seconds for which the event loop ran no other task, until it is cancelled."""
    longest, last = 0.0, time.monotonic()
    with suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest


@pytest.mark.parametrize("job_type", TYPES)
async def test_reports_are_removed_if_hiding_fails(
    connection: Connection, store: Path, tmp_path: Path, job_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RecursionError

    async with run_roles(connection, store, tmp_path) as roles:
        monkeypatch.setattr(HiddenSecrets, "hide", fail)
        job = await run_action(roles, job_type, "warn_only")
        assert job["status"] == "completed"
        [warning] = job["results"]["metadata"]["warnings"]
        assert warning.startswith("(This text was removed")
        failed = await run_action(roles, job_type, "raise_processor_error")
        assert failed["status"] == "failed"
        assert find_parts(await read_reports(roles)) == []


@pytest.mark.parametrize("job_type", TYPES)
async def test_no_part_of_a_secret_is_left_where_a_text_is_cut(
    connection: Connection, store: Path, tmp_path: Path, job_type: str
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        assert (await run_action(roles, job_type, "cut"))["status"] == "completed"
        texts = await read_reports(roles)
        assert len([text for text in texts if "more characters were cut" in text]) > 100
        assert find_parts(texts, RANDOM_SECRETS) == []


@pytest.mark.parametrize("job_type", TYPES)
async def test_no_part_of_a_secret_is_left_in_names_that_were_cut(
    connection: Connection, store: Path, tmp_path: Path, job_type: str
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        assert (await run_action(roles, job_type, "cut_names"))["status"] == "failed"
        texts = await read_reports(roles)
        assert len([text for text in texts if PLACEHOLDER in text and "more characters were cut" in text]) >= 3
        assert find_parts(texts, RANDOM_SECRETS) == []


@pytest.mark.parametrize("is_error", [True, False])
async def test_long_report_with_beginnings_of_many_secrets_is_searched_while_other_tasks_run(is_error: bool) -> None:
    secrets = [f"sk-proj-{random.Random(number).randbytes(20).hex()}" for number in range(200)]
    filtered = SecretFilter({"service": {"api_keys": secrets}}, {}, {})
    text = "sk-proj-" * 7800 + "end"
    command: WorkerCommand
    if is_error:
        details = {"text": text, "key": secrets[199]}
        command = FailAttempt("worker-1", 1, ErrorInfo(code="REJECTED", message=secrets[7], details=details), None)
    else:
        entries = [LogEntry(timestamp=datetime.now(UTC), level="info", message=text) for _ in range(2)]
        command = ReportEvent("worker-1", JobLogged(attempt=1, entries=entries))
    watch = asyncio.create_task(measure_longest_block())
    await asyncio.sleep(0)
    started_at = time.monotonic()
    hidden = await filtered.hide_in_command(command)
    duration = time.monotonic() - started_at
    await asyncio.sleep(0.02)  # the watch sees the end of a block
    watch.cancel()
    assert await watch < max(0.03, duration / 2)
    assert duration < 2
    if isinstance(hidden, FailAttempt):
        assert hidden.error.message == PLACEHOLDER
        assert hidden.error.details == {"text": text, "key": PLACEHOLDER}
    else:
        assert hidden == command


async def test_secrets_of_other_settings_and_their_files_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "uri").write_text("mongodb://bob:hunter2!@db/x")
    filtered = SecretFilter({}, {}, {})
    settings = MongodbSettings(uri=SecretStr("mongodb://bob:swordfish@db/x"), uri_file=tmp_path / "uri")
    filtered.add_settings({"mongodb": settings.model_dump(), "auth": {"jwt": {"secret": SecretStr("a-jwt-secret")}}})
    await filtered.refresh()
    hidden = filtered.hide("bob:swordfish@db bob:hunter2!@db a-jwt-secret embedded")
    assert hidden == f"bob:{PLACEHOLDER}@db bob:{PLACEHOLDER}@db {PLACEHOLDER} embedded"


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("print_lines", None),
        ("print_without_end", None),
        ("print_much", None),
        ("die", "PROCESS_DIED"),
        ("die_with_long_line", "PROCESS_DIED"),
    ],
)
async def test_output_of_a_job_process_contains_no_secrets(
    connection: Connection, store: Path, tmp_path: Path, action: str, code: str | None
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        job = await run_action(roles, "echo-secrets", action)
        assert (job["error"] and job["error"]["code"]) == code
        texts = await read_reports(roles)
        assert find_parts(texts) == []
        assert [text for text in texts if PLACEHOLDER in text]


@pytest.mark.parametrize("job_type", TYPES)
async def test_secret_file_that_changes_is_read_again(
    connection: Connection, store: Path, tmp_path: Path, job_type: str
) -> None:
    async with run_roles(connection, store, tmp_path) as roles:
        await run_action(roles, job_type, "warn_only")
        (tmp_path / "key").write_text("sk-proj-another0123456789secret")
        await run_action(roles, job_type, "warn_only")
        texts = await read_reports(roles)
        assert find_parts(texts) == []
        assert not [text for text in texts if "another0123456789secret" in text]


async def test_secret_file_that_is_a_pipe_does_not_stop_the_worker(
    connection: Connection, store: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    settings = {"token_file": str(tmp_path / "pipe"), "passwords": [LISTED_SECRET]}
    options = WorkerOptions(confinement="off", processors={"echo-secrets-inline": settings})
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        job = await run_action(roles, "echo-secrets-inline", "warn_only")
        [warning] = job["results"]["metadata"]["warnings"]
        assert LISTED_SECRET not in warning


async def test_secret_file_on_a_file_system_that_hangs_does_not_stop_the_worker(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = threading.Event()
    monkeypatch.setattr(secret_filter, "_READ_SECONDS", 0.1)
    monkeypatch.setattr(secret_filter, "read_secret_file", lambda _: response.wait(60) and None)
    settings = {"token_file": "/on/a/disk/that/hangs", "passwords": [LISTED_SECRET]}
    options = WorkerOptions(confinement="off", processors={"echo-secrets-inline": settings})
    try:
        async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
            job = await run_action(roles, "echo-secrets-inline", "warn_only")
            assert job["results"]["metadata"]["warnings"] == [f"Invalid key {PLACEHOLDER}, {PLACEHOLDER}"]
    finally:
        response.set()
