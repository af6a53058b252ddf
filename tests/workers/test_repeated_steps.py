"""Tests of steps whose warning may have lost its cause: a retry reuses them, a restart repeats them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import RestartJob
from jobledger.ledger.domain.events import JobCompleted
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

runs: Counter[str] = Counter()
closed: set[str] = set()
"""Languages into which a text cannot be translated."""
PERMANENT = "The text is cut."


@pytest.fixture
async def roles(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningRoles]:
    """A worker for jobs with the steps `page` and `translate`. The latter has one nested step for each language."""

    async def fetch(job: JobContext) -> str:
        runs["page"] += 1
        await job.warn(PERMANENT)
        return "text"

    async def translate_into(language: str, job: JobContext) -> str:
        runs[language] += 1
        if language in closed:
            await job.warn(f"The translator for {language} is closed.", repeat_on_restart=True)
        return language

    async def translate(job: JobContext) -> list[str]:
        runs["translate"] += 1
        return [
            await job.step(f"translate into {language}", partial(translate_into, language, job))
            for language in ("de", "fr")
        ]

    async def work(job: JobContext) -> Results:
        await job.step("page", partial(fetch, job))
        await job.step("translate", partial(translate, job))
        if job.attempt == 1 and job.parameters.model_dump().get("fail"):
            raise ProcessorError("OUTAGE", "The service is down.", transient=True)
        return Results()

    runs.clear()
    closed.clear()
    install_processor(monkeypatch, work)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as running:
        yield running


async def restart(roles: RunningRoles, job_id: str) -> Document:
    """Restart the job and wait until it has completed again."""
    [restarted] = await roles.handle_commands(job_id, RestartJob("user:alice"))
    completed = await roles.wait_for_event(JobCompleted, job_id, after=restarted.position)
    await roles.wait_for_views(completed.position)
    return await roles.load_job(job_id)


async def test_restart_repeats_steps_with_temporary_warning_and_steps_around_them(roles: RunningRoles) -> None:
    closed.add("fr")
    job_id = await roles.submit(job_type="test")
    first = await roles.wait_until_finished(job_id)
    assert {step["step"]: step["repeat_on_restart"] for step in first["steps"]} == {
        "page": False,
        "translate into de": False,
        "translate into fr": True,
        "translate": True,
    }
    closed.clear()
    second = await restart(roles, job_id)
    assert runs == {"page": 1, "translate": 2, "de": 1, "fr": 2}
    assert second["results"]["metadata"]["warnings"] == [PERMANENT]
    assert [(step["step"], step["attempt"]) for step in second["steps"]] == [
        ("page", 1),
        ("translate into de", 1),
        ("translate into fr", 2),
        ("translate", 2),
    ]
    await restart(roles, job_id)
    assert runs == {"page": 1, "translate": 2, "de": 1, "fr": 2}


async def test_retry_reuses_steps_with_temporary_warning(roles: RunningRoles) -> None:
    closed.add("fr")
    job_id = await roles.submit({"fail": True}, job_type="test")
    job = await roles.wait_until_finished(job_id)
    assert job["attempt"] == 2
    assert runs == {"page": 1, "translate": 1, "de": 1, "fr": 1}
    assert job["results"]["metadata"]["warnings"] == [PERMANENT, "The translator for fr is closed."]
    await restart(roles, job_id)
    assert runs == {"page": 1, "translate": 2, "de": 1, "fr": 2}
