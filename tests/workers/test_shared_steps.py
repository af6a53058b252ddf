"""Steps that another job has finished are not done again, if they may be seen, are fresh, and were done in full."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ledger.commands import ChangeAccess, Delete, RestartJob
from ledger.events import AccessControl, JobCompleted, StepCompleted
from ledger.mongo import Connection, Document
from tests.support.running import Process, WorkerOptions, process
from tests.workers.inline import install
from workers.processor import Job, Results

done: Counter[str] = Counter()


@pytest.fixture
async def here(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    """A worker for jobs that look up a word, which takes long, and write it in a language of their own."""

    async def work(job: Job) -> Results:
        wanted = job.parameters.model_dump()

        async def look_up() -> Any:
            done[wanted["word"]] += 1
            if wanted.get("in_vain"):
                await job.warn("the dictionary is closed")
            return {"found": wanted["word"].upper()}

        found = await job.step("look up", {"word": wanted["word"]}, look_up)
        return Results(metadata={"text": f"{wanted['language']}: {found['found']}"})

    done.clear()
    install(monkeypatch, work)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        yield here


async def ask(here: Process, language: str, *, word: str = "talk", user: str = "alice", **fields: Any) -> Document:
    """Have a job done, and wait until the views know what it has finished."""
    parameters = {"word": word, "language": language, **fields.pop("parameters", {})}
    return await here.ended(await here.submit(parameters, job_type="test", user_id=user, **fields))


async def test_the_same_in_another_language_needs_no_second_look(here: Process) -> None:
    first = await ask(here, "de")
    second = await ask(here, "fr")
    assert done == {"talk": 1}
    assert second["results"]["metadata"]["text"] == "fr: TALK"
    [step] = [event.event for event in await here.log.read_stream(second["job_id"]) if event.type == "StepCompleted"]
    assert isinstance(step, StepCompleted)
    assert (step.reused_from, step.output) == (first["job_id"], {"found": "TALK"})
    assert [it["reused_from"] for it in (*first["steps"], *second["steps"])] == [None, first["job_id"]]
    assert f"was finished by {first['job_id']}" in second["logs"][0]["message"]
    assert (await ask(here, "it"))["steps"][0]["reused_from"] == first["job_id"], "who has only borrowed lends nothing"


async def test_other_inputs_are_another_step(here: Process) -> None:
    await ask(here, "de")
    await ask(here, "de", word="slide")
    assert done == {"talk": 1, "slide": 1}


async def test_what_one_may_not_read_one_cannot_use(here: Process) -> None:
    first = await ask(here, "de")
    await ask(here, "fr", user="bob")
    assert done == {"talk": 2}
    await here.do(first["job_id"], ChangeAccess("alice", AccessControl(read_access=["carol"])))
    await here.views_reach()
    assert (await ask(here, "it", user="carol"))["steps"][0]["reused_from"] == first["job_id"]


async def test_what_was_not_done_in_full_is_done_again(here: Process) -> None:
    await ask(here, "de", parameters={"in_vain": True})
    await ask(here, "fr")
    assert done == {"talk": 2}


async def test_who_restarts_a_job_to_do_it_all_anew_gets_nothing_from_others(here: Process) -> None:
    await ask(here, "de")
    second = await ask(here, "fr")
    for reuse, times in ((False, 2), (True, 2), (False, 3)):
        [restarted] = await here.do(second["job_id"], RestartJob("alice", reuse_steps=reuse))
        ended = await here.heard(JobCompleted, second["job_id"], after=restarted.position)
        assert done == {"talk": times}
        await here.views_reach(ended.position)
        [step] = (await here.job(second["job_id"]))["steps"]
        assert step["reused_from"] is None


async def test_a_deleted_job_lends_nothing(here: Process) -> None:
    first = await ask(here, "de")
    await here.do(first["job_id"], Delete("alice"))
    await here.views_reach()
    await ask(here, "fr")
    assert done == {"talk": 2}


@pytest.mark.parametrize("seconds", [0, 0.05], ids=["never", "not for long"])
async def test_how_long_steps_are_shared_is_a_setting(
    connection: Connection, store: Path, here: Process, seconds: float
) -> None:
    await ask(here, "de")
    assert here.worker is not None
    here.worker._shared_steps._seconds = seconds
    await asyncio.sleep(0.1)
    await ask(here, "fr")
    assert done == {"talk": 2}
