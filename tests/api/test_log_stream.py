"""The log as Server-Sent Events: resumed without gap or double, filtered, and gone without a trace."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import pytest

from tests.api.conftest import DEADLINE_SECONDS, Api


async def test_the_stream_tells_history_first_and_then_what_happens_live(api_without_worker: Api) -> None:
    before = [await api_without_worker.submit({"number": number}) for number in range(3)]
    seen = []
    async with asyncio.timeout(DEADLINE_SECONDS), aclosing(api_without_worker.stream_events(after=0)) as events:
        async for event in events:
            seen.append(event)
            if len(seen) == 3:
                before.append(await api_without_worker.submit({"number": 3}))
            if len(seen) == 4:
                break

    assert [event["stream"] for event in seen] == before
    assert [event["position"] for event in seen] == [1, 2, 3, 4]
    assert [event["sse_id"] for event in seen] == ["1", "2", "3", "4"]
    assert seen[0]["data"]["parameters"] == {"number": 0}


async def test_without_a_beginning_the_stream_tells_only_what_happens_from_now_on(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    seen = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        async with api_without_worker.http.stream("GET", "/api/ledger/stream") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            job_id = await api_without_worker.submit()
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    seen.append(line)
                    break

    assert job_id in seen[0]


async def test_a_client_that_keeps_losing_its_connection_sees_every_event_once(api: Api) -> None:
    chance = random.Random(4711)
    submitting = asyncio.create_task(_submit_some(api, 15))
    positions: list[int] = [0]
    last = False
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not last:
            wanted = chance.randint(1, 12)
            # `after` is what the page was opened with; a browser sends it again, and Last-Event-ID is what counts.
            async with aclosing(api.stream_events(last_event_id=positions[-1], after=3)) as events:
                async for event in events:
                    positions.append(event["position"])
                    last = event["data"].get("parameters") == {"last": True}
                    wanted -= 1
                    if last or not wanted:
                        break
    await submitting

    assert positions == list(range(len(positions)))
    assert len(positions) > 15 * 3


async def _submit_some(api: Api, number: int) -> None:
    for _ in range(number):
        await api.wait_until_finished(await api.submit())
    await api.submit({"last": True})


async def test_a_stream_can_be_narrowed_to_types_a_job_or_a_batch(api: Api) -> None:
    alone = await api.submit()
    batch = await api.submit_batch({}, {})
    await api.wait_until_finished(alone)
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    everything = await api.event_store.read(after=0)

    def expected(*, types: set[str] | None = None, streams: set[str] | None = None) -> list[int]:
        return [
            event.position
            for event in everything
            if (types is None or event.type in types) and (streams is None or event.stream in streams)
        ]

    async def seen(number: int, **query: object) -> list[int]:
        return [event["position"] for event in await api.take_events(number, after=0, **query)]

    of_types = expected(types={"JobSubmitted", "JobCompleted"})
    assert await seen(len(of_types), types="JobSubmitted,JobCompleted") == of_types
    of_job = expected(streams={alone})
    assert await seen(len(of_job), job_id=alone) == of_job
    of_batch = expected(streams={batch["batch_id"], *batch["job_ids"]})
    assert of_batch[-1] == finished["position"]
    assert await seen(len(of_batch), batch_id=batch["batch_id"]) == of_batch
    both = expected(streams={batch["job_ids"][0]}, types={"JobCompleted"})
    assert await seen(1, batch_id=batch["batch_id"], job_id=batch["job_ids"][0], types="JobCompleted") == both


async def test_clients_that_go_away_leave_nothing_behind(api_without_worker: Api) -> None:
    await api_without_worker.submit()

    async def come_and_go(clients: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert (
                await asyncio.gather(*(_number_of(api_without_worker.take_events(1, after=0)) for _ in range(clients)))
                == [1] * clients
            )

    await come_and_go(1)
    before = _tasks()
    await come_and_go(30)
    left: Counter[str] = Counter()
    for _ in range(100):
        await asyncio.sleep(0.1)
        # A task of the process itself, a heartbeat for example, may have begun meanwhile; not one for each client.
        left = Counter({name: number for name, number in (_tasks() - before).items() if number > 1})
        if not left:
            return
    raise AssertionError(f"still there after 10 s: {left}")


async def _number_of(events: Awaitable[list[Any]]) -> int:
    return len(await events)


def _tasks() -> Counter[str]:
    """Return how many tasks there are, by what they run."""
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())


async def test_many_clients_at_once_see_the_same(api_without_worker: Api) -> None:
    watching = [asyncio.create_task(api_without_worker.take_events(30, after=0)) for _ in range(20)]
    for number in range(30):
        await api_without_worker.submit({"number": number})
    seen = await asyncio.gather(*watching)

    assert all([event["position"] for event in events] == list(range(1, 31)) for events in seen)


async def test_separators_of_lines_inside_a_text_do_not_tear_an_event_apart(api_without_worker: Api) -> None:
    text = "one\r\ntwo\rthree\nfour\u2028five\u2029six\x85seven\x0b\x0c\x1c"
    await api_without_worker.submit({"text": text})
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        api_without_worker.http.stream("GET", "/api/ledger/stream?after=0") as answer,
    ):
        received = b""
        async for part in answer.aiter_bytes():
            received += part
            if b"data:" in received and received.endswith(b"\n\n"):
                break

    blocks = [block.split(b"\n") for block in received.split(b"\n\n") if b"data:" in block]
    assert [[line.partition(b":")[0] for line in block] for block in blocks] == [[b"id", b"event", b"data"]]
    assert b"\r" not in received


# Where a client resumes ---------------------------------------------------------------------------------------------


async def blocks(api: Api, number: int, **query: Any) -> list[list[str]]:
    """Return the lines of the first blocks of a stream."""
    found: list[list[str]] = [[]]
    async with asyncio.timeout(DEADLINE_SECONDS), api.http.stream("GET", "/api/ledger/stream", params=query) as answer:
        async for line in answer.aiter_lines():
            if line:
                found[-1].append(line)
            elif len(found) == number:
                break
            else:
                found.append([])
    return found


async def test_a_client_knows_where_to_resume_before_it_has_seen_any_event(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    [[retry, where]] = await blocks(api_without_worker, 1)
    assert retry.startswith("retry: ")
    assert where == "id: 1"
    missed = await api_without_worker.submit()
    [event] = await api_without_worker.take_events(1, last_event_id=1)
    assert event["stream"] == missed


async def test_a_sign_of_life_has_no_id(api_without_worker: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.api.routes.log_stream.KEEPALIVE_SECONDS", 0.1)
    assert (await blocks(api_without_worker, 3))[1:] == [[": keep-alive"], [": keep-alive"]]


async def test_a_client_that_wants_little_moves_on_all_the_same(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.routes.log_stream.KEEPALIVE_SECONDS", 0.3)
    for _ in range(20):
        await api_without_worker.submit()
    # Without an event there is nothing to dispatch: a browser takes note of the id, and that is all.
    assert (await blocks(api_without_worker, 3, after=0, types="JobDeleted"))[1:] == [["id: 20"], [": keep-alive"]]


async def test_a_stream_from_beyond_the_end_of_the_log_is_refused(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    for answer in (
        await api_without_worker.get("/api/ledger/stream?after=2"),
        await api_without_worker.get("/api/ledger/stream", **{"Last-Event-ID": "2"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_content")
        assert "ends at position 1" in answer.json()["message"]


async def test_who_asks_for_the_head_of_a_stream_only_is_not_kept_waiting(api_without_worker: Api) -> None:
    answer = await api_without_worker.http.head("/api/ledger/stream")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_client_has_to_say_again_now_and_then_who_it_is_and_misses_nothing(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.routes.log_stream.KEEPALIVE_SECONDS", 0.1)
    monkeypatch.setattr("jobledger.api.routes.log_stream.MAX_STREAM_SECONDS", 0.5)
    await api_without_worker.submit()
    async with asyncio.timeout(DEADLINE_SECONDS):
        seen = [
            event["position"] async for event in api_without_worker.stream_events(after=0)
        ]  # ends, and in good order
        await api_without_worker.submit()
        seen += [event["position"] async for event in api_without_worker.stream_events(last_event_id=seen[-1])]
    assert seen == [1, 2]
