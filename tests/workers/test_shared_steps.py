"""Steps are shared between jobs only on request, within one owner, job type and processor version."""

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

done: Counter[str] = Counter()
PUBLIC = AccessControl(visibility="public")


@pytest.fixture
async def here(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningRoles]:
    """A worker for jobs that look up a word in a shared step and write it in the language of the job."""

    async def work(job: JobContext) -> Results:
        wanted = job.parameters.model_dump()

        async def look_up() -> Any:
            done[wanted["word"]] += 1
            if wanted.get("in_vain"):
                await job.warn("the dictionary is closed")
            return {"found": wanted["word"].upper()}

        share = wanted.get("share_s", 3600)
        found = await job.run_step(
            "look up",
            {"word": wanted["word"]},
            look_up,
            share_max_age=None if share is None else timedelta(seconds=share),
        )
        return Results(metadata={"text": f"{wanted['language']}: {found['found']}"})

    done.clear()
    install_processor(monkeypatch, work, "test", "test2")
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        yield here


async def ask(here: RunningRoles, language: str, *, word: str = "talk", user: str = "alice", **fields: Any) -> Document:
    """Run a job and wait until the views contain its steps."""
    parameters = {"word": word, "language": language, **fields.pop("parameters", {})}
    return await here.wait_until_finished(
        await here.submit(parameters, **{"job_type": "test", "user_id": user, **fields})
    )


async def test_shared_step_of_same_owner_type_and_version_is_reused(here: RunningRoles) -> None:
    first = await ask(here, "de")
    second = await ask(here, "fr")
    assert done == {"talk": 1}
    assert second["results"]["metadata"]["text"] == "fr: TALK"
    [step] = [
        event.event for event in await here.event_store.read_stream(second["job_id"]) if event.type == "StepCompleted"
    ]
    assert isinstance(step, StepCompleted)
    assert (step.reused_from, step.output) == (first["job_id"], {"found": "TALK"})
    assert [it["reused_from"] for it in (*first["steps"], *second["steps"])] == [None, first["job_id"]]
    assert f"is reused from {first['job_id']}" in second["logs"][0]["message"]
    assert (await ask(here, "it"))["steps"][0]["reused_from"] == first["job_id"], "a reused step must not be lent on"


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
    "with warnings": ({"parameters": {"in_vain": True}}, {}),
}


async def test_step_is_run_again_when_any_condition_is_missing(here: RunningRoles) -> None:
    async def both(word: str, first: dict[str, Any], second: dict[str, Any]) -> None:
        await ask(here, "de", word=word, **first)
        await ask(here, "fr", word=word, **second)

    await asyncio.gather(*(both(word, *jobs) for word, jobs in NOT_SHARED.items()))
    assert done == dict.fromkeys(NOT_SHARED, 2)


async def test_step_of_another_processor_version_is_not_reused(
    here: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(here, "de")
    for module in ("jobledger.workers.request_handler", "jobledger.workers.step_cache"):
        monkeypatch.setattr(f"{module}.processor_version", lambda _: "tests 2")
    second = await ask(here, "fr")
    assert done == {"talk": 2}
    assert (await ask(here, "it"))["steps"][0]["reused_from"] == second["job_id"]


async def test_job_restarted_without_steps_reuses_nothing_of_other_jobs(here: RunningRoles) -> None:
    await ask(here, "de")
    second = await ask(here, "fr")
    for reuse, times in ((False, 2), (True, 2), (False, 3)):
        [restarted] = await here.handle_commands(second["job_id"], RestartJob("alice", reuse_steps=reuse))
        ended = await here.wait_for_event(JobCompleted, second["job_id"], after=restarted.position)
        assert done == {"talk": times}
        await here.wait_for_views(ended.position)
        [step] = (await here.load_job(second["job_id"]))["steps"]
        assert step["reused_from"] is None


async def test_step_of_a_deleted_job_is_not_reused(here: RunningRoles) -> None:
    first = await ask(here, "de")
    await here.handle_commands(first["job_id"], Delete("alice"))
    await here.wait_for_views()
    await ask(here, "fr")
    assert done == {"talk": 2}
