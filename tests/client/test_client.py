"""The clients against a real API with all roles."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

import jobledger
from jobledger import NewJob
from jobledger.ledger.domain.errors import ConfigurationError
from tests.api.conftest import Api
from tests.client.conftest import Caller, list_names


class EchoParameters(BaseModel):
    """Parameters of a job function."""

    text: str
    amount: Decimal = Decimal(1)


@dataclass(frozen=True)
class Output:
    """The result that a job function declares."""

    total: Decimal


class EchoFunction:
    """A job function, as `jobledger.job` makes it."""

    name = "echo"
    Parameters = EchoParameters
    result_type: TypeAdapter[Any] = TypeAdapter(Output | None)

    def bind(self, text: str, amount: Decimal = Decimal(1)) -> dict[str, Any]:
        return EchoParameters(text=text, amount=amount).model_dump(mode="json")


async def test_submitted_job_returns_results_and_files(api: Api, call: Caller, tmp_path: Path) -> None:
    client = call.create(api.url)
    handle = await call(client.submit, "echo", {"text": "Grüße"}, name="first", priority=5)
    results = await call(handle.result, timeout=60)
    job = await call(handle.get)
    assert (job.status, job.job_name, job.priority, job.is_finished) == ("completed", "first", 5, True)
    assert job.results == results
    [file] = results.files
    content = await call(client.read_bytes, file)
    assert "Grüße" in content.decode()
    saved = await call(client.download, file, tmp_path)
    assert (saved, saved.read_bytes()) == (tmp_path / "echo.md", content)
    assert await call(client.read_bytes, results.markdown_url) == content
    with pytest.raises(ValueError, match="more than 3 bytes"):
        await call(client.read_bytes, file, max_bytes=3)
    assert list_names(tmp_path) == ["echo.md", "results"]
    archive = await call(handle.download_archive, tmp_path)
    assert archive.read_bytes().startswith(b"PK")


async def test_job_function_arguments_are_parameters_and_others_are_options(
    api_without_worker: Api, call: Caller
) -> None:
    client = call.create(api_without_worker.url)
    function = EchoFunction()
    handle = await call(client.submit, function, text="a", amount=Decimal("1.5"), priority=7)
    job = await call(handle.get)
    assert (job.job_type, job.parameters, job.priority) == ("echo", {"text": "a", "amount": "1.5"}, 7)
    same = await call(client.with_options(key="inv-1", name="x").submit, function, text="a")
    again = await call(client.submit, function, text="a", key="inv-1", name="x")
    assert same.job_id == again.job_id
    with pytest.raises(jobledger.InvalidRequestError) as caught:
        await call(client.submit, function, text="b", key="inv-1")
    assert (caught.value.code, caught.value.status) == ("idempotency_key_reused", 422)


async def test_failed_and_cancelled_jobs_raise(api: Api, call: Caller) -> None:
    client = call.create(api.url)
    failed = await call(client.submit, "echo", {"fail": "no paper"})
    with pytest.raises(jobledger.JobFailedError, match="no paper") as caught:
        await call(failed.result, timeout=60)
    assert caught.value.code == "ECHO_FAILED"
    assert caught.value.job.status == "failed"
    running = await call(client.submit, "echo", {"seconds": 600})
    with pytest.raises(jobledger.WaitTimeoutError) as timeout:
        await call(running.result, timeout=0.2)
    assert isinstance(timeout.value, TimeoutError)
    await call(running.cancel, reason="not needed")
    with pytest.raises(jobledger.JobCancelledError):
        await call(running.result, timeout=60)
    restarted = await call(failed.restart, reason="try again")
    assert restarted.status == "pending"


async def test_follow_returns_each_event_until_the_job_is_finished(api: Api, call: Caller) -> None:
    client = call.create(api.url)
    handle = await call(client.submit, "echo", {"text": "x"})
    events = await call.take(handle.follow())
    assert events[0].type == "JobSubmitted"
    assert isinstance(events[-1].event, jobledger.JobCompleted)
    assert [event.version for event in events] == list(range(1, len(events) + 1))
    assert events == await call.take(client.follow(handle.job_id))
    assert await call.take(handle.follow(types=[jobledger.JobCompleted])) == events[-1:]
    assert await call.take(handle.follow(after=events[-1].position)) == []


async def test_batch_is_submitted_followed_and_listed(api: Api, call: Caller) -> None:
    client = call.create(api.url)
    jobs = [NewJob("echo", {"text": str(number)}) for number in range(4)] + [NewJob("echo", {"fail": "x"})]
    batch = await call(client.submit_many, jobs, name="Day 1")
    assert len(batch.job_ids) == 5
    done = await call(batch.wait, timeout=60)
    assert (done.batch_name, done.status, done.completed_jobs, done.failed_jobs) == ("Day 1", "partial", 4, 1)
    events = await call.take(batch.follow())
    assert events[0].type == "BatchSubmitted"
    assert events[-1].type == "BatchFinished"
    assert sum(event.type == "JobCompleted" for event in events) == 4
    listed = await call.take(batch.iter_jobs(page_size=2, status="completed"))
    assert {job.job_id for job in listed} == set(batch.job_ids[:4])
    change = await call(batch.restart, reason="again")
    assert (change.jobs.changed, change.rejections) == (1, [])
    assert [it.batch_id for it in await call.take(client.iter_batches(q="Day"))] == [batch.batch_id]


async def test_reads_show_own_changes(api_without_worker: Api, call: Caller) -> None:
    client = call.create(api_without_worker.url)
    for number in range(10):
        handle = await call(client.submit, "echo", {"n": number})
        newest = await call.take(client.iter_jobs(page_size=1), 1)
        assert newest[0].job_id == handle.job_id


async def test_named_events_continue_at_the_saved_position(
    api_without_worker: Api, call: Caller, tmp_path: Path
) -> None:
    client = call.create(api_without_worker.url)
    handles = [await call(client.submit, "echo", {"n": number}) for number in range(3)]
    stream = client.events(name="cms", types=[jobledger.JobSubmitted], state_dir=tmp_path)
    with pytest.raises(jobledger.CheckpointError, match="Another reader"):
        client.events(name="cms", state_dir=tmp_path)
    first = await call.take(stream, 2)
    await call.close(stream)
    again = client.events(name="cms", types=[jobledger.JobSubmitted], state_dir=tmp_path)
    rest = await call.take(again, 2)
    await call.close(again)
    # The second event was not processed, because no third one was requested.
    assert [event.stream for event in first + rest[1:]] == [handle.job_id for handle in handles]
    assert rest[0] == first[1]


async def test_cancelled_iteration_misses_no_event(api_without_worker: Api) -> None:
    async with jobledger.AsyncClient(api_without_worker.url) as client:
        stream = client.events(types=["JobSubmitted"])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await anext(stream)
        handle = await client.submit("echo", {})
        assert (await anext(stream)).stream == handle.job_id
        await stream.aclose()


async def test_invalid_arguments_are_explained(api_without_worker: Api, call: Caller) -> None:
    client = call.create(api_without_worker.url)
    with pytest.raises(jobledger.InvalidRequestError) as caught:
        await call(client.submit, "no-such-type", {})
    assert (caught.value.code, caught.value.status) == ("unknown_job_type", 422)
    assert caught.value.request_id
    with pytest.raises(ValueError, match="visible ASCII"):
        await call(client.submit, "echo", {}, key="Rechnung Nr. 1")
    with pytest.raises(jobledger.InvalidRequestError):
        await call(client.submit, "echo", {"x": float("nan")})
    with pytest.raises(ValueError, match="not JSON"):
        await call(client.submit, "echo", {"x": object()})
    with pytest.raises(ValueError, match="no event type"):
        client.events(types=["JobComplete"])
    with pytest.raises(jobledger.NotFoundError) as missing:
        await call(client.get, "job-0123456789abcdef01234567")
    assert missing.value.code == "job_not_found"
    with pytest.raises(ValueError, match="at least one job"):
        await call(client.submit_many, [])
    with pytest.raises(ValueError, match="10,000"):
        await call(client.submit_many, (NewJob("echo", {}) for _ in range(10_001)))
    urls: list[Any] = [
        "127.0.0.1:5001",
        "ftp://x",
        "http://",
        "http://x/?a=1",
        "http://[",
        "http://a:99999",
        "http://a b",
        7,
    ]
    for url in urls:
        with pytest.raises(ConfigurationError, match="JOBLEDGER_URL"):
            call.create(url)
    with pytest.raises(ConfigurationError) as wrong_url:
        call.create("http://user:secret@x:port")
    assert "secret" not in str(wrong_url.value)
    assert "secret" not in repr(call.create("http://user:secret@x"))
    with pytest.raises(ConfigurationError, match="only one of them"):
        call.create("http://user:secret@x", key="jl_x")
    options: list[dict[str, Any]] = [{"timeout": value} for value in ("30", None, 0, float("nan"), float("inf"))]
    for option in (*options, {"max_retries": -1}, {"key": 5}, {"key": b"jl_x"}):
        with pytest.raises(ConfigurationError, match=next(iter(option))):
            call.create("http://x", **option)
    for timeout in (float("nan"), "5"):
        with pytest.raises(ValueError, match="timeout must be seconds"):
            await call(client.result, "job-1", timeout=timeout)
    with pytest.raises(TypeError, match="no filter 'state'; filters are archived"):
        await call.take(client.iter_jobs(state="failed"))
    with pytest.raises(ValueError, match="page_size"):
        await call.take(client.iter_jobs(page_size=0))
    with pytest.raises(TypeError, match="no option 'prio'"):
        client.with_options(prio=3)
    with pytest.raises(TypeError, match="list of jobs"):
        await call(client.submit_many, NewJob("echo", {}))
    for path in ("api/events/jobs", "/ä", "/a b", "/a?b=1"):
        with pytest.raises(ValueError, match="quoted path"):
            await call(client.request, "GET", path)
    with pytest.raises(ValueError, match="position of the log"):
        client.events(after=-1)
    with pytest.raises(ValueError, match="position of the log"):
        client.follow("job-1", after=-1)
    with pytest.raises(ConfigurationError) as wrong_key:
        call.create("http://x", key="secret key")
    assert "secret key" not in str(wrong_key.value)


async def test_update_restart_and_delete_check_the_version(api_without_worker: Api, call: Caller) -> None:
    client = call.create(api_without_worker.url)
    handle = await call(client.submit, "echo", {"n": 1})
    job = await call(handle.update, parameters={"n": 2}, if_version=1)
    assert (job.parameters, job.version) == ({"n": 2}, 2)
    with pytest.raises(jobledger.ConflictError) as caught:
        await call(handle.update, priority=3, if_version=1)
    assert caught.value.code == "precondition_failed"
    assert (await call(handle.archive)).archived
    await call(handle.delete)
    with pytest.raises(jobledger.NotFoundError):
        await call(handle.get)


def test_environment_has_url_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", "http://jobs.example.org/prefix/")
    monkeypatch.setenv("JOBLEDGER_KEY", "jl_secret")
    with jobledger.Client.from_env() as client:
        assert repr(client) == "<Client http://jobs.example.org/prefix>"
        assert "jl_secret" not in repr(vars(client))
    monkeypatch.setenv("JOBLEDGER_KEY", "not a key")
    with pytest.raises(ConfigurationError, match="JOBLEDGER_KEY"):
        jobledger.Client.from_env()
