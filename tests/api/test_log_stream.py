"""The log as Server-Sent Events: resuming without gaps or duplicates, filters, and cleanup after disconnects."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest

from tests.api.conftest import Api
from tests.support.polling import DEADLINE_SECONDS


async def test_stream_sends_past_events_then_live_events(api_without_worker: Api) -> None:
    job_ids = [await api_without_worker.submit({"number": number}) for number in range(3)]
    events = []
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(api_without_worker.stream_events(after=0)) as stream:
        async for event in stream:
            events.append(event)
            if len(events) == 3:
                job_ids.append(await api_without_worker.submit({"number": 3}))
            if len(events) == 4:
                break

    assert [event["stream"] for event in events] == job_ids
    assert [event["position"] for event in events] == [1, 2, 3, 4]
    assert [event["sse_id"] for event in events] == ["1", "2", "3", "4"]
    assert events[0]["data"]["parameters"] == {"number": 0}


async def test_stream_without_start_position_sends_new_events_only(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    data_lines = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        async with api_without_worker.http.stream("GET", "/api/ledger/stream") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            job_id = await api_without_worker.submit()
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    data_lines.append(line)
                    break

    assert job_id in data_lines[0]


async def test_client_that_reconnects_often_gets_every_event_once(api: Api) -> None:
    generator = random.Random(4711)
    submitting = asyncio.create_task(submit_jobs(api, 15))
    positions: list[int] = [0]
    is_last = False
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not is_last:
            remaining = generator.randint(1, 12)
            # A browser repeats the URL with its old `after` when it reconnects; Last-Event-ID has precedence.
            async with aclosing(api.stream_events(last_event_id=positions[-1], after=3)) as events:
                async for event in events:
                    positions.append(event["position"])
                    is_last = event["data"].get("parameters") == {"last": True}
                    remaining -= 1
                    if is_last or not remaining:
                        break
    await submitting

    assert positions == list(range(len(positions)))
    assert len(positions) > 15 * 3


async def submit_jobs(api: Api, number: int) -> None:
    for _ in range(number):
        await api.wait_until_finished(await api.submit())
    await api.submit({"last": True})


async def test_stream_is_filtered_by_type_job_and_batch(api: Api) -> None:
    single = await api.submit()
    batch = await api.submit_batch({}, {})
    await api.wait_until_finished(single)
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    log = await api.event_store.read(after=0)

    def select_positions(*, types: set[str] | None = None, streams: set[str] | None = None) -> list[int]:
        return [
            event.position
            for event in log
            if (types is None or event.type in types) and (streams is None or event.stream in streams)
        ]

    async def received(number: int, **query: object) -> list[int]:
        return [event["position"] for event in await api.take_events(number, after=0, **query)]

    of_types = select_positions(types={"JobSubmitted", "JobCompleted"})
    assert await received(len(of_types), types="JobSubmitted,JobCompleted") == of_types
    of_job = select_positions(streams={single})
    assert await received(len(of_job), job_id=single) == of_job
    of_batch = select_positions(streams={batch["batch_id"], *batch["job_ids"]})
    assert of_batch[-1] == finished["position"]
    assert await received(len(of_batch), batch_id=batch["batch_id"]) == of_batch
    both = select_positions(streams={batch["job_ids"][0]}, types={"JobCompleted"})
    assert await received(1, batch_id=batch["batch_id"], job_id=batch["job_ids"][0], types="JobCompleted") == both


async def test_disconnected_clients_leave_no_tasks(api_without_worker: Api) -> None:
    await api_without_worker.submit()

    async def connect_and_disconnect(clients: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            streams = await asyncio.gather(*(api_without_worker.take_events(1, after=0) for _ in range(clients)))
        assert [len(events) for events in streams] == [1] * clients

    await connect_and_disconnect(1)
    before = count_tasks()
    await connect_and_disconnect(30)
    deadline = time.monotonic() + DEADLINE_SECONDS
    # One task of a kind may belong to the process itself, for example a heartbeat.
    while remaining := {name: number for name, number in (count_tasks() - before).items() if number > 1}:
        assert time.monotonic() < deadline, remaining
        await asyncio.sleep(0.1)


def count_tasks() -> Counter[str]:
    """Return the number of tasks by the coroutine that they run."""
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())


async def test_concurrent_clients_get_the_same_events(api_without_worker: Api) -> None:
    clients = [asyncio.create_task(api_without_worker.take_events(30, after=0)) for _ in range(20)]
    for number in range(30):
        await api_without_worker.submit({"number": number})
    received = await asyncio.gather(*clients)

    assert all([event["position"] for event in events] == list(range(1, 31)) for events in received)


async def test_line_separators_in_text_do_not_split_an_event(api_without_worker: Api) -> None:
    text = "one\r\ntwo\rthree\nfour\u2028five\u2029six\x85seven\x0b\x0c\x1c"
    await api_without_worker.submit({"text": text})
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        api_without_worker.http.stream("GET", "/api/ledger/stream?after=0") as response,
    ):
        received = b""
        async for chunk in response.aiter_bytes():
            received += chunk
            if b"data:" in received and received.endswith(b"\n\n"):
                break

    blocks = [block.split(b"\n") for block in received.split(b"\n\n") if b"data:" in block]
    assert [[line.partition(b":")[0] for line in block] for block in blocks] == [[b"id", b"event", b"data"]]
    assert b"\r" not in received


# Resuming -----------------------------------------------------------------------------------------------------------


async def read_blocks(api: Api, number: int, **query: Any) -> list[list[str]]:
    """Return the lines of the first blocks of a stream."""
    blocks: list[list[str]] = [[]]
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        api.http.stream("GET", "/api/ledger/stream", params=query) as response,
    ):
        async for line in response.aiter_lines():
            if line:
                blocks[-1].append(line)
            elif len(blocks) == number:
                break
            else:
                blocks.append([])
    return blocks


async def test_stream_sends_resume_id_before_first_event(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    [[retry, resume_id]] = await read_blocks(api_without_worker, 1)
    assert retry.startswith("retry: ")
    assert resume_id == "id: 1"
    missed = await api_without_worker.submit()
    [event] = await api_without_worker.take_events(1, last_event_id=1)
    assert event["stream"] == missed


async def test_keepalive_has_no_id(api_without_worker: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.api.routes.log.KEEPALIVE_SECONDS", 0.1)
    assert (await read_blocks(api_without_worker, 3))[1:] == [[": keep-alive"], [": keep-alive"]]


async def test_filtered_stream_advances_resume_id_without_events(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.routes.log.KEEPALIVE_SECONDS", 0.3)
    for _ in range(20):
        await api_without_worker.submit()
    # A browser stores the ID of a block without data and dispatches no event.
    assert (await read_blocks(api_without_worker, 3, after=0, types="JobDeleted"))[1:] == [["id: 20"], [": keep-alive"]]


async def test_stream_from_beyond_end_of_log_is_rejected(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    for response in (
        await api_without_worker.get("/api/ledger/stream?after=2"),
        await api_without_worker.get("/api/ledger/stream", **{"Last-Event-ID": "2"}),
    ):
        assert (response.status_code, response.json()["code"]) == (422, "invalid_content")
        assert "ends at position 1" in response.json()["message"]


async def test_head_request_on_stream_returns_immediately(api_without_worker: Api) -> None:
    response = await api_without_worker.http.head("/api/ledger/stream")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


async def test_stream_ends_after_maximum_duration_and_resumes_without_loss(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.routes.log.KEEPALIVE_SECONDS", 0.1)
    monkeypatch.setattr("jobledger.api.routes.log.MAX_STREAM_SECONDS", 1.0)
    await api_without_worker.submit()
    async with asyncio.timeout(DEADLINE_SECONDS):
        positions: list[int] = []
        for last in (1, 2):
            while last not in positions:  # on a busy machine, a stream may end before its first event
                resumed = api_without_worker.stream_events(last_event_id=positions[-1] if positions else 0)
                # The stream ends regularly: an interruption raises an error.
                positions += [event["position"] async for event in resumed]
            await api_without_worker.submit()
    assert positions == [1, 2]
