"""Submit jobs in transactions of a program: commit, rollback, retries, crashes and documents that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Annotated, Any

import bson
import pytest
from bson.raw_bson import RawBSONDocument
from pydantic import Field
from pymongo import AsyncMongoClient, MongoClient
from pymongo.asynchronous.client_session import AsyncClientSession

import jobledger
from jobledger import App
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.errors import ConfigurationError
from jobledger.ledger.domain.events import AccessControl, JobSubmitted
from jobledger.ledger.mongo.connection import Connection, Document
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.ledger_setup import Ledger, check_log, load_event_documents
from tests.support.outbox_programs import (
    create_ledger,
    order_and_submit,
    run_relay,
    run_until_killed,
)
from tests.support.polling import poll_until


@pytest.fixture
async def connection(mongodb_uri: str, db_name: str) -> Connection:
    connection = Connection(mongodb_uri, db_name)
    await create_ledger(connection)
    return connection


@pytest.fixture
async def client(connection: Connection) -> AsyncIterator[AsyncMongoClient[Document]]:
    """The client of a program, with the options of a program."""
    async with AsyncMongoClient[Document](connection.uri) as client:
        yield client


@pytest.fixture
def app(connection: Connection) -> App:
    return App(db_name=connection.db_name)


async def is_empty(ledger: Ledger) -> bool:
    return await ledger.db.outbox.count_documents({}) == 0


async def read_submissions(ledger: Ledger) -> dict[str, JobSubmitted]:
    """Wait until the outbox is empty. Return the submitted jobs by ID, after a check of the log."""
    await poll_until(partial(is_empty, ledger))
    documents = await load_event_documents(ledger.db)
    check_log(documents)
    # An append that finds the job in the log leaves its position void.
    submitted = [document for document in documents if document["type"] != "PositionVoided"]
    assert {document["type"] for document in submitted} <= {"JobSubmitted"}
    jobs = {document["stream"]: JobSubmitted.model_validate(document["data"]) for document in submitted}
    assert len(jobs) == len(submitted)
    return jobs


@jobledger.job("mail", retry=jobledger.Retry(5), timeout="2m")
async def mail(ctx: jobledger.Context, to: str, copies: Annotated[int, Field(le=9)] = 1, priority: str = "") -> None:
    """A job function with a parameter that has the name of an option."""


@jobledger.job("once", retry=None)
def once(amount: Decimal) -> None:
    """A job function that is never retried."""


# Commit and rollback ------------------------------------------------------------------------------------------------


async def test_committed_job_is_submitted_with_all_options(
    connection: Connection, client: AsyncMongoClient[Document], app: App
) -> None:
    parameters = {"url": "https://example.org/", "große.Zahl": 2**53 - 1, "no": None, "list": [1, 1.5, True, {}]}
    due = datetime(2030, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
    async with run_relay(connection) as ledger, client.start_session() as session:
        async with await session.start_transaction():
            job_id = await app.submit(
                "render",
                parameters,
                session=session,
                name="Invoice 4711",
                priority=-7,
                not_before=due.astimezone(),
                max_attempts=9,
                timeout=timedelta(minutes=5),
                user_id="alice",
                access_control={"visibility": "team", "read_access": ["bob"]},
            )
            assert await ledger.event_store.read_stream(job_id) == []
        jobs = await read_submissions(ledger)
        [event] = await ledger.event_store.read_stream(job_id)
    assert event.meta.actor == "user:alice"
    assert jobs == {
        job_id: JobSubmitted(
            job_type="render",
            parameters=parameters,
            job_name="Invoice 4711",
            user_id="alice",
            priority=-7,
            not_before=due,
            max_attempts=9,
            timeout_s=300,
            access_control=AccessControl(visibility="team", read_access=["bob"]),
        )
    }


async def test_options_have_the_defaults_of_a_submission(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    async with run_relay(connection) as ledger:
        job_id = await order_and_submit(client, connection.db_name, {})
        jobs = await read_submissions(ledger)
    assert jobs == {job_id: JobSubmitted(job_type="echo", parameters={}, user_id="local")}


async def test_rolled_back_job_is_never_submitted(
    connection: Connection, client: AsyncMongoClient[Document], app: App
) -> None:
    async with run_relay(connection) as ledger, client.start_session() as session:
        await session.start_transaction()
        rolled_back = await app.submit("echo", {}, session=session)
        await session.abort_transaction()
        committed = await order_and_submit(client, connection.db_name, {})
        jobs = await read_submissions(ledger)
    assert list(jobs) == [committed] != [rolled_back]


async def test_write_conflict_of_the_caller_submits_once(
    connection: Connection, client: AsyncMongoClient[Document], app: App
) -> None:
    """The first try of the transaction conflicts with another write, so the driver repeats it."""
    orders = client[connection.db_name].orders
    await orders.insert_one({"_id": 1, "paid": 0})
    tries: list[str] = []

    async def pay(session: AsyncClientSession) -> None:
        tries.append(await app.submit("echo", {}, session=session))
        if len(tries) == 1:
            await orders.update_one({"_id": 1}, {"$inc": {"paid": 10}})  # outside of the transaction
        await orders.update_one({"_id": 1}, {"$inc": {"paid": 1}}, session=session)

    async with run_relay(connection) as ledger, client.start_session() as session:
        await session.with_transaction(pay)
        jobs = await read_submissions(ledger)
    assert len(tries) == 2
    assert list(jobs) == tries[1:]


def test_blocking_driver_submits_in_its_transaction(
    mongodb_client: MongoClient[Document], connection: Connection, app: App
) -> None:
    with mongodb_client.start_session() as session:
        first = session.with_transaction(lambda it: app.submit_blocking("echo", {"n": 1}, session=it, key="k"))
        second = session.with_transaction(lambda it: app.submit_blocking("echo", {"n": 1}, session=it, key="k"))
        session.start_transaction()
        app.submit_blocking("echo", {"n": 2}, session=session)
        session.abort_transaction()

    async def read() -> dict[str, JobSubmitted]:
        async with run_relay(connection) as ledger:
            return await read_submissions(ledger)

    assert first == second
    assert list(asyncio.run(read())) == [first]


async def test_job_function_is_validated_before_anything_is_written(
    connection: Connection, client: AsyncMongoClient[Document], app: App
) -> None:
    async with run_relay(connection) as ledger, client.start_session() as session:
        async with await session.start_transaction():
            with pytest.raises(ValueError, match="copies"):
                await app.submit(mail, "a@example.org", copies=10, session=session)
            with pytest.raises(TypeError, match="missing a required argument: 'to'"):
                await app.submit(mail, session=session)
            with pytest.raises(ValueError, match=r"max_attempts: must be 1.*'once' are never retried"):
                await app.submit(once, 1, max_attempts=2, session=session)
            await app.submit(mail, to="a@example.org", session=session, priority="high", name="x")
        [job] = (await read_submissions(ledger)).values()
    assert job.parameters == {"to": "a@example.org", "priority": "high"}
    assert (job.job_type, job.job_name, job.priority) == ("mail", "x", 1)


async def test_job_has_attempts_and_timeout_of_its_type(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    app = App(jobs=[once], db_name=connection.db_name)
    async with run_relay(connection) as ledger, client.start_session() as session:
        async with await session.start_transaction():
            ids = [
                await app.submit(mail, "a", session=session),
                await app.submit(mail, "a", session=session, max_attempts=2, timeout=7),
                await app.submit(once, Decimal("1.5"), session=session),
                await app.submit("once", {"amount": "1.5"}, session=session),
                await app.submit("mail", parameters={"to": "a"}, session=session),
            ]
        jobs = await read_submissions(ledger)
    assert [(jobs[it].max_attempts, jobs[it].timeout_s) for it in ids] == [
        (5, 120),
        (2, 7),
        (1, 3600),
        (1, 3600),
        (3, 3600),
    ]
    assert jobs[ids[2]].parameters == jobs[ids[3]].parameters == {"amount": "1.5"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("echo", {"x": float("nan")}), {}, ValueError, "NaN|nan|JSON"),
        (("echo", {"$set": 1}), {}, ValueError, "begins with"),
        (("echo", {"x": 2**60}), {}, ValueError, "2\\^53|integer"),
        (("echo", {"x": "a" * limits.MAX_PARAMETERS_BYTES}), {}, ValueError, "at most"),
        (("echo", {"url": "https://u:hunter2@example.org/"}), {}, ValueError, "parameters.url"),
        (("x" * 101, {}), {}, ValueError, "job_type"),
        (("echo", {}), {"priority": 1001}, ValueError, "priority"),
        (("echo", {}), {"max_attempts": 0}, ValueError, "max_attempts"),
        (("echo", {}), {"timeout": timedelta(days=8)}, ValueError, "^timeout:"),
        (("echo", {}), {"timeout": "10m"}, ValueError, "^timeout:"),
        (("echo", {}), {"not_before": datetime(2030, 1, 1)}, ValueError, "not_before"),  # noqa: DTZ001 - the point
        (("echo", {}), {"user_id": "team-a"}, ValueError, "user_id"),
        (("echo", {}), {"user_id": ""}, ValueError, "user_id"),
        (("echo", {}), {"access_control": {"read_access": ["x"] * 201}}, ValueError, "access_control"),
        (("echo", {}), {"access_control": {"readers": ["bob"]}}, ValueError, "access_control.readers"),
        (("echo", {}), {"name": "x" * 501}, ValueError, "^name:"),
        (("echo", {}), {"key": ""}, ValueError, "key"),
        (("echo", {}), {"key": 4711}, ValueError, "^key:"),
        ((object(),), {}, TypeError, "job function"),
        (("echo", {}), {"prio": 1}, TypeError, "prio"),
        (("echo",), {}, TypeError, "parameters"),
    ],
)
async def test_wrong_submission_is_rejected_in_the_caller(
    client: AsyncMongoClient[Document],
    app: App,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    async with client.start_session() as session:
        await session.start_transaction()
        with pytest.raises(error, match=message) as raised:
            await app.submit(*arguments, session=session, **options)
        assert "hunter2" not in str(raised.value)
        assert len(str(raised.value)) < 1000
        await session.abort_transaction()


async def test_session_without_transaction_is_rejected(client: AsyncMongoClient[Document], app: App) -> None:
    async with client.start_session() as session:
        with pytest.raises(RuntimeError, match=r"await session\.start_transaction"):
            await app.submit("echo", {}, session=session)


async def test_session_of_the_other_driver_is_rejected_before_anything_is_written(
    connection: Connection, client: AsyncMongoClient[Document], app: App
) -> None:
    """A driver of the other kind would not write the document, and the caller would get the ID of no job."""
    with MongoClient[Document](connection.uri) as blocking_client, blocking_client.start_session() as blocking:
        async with client.start_session() as session:
            wrong: Any = session
            await session.start_transaction()
            with pytest.raises(TypeError, match=r"await submit"):
                app.submit_blocking("echo", {}, session=wrong)
            await session.abort_transaction()
        with blocking.start_transaction():
            wrong = blocking
            with pytest.raises(TypeError, match=r"submit_blocking"):
                await app.submit("echo", {}, session=wrong)
        wrong = None
        with pytest.raises(TypeError, match="NoneType"):
            await app.submit("echo", {}, session=wrong)
        assert blocking_client[connection.db_name].outbox.find_one() is None


async def test_database_without_ledger_is_rejected(client: AsyncMongoClient[Document], db_name: str) -> None:
    async with client.start_session() as session:
        await session.start_transaction()
        with pytest.raises(ConfigurationError, match=r"mongodb\.db_name"):
            await App(db_name=f"{db_name}_x").submit("echo", {}, session=session)
        await session.abort_transaction()


# Keys ---------------------------------------------------------------------------------------------------------------


async def test_key_submits_once_before_and_after_the_job_is_in_the_log(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    submit = partial(order_and_submit, client, connection.db_name, {"n": 1}, key="order 4711")
    ids = [await submit(), await submit()]
    async with run_relay(connection) as ledger:
        await read_submissions(ledger)
        ids.append(await submit())
        other_user = await submit(user_id="bob")
        jobs = await read_submissions(ledger)
        assert await ledger.db.outbox_rejected.find_one() is None
    assert set(jobs) == {*ids, other_user}
    assert (len(set(ids)), other_user in ids) == (1, False)


async def test_concurrent_transactions_with_one_key_submit_once(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    async with run_relay(connection) as ledger:
        submit = partial(order_and_submit, client, connection.db_name, {"n": 1}, key="k")
        ids = await asyncio.gather(*(submit() for _ in range(8)))
        jobs = await read_submissions(ledger)
    assert [*jobs] == [*set(ids)]


async def test_key_of_another_job_is_an_error_or_a_rejected_document(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    job_id = await order_and_submit(client, connection.db_name, {"n": 1}, key="k")
    with pytest.raises(ValueError, match="used for another job"):
        await order_and_submit(client, connection.db_name, {"n": 2}, key="k")
    async with run_relay(connection) as ledger:
        await read_submissions(ledger)
        await order_and_submit(client, connection.db_name, {"n": 2}, key="k")
        jobs = await read_submissions(ledger)
        [rejected] = await ledger.db.outbox_rejected.find().to_list()
    assert {it: job.parameters for it, job in jobs.items()} == {job_id: {"n": 1}}
    assert (rejected["_id"], "another job" in rejected["reason"]) == (job_id, True)


# Wrong documents ----------------------------------------------------------------------------------------------------

BAD_DOCUMENTS: list[Document] = [
    {"_id": 1, "job": "{}"},
    {"_id": "job-1"},
    {"_id": "job-" + "0" * 24},
    {"_id": "job-" + "1" * 24, "job": {"job_type": "echo"}},
    {"_id": "job-" + "2" * 24, "job": "{"},
    {"_id": "job-" + "3" * 24, "job": "[" * 100_000},
    {"_id": "job-" + "4" * 24, "job": '{"job_type": "echo", "parameters": {}, "user_id": "a", "batch_id": "b"}'},
    {"_id": "job-" + "5" * 24, "job": '{"job_type": "echo", "parameters": {"x": NaN}, "user_id": "a"}'},
    {"_id": "job-" + "6" * 24, "job": '{"job_type": "echo", "parameters": {"x": 1e999}, "user_id": "a"}'},
    {"_id": "job-" + "7" * 24, "job": '{"job_type": "e", "parameters": {"u": "http://a:b@c.de/"}, "user_id": "a"}'},
    {"_id": "job-" + "8" * 24, "job": '{"job_type": "echo", "parameters": {"x": "\\ud800"}, "user_id": "a"}'},
    {"_id": "job-" + "9" * 24, "job": "x" * 15_000_000},
    {
        "_id": "job-" + "a" * 24,
        "job": '{"job_type": "echo", "user_id": "a", "parameters": {"x": [' + ",".join(["[]"] * 4_000_000) + "]}}",
    },
]


@pytest.mark.parametrize("is_running", [True, False], ids=["relay runs", "relay starts later"])
async def test_wrong_documents_are_rejected_and_block_no_other(
    connection: Connection, client: AsyncMongoClient[Document], is_running: bool
) -> None:
    outbox = client[connection.db_name].outbox

    async def fill() -> list[str]:
        first = await order_and_submit(client, connection.db_name, {"n": 1})
        for document in BAD_DOCUMENTS:
            await outbox.insert_one(dict(document))
        return [first, await order_and_submit(client, connection.db_name, {"n": 2})]

    expected = [] if is_running else await fill()
    async with run_relay(connection) as ledger:
        expected = expected or await fill()
        jobs = await read_submissions(ledger)
        rejected = await ledger.db.outbox_rejected.find().to_list()
    assert set(jobs) == set(expected)
    assert {document["_id"] for document in rejected} == {document["_id"] for document in BAD_DOCUMENTS}
    assert all(0 < len(document["reason"]) <= 1000 for document in rejected)


def encode_with_id(type_byte: bytes, value: bytes) -> RawBSONDocument:
    elements = type_byte + b"_id\0" + value
    codec = bson.CodecOptions(document_class=RawBSONDocument, unicode_decode_error_handler="replace")
    return RawBSONDocument((len(elements) + 5).to_bytes(4, "little") + elements + b"\0", codec)


def encode_text(text: bytes) -> bytes:
    return (len(text) + 1).to_bytes(4, "little") + text + b"\0"


async def test_documents_with_ids_that_the_driver_cannot_reproduce_block_no_other(
    connection: Connection, client: AsyncMongoClient[Document]
) -> None:
    """The server stores IDs that are not UTF-8. They fill more than a page, and sort before those of jobs."""
    broken = [encode_with_id(b"\x02", encode_text(b"!%d\xff" % number)) for number in range(250)]
    twice = bson.encode({"a": 1})[4:-1] * 2  # a field that occurs twice, of which the driver keeps one
    broken.append(encode_with_id(b"\x03", (len(twice) + 5).to_bytes(4, "little") + twice + b"\0"))
    await client[connection.db_name].outbox.insert_many(broken)
    counter = CommandCounter()
    async with run_relay(monitor_connection(connection, counter)) as ledger:
        job_id = await order_and_submit(client, connection.db_name, {})
        assert [*await read_submissions(ledger)] == [job_id]
        await asyncio.sleep(0.3)
        before = counter.started_by_name["find"]
        await asyncio.sleep(0.5)
        assert counter.started_by_name["find"] == before
        assert await ledger.db.outbox_rejected.count_documents({}) > 0


# Crashes and concurrency --------------------------------------------------------------------------------------------


async def test_program_killed_after_its_commit_has_submitted_once(connection: Connection) -> None:
    await asyncio.to_thread(run_until_killed, connection, "after commit")
    async with run_relay(connection) as ledger:
        jobs = await read_submissions(ledger)
        orders = await ledger.db.orders.count_documents({})
    assert [job.parameters for job in jobs.values()] == [{"n": 1}]
    assert orders == 1


@pytest.mark.parametrize("point", ["before append", "after append"])
async def test_relay_killed_before_or_after_its_append_submits_once(
    connection: Connection, client: AsyncMongoClient[Document], point: str
) -> None:
    ids = {await order_and_submit(client, connection.db_name, {"n": number}) for number in range(3)}
    await asyncio.to_thread(run_until_killed, connection, point)
    assert await client[connection.db_name].outbox.count_documents({}) == 3
    assert await client[connection.db_name].events.count_documents({}) == (3 if point == "after append" else 0)
    async with run_relay(connection) as ledger:
        jobs = await read_submissions(ledger)
        assert await ledger.db.outbox_rejected.find_one() is None
    assert set(jobs) == ids


async def test_several_relays_submit_each_job_once(connection: Connection, client: AsyncMongoClient[Document]) -> None:
    ids = [await order_and_submit(client, connection.db_name, {"n": number}) for number in range(30)]
    async with run_relay(connection) as ledger, run_relay(connection), run_relay(connection):
        for number in range(30, 150):
            ids.append(await order_and_submit(client, connection.db_name, {"n": number}))
        jobs = await read_submissions(ledger)
        assert await ledger.db.outbox_rejected.find_one() is None
    assert {it: job.parameters["n"] for it, job in jobs.items()} == {it: n for n, it in enumerate(ids)}
