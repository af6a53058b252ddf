"""Tests of shared steps: jobs share steps only on request, within one owner, job type and processor version."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import Delete, RestartJob
from jobledger.ledger.domain.events import AccessControl, JobCompleted, StepCompleted
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.workers.processor import JobContext, Results
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

lookups: Counter[str] = Counter()
PUBLIC = AccessControl(visibility="public")


@pytest.fixture
async def roles(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningRoles]:
    """A worker for jobs that look up a word in a shared step and output it in the language of the job."""

    async def work(job: JobContext) -> Results:
        parameters = job.parameters.model_dump()

        async def look_up(word: str) -> Any:
            lookups[word] += 1
            if parameters.get("warn"):
                await job.warn("the dictionary is closed")
            return {"entry": word.upper()}

        share_seconds = parameters.get("share_s", 3600)
        entry = await job.step(
            "look up",
            look_up,
            parameters["word"],
            share=None if share_seconds is None else timedelta(seconds=share_seconds),
        )
        return Results(metadata={"text": f"{parameters['language']}: {entry['entry']}"})

    lookups.clear()
    install_processor(monkeypatch, work, "test", "test2")
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as running:
        yield running


async def run_job(
    roles: RunningRoles, language: str, *, word: str = "talk", user: str = "alice", **fields: Any
) -> Document:
    """Run a job and wait until the views contain its steps."""
    parameters = {"word": word, "language": language, **fields.pop("parameters", {})}
    return await roles.wait_until_finished(
        await roles.submit(parameters, **{"job_type": "test", "user_id": user, **fields})
    )


async def test_shared_step_of_same_owner_type_and_version_is_reused(roles: RunningRoles) -> None:
    first = await run_job(roles, "de")
    second = await run_job(roles, "fr")
    assert lookups == {"talk": 1}
    assert second["results"]["metadata"]["text"] == "fr: TALK"
    [step] = [
        event.event for event in await roles.event_store.read_stream(second["job_id"]) if event.type == "StepCompleted"
    ]
    assert isinstance(step, StepCompleted)
    assert (step.reused_from, step.output) == (first["job_id"], {"entry": "TALK"})
    assert [step["reused_from"] for step in (*first["steps"], *second["steps"])] == [None, first["job_id"]]
    assert f"is reused from {first['job_id']}" in second["logs"][0]["message"]
    assert (await run_job(roles, "it"))["steps"][0]["reused_from"] == first["job_id"], (
        "a reused step must not be shared again"
    )


NOT_SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other job type": ({}, {"job_type": "test2"}),
    "other user": ({}, {"user": "bob"}),
    "other user, public job": ({"access_control": PUBLIC}, {"user": "bob"}),
    "other user, group with read access": (
        {"access_control": AccessControl(read_access=["team"])},
        {"user": "bob", "teams": ["team"]},
    ),
    "other user with admin access": ({"access_control": AccessControl(admin_access=["bob"])}, {"user": "bob"}),
    "other user of the same team": (
        {"teams": ["team"], "access_control": AccessControl(visibility="team")},
        {"user": "bob", "teams": ["team"]},
    ),
    "first job did not request it": ({"parameters": {"share_s": None}}, {}),
    "second job did not request it": ({}, {"parameters": {"share_s": None}}),
    "too old": ({}, {"parameters": {"share_s": 0.001}}),
    "age of zero": ({}, {"parameters": {"share_s": 0}}),
    "with warnings": ({"parameters": {"warn": True}}, {}),
}


async def test_step_runs_again_if_any_condition_is_missing(roles: RunningRoles) -> None:
    async def run_both(word: str, first: dict[str, Any], second: dict[str, Any]) -> None:
        await run_job(roles, "de", word=word, **first)
        await run_job(roles, "fr", word=word, **second)

    await asyncio.gather(*(run_both(word, *jobs) for word, jobs in NOT_SHARED.items()))
    assert lookups == dict.fromkeys(NOT_SHARED, 2)


async def test_step_of_other_processor_version_is_not_reused(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_job(roles, "de")
    for module in ("jobledger.workers.attempts.message_handler", "jobledger.workers.attempts.shared_step_finder"):
        monkeypatch.setattr(f"{module}.get_processor_version", lambda _: "tests 2")
    second = await run_job(roles, "fr")
    assert lookups == {"talk": 2}
    assert (await run_job(roles, "it"))["steps"][0]["reused_from"] == second["job_id"]


async def test_job_restarted_without_steps_reuses_no_step_of_other_jobs(roles: RunningRoles) -> None:
    await run_job(roles, "de")
    second = await run_job(roles, "fr")
    for reuse, count in ((False, 2), (True, 2), (False, 3)):
        [restarted] = await roles.handle_commands(second["job_id"], RestartJob("user:alice", reuse_steps=reuse))
        ended = await roles.wait_for_event(JobCompleted, second["job_id"], after=restarted.position)
        assert lookups == {"talk": count}
        await roles.wait_for_views(ended.position)
        [step] = (await roles.load_job(second["job_id"]))["steps"]
        assert step["reused_from"] is None


async def test_step_of_deleted_job_is_not_reused(roles: RunningRoles) -> None:
    first = await run_job(roles, "de")
    await roles.handle_commands(first["job_id"], Delete("user:alice"))
    await roles.wait_for_views()
    await run_job(roles, "fr")
    assert lookups == {"talk": 2}
