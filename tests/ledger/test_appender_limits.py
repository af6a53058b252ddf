"""The appender: invalid events, limits, encoding, grouping, and errors of the database."""

from __future__ import annotations

import asyncio
import threading
from enum import Enum
from typing import Any
from uuid import UUID

import pytest

from jobledger.ledger.domain import canonical_json
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import MAX_EVENT_BYTES, VOID_STREAM
from tests.support.event_examples import NOON, make_job_submitted
from tests.support.event_stores import create_append, open_pausable_store
from tests.support.ledger_setup import (
    Ledger,
    check_log,
    event_positions,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.tcp_proxy import TcpProxy


class Color(Enum):
    RED = "red"


INVALID_VALUES: dict[str, Any] = {
    "NaN": float("nan"),
    "lone surrogate": "\ud800",
    "operator": {"$set": 1},
    "huge integer": 2**64,
    "UUID": UUID(int=1),
    "enum": Color.RED,
    "too large": "x" * (MAX_EVENT_BYTES + 1),
    "too large in BSON only": [0] * 1_500_000,
}


@pytest.mark.parametrize("invalid_value", INVALID_VALUES.values(), ids=INVALID_VALUES.keys())
async def test_invalid_event_does_not_fail_other_appends(unstreamed_ledger: Ledger, invalid_value: Any) -> None:
    valid_appends = [unstreamed_ledger.event_store.append(create_append(make_job_submitted())) for _ in range(3)]
    results = await asyncio.wait_for(
        asyncio.gather(
            *valid_appends,
            unstreamed_ledger.event_store.append(create_append(make_job_submitted(parameters={"bad": invalid_value}))),
            unstreamed_ledger.event_store.append(
                create_append(make_job_submitted(), make_job_submitted(parameters={"bad": invalid_value}))
            ),
            unstreamed_ledger.event_store.append(create_append(make_job_submitted())),
            return_exceptions=True,
        ),
        DEADLINE_SECONDS,
    )
    assert [type(result) for result in results] == [list, list, list, InvalidEvent, InvalidEvent, list]
    await unstreamed_ledger.event_store.append(create_append(make_job_submitted()))
    assert len([event for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM]) == 5
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_cancelled_append_does_not_cancel_write(connection: Connection) -> None:
    async with open_pausable_store(connection) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted(), stream="job-1"))
        cancelled_append = asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream="job-2")))
        remaining_append = asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream="job-3")))
        await asyncio.sleep(0)
        first_append.cancel()
        cancelled_append.cancel()
        event_store.may_insert.set()
        [recorded] = await asyncio.wait_for(remaining_append, DEADLINE_SECONDS)
        assert recorded.position == 3
        await (
            event_store._appender.wait_until_idle()
        )  # the first write may end last, and a reader would void its position
        assert [event.stream for event in await event_store.read()] == ["job-1", "job-2", "job-3"]
        assert first_append.cancelled()
        assert cancelled_append.cancelled()


async def test_aclose_finishes_pending_appends(connection: Connection) -> None:
    async with open_pausable_store(connection) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = asyncio.create_task(event_store.append(create_append(make_job_submitted())))
        await asyncio.sleep(0)
        closing = asyncio.create_task(event_store.aclose())
        event_store.may_insert.set()
        await asyncio.wait_for(closing, DEADLINE_SECONDS)
        assert first_append.done()
        assert (await pending)[0].position == 2


async def test_append_above_pending_event_limit_is_rejected(connection: Connection) -> None:
    async with open_pausable_store(connection, EventStoreLimits(max_pending_events=3)) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(event_store.append(create_append(make_job_submitted()))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy):
            await event_store.append(create_append(make_job_submitted()))
        event_store.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await event_store.append(create_append(make_job_submitted()))
        assert await event_store.read_head_position() == 5


async def test_append_above_pending_byte_limit_is_rejected(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 60_000})
    async with open_pausable_store(
        connection, EventStoreLimits(max_pending_bytes=150_000, max_concurrent_writes=1)
    ) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(event_store.append(create_append(large))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy, match="bytes"):
            await event_store.append(create_append(make_job_submitted()))
        event_store.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await event_store.append(create_append(large))
        assert await event_store.read_head_position() == 5


@pytest.mark.parametrize(
    ("parameters", "encoded_on_loop"),
    [
        ({"a": "x"}, True),
        ({"a": [1.0, None, "$"]}, True),
        ({"a": "x" * 100_000}, False),
        ({"a": [1.0] * 100_000}, False),
        ({"a": [None] * 100_000}, False),
        ({"a": "x" * 100_000 + "$"}, False),
        ({"a": ["ä"] * 10_000 + ["\U00010000"] * 10_000}, False),
    ],
    ids=["small", "small with slow path", "text", "whole floats", "nulls", "dollar", "not ASCII"],
)
async def test_large_event_is_encoded_in_thread(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], encoded_on_loop: bool
) -> None:
    threads: list[bool] = []

    def record_encoder_thread(value: Any, depth: int) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode_plain(value, depth)

    def record_check_thread(text: bytes) -> bool:
        threads.append(threading.current_thread() is threading.main_thread())
        return needs_slow_path(text)

    encode_plain, needs_slow_path = canonical_json._normalize, canonical_json._needs_slow_path
    monkeypatch.setattr(canonical_json, "_normalize", record_encoder_thread)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", record_check_thread)
    for job in (make_job_submitted(parameters=parameters), make_job_submitted(parameters=parameters, not_before=NOON)):
        threads.clear()
        await unstreamed_ledger.event_store.append(create_append(make_job_submitted()), create_append(job))
        assert (False not in threads) is encoded_on_loop
        assert threads.count(True) == 1 or encoded_on_loop  # the small event
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_oversized_event_is_rejected_before_encoding(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical_json, "_normalize", None)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", None)
    for content in ([[1.0] * 3] * 240_000, [None] * 1_000_000, ["$"] * 1_000_000):
        with pytest.raises(InvalidEvent, match=r"`parameters` must have at most \d+ bytes"):
            await unstreamed_ledger.event_store.append(create_append(make_job_submitted(parameters={"a": content})))


async def test_encoding_of_many_small_events_yields_to_other_tasks(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding yields about once per 64 KiB, whatever the number of appends."""
    rounds = 0

    async def count_iterations() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    jobs = [create_append(make_job_submitted(parameters={"a": "x" * 30_000})) for _ in range(20)]
    counting = asyncio.create_task(count_iterations())
    rounds_before_write = 0
    real_write = unstreamed_ledger.event_store._appender.write

    def write(*arguments: Any) -> None:
        nonlocal rounds_before_write
        rounds_before_write = rounds
        real_write(*arguments)

    monkeypatch.setattr(unstreamed_ledger.event_store._appender, "write", write)
    await unstreamed_ledger.event_store.append(*jobs)
    counting.cancel()
    assert 5 <= rounds_before_write <= 20


async def test_append_above_byte_limit_is_rejected_with_size_and_limit(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 40_000})
    async with open_ledger(connection, EventStoreLimits(max_append_bytes=100_000), with_change_stream=False) as ledger:
        with pytest.raises(InvalidEvent, match=r"3 events of 12\d{4} bytes .* 100000 bytes"):
            await ledger.event_store.append(*[create_append(large) for _ in range(3)])
        assert len(await ledger.event_store.append(*[create_append(large) for _ in range(2)])) == 2


async def test_append_larger_than_one_message_is_atomic(unstreamed_ledger: Ledger) -> None:
    """The documents have 52 MB in BSON, four times their JSON. A message has at most 16 MB."""
    numbers = make_job_submitted(parameters={"numbers": list(range(10, 90)) * 1000})
    existing = await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-existing"))
    many = [create_append(numbers) for _ in range(60)]
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(*many, create_append(make_job_submitted(), stream="job-existing"))
    assert [event.stream for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM] == [
        "job-existing"
    ]
    recorded = await unstreamed_ledger.event_store.append(*many)
    assert event_positions(recorded) == list(range(recorded[0].position, recorded[0].position + 60))
    assert recorded[0].position > existing[0].position
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_appends_are_grouped_while_other_writes_are_in_progress(connection: Connection) -> None:
    async with open_pausable_store(
        connection, EventStoreLimits(max_concurrent_writes=3, max_events_per_write=10)
    ) as event_store:
        event_store.may_insert.clear()
        appending = [
            asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream=f"job-{n}")))
            for n in range(50)
        ]
        await poll_until(lambda: event_store.write_sizes == [10, 10, 10])
        event_store.may_insert.set()
        recorded = await asyncio.gather(*appending)
        assert sorted(event.position for [event] in recorded) == list(range(1, 51))
        assert event_store.write_sizes == [10] * 5
        check_log(await load_event_documents(event_store.db))


async def test_permanent_database_error_fails_append_at_once(connection: Connection) -> None:
    """A validator on the collection represents any permanent rejection."""
    async with open_ledger(connection, with_change_stream=False) as ledger:
        await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {"type": "Nothing"}})
        async with asyncio.timeout(DEADLINE_SECONDS):  # half of the append timeout
            with pytest.raises(LedgerUnavailable, match="rejects the events: Document failed validation"):
                await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {}})
        await ledger.submit_job()
        events = await read_all_events(ledger.event_store)
        assert [event.type for event in events] == ["JobSubmitted", "PositionVoided", "JobSubmitted"]


async def test_append_without_database_fails_after_timeout(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        connection = Connection(proxy.uri, db_name, connect_timeout_ms=300)
        async with open_ledger(
            connection, EventStoreLimits(append_timeout_seconds=0.5), with_change_stream=False
        ) as ledger:
            await ledger.submit_job()
            proxy.close()
            with pytest.raises(LedgerUnavailable, match="in time"):
                await asyncio.wait_for(ledger.submit_job(), DEADLINE_SECONDS)
            for reading in (
                ledger.event_store.read_head_position(),
                ledger.event_store.read(),
                ledger.event_store.read_stream("job-1"),
            ):
                with pytest.raises(LedgerUnavailable):
                    await reading


async def test_queued_appends_without_database_time_out_together(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        connection = Connection(proxy.uri, db_name, connect_timeout_ms=300)
        limits = EventStoreLimits(append_timeout_seconds=1, max_events_per_write=1, max_concurrent_writes=2)
        async with open_ledger(connection, limits, with_change_stream=False) as ledger:
            await ledger.submit_job()
            proxy.close()
            async with asyncio.timeout(DEADLINE_SECONDS):  # one after the other, they would take 30 s
                results = await asyncio.gather(*(ledger.submit_job() for _ in range(200)), return_exceptions=True)
            assert {type(result) for result in results} == {LedgerUnavailable}


async def test_broken_connection_does_not_duplicate_events(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with open_ledger(Connection(proxy.uri, db_name), with_change_stream=False) as ledger:
            for _ in range(5):
                appending = asyncio.gather(*(ledger.submit_job() for _ in range(20)))
                await asyncio.sleep(0.001)
                proxy.close_connections()
                await asyncio.wait_for(appending, DEADLINE_SECONDS)
            events = await read_all_events(ledger.event_store)
            assert len([event for event in events if event.stream != VOID_STREAM]) == 100
            check_log(await load_event_documents(ledger.db))
