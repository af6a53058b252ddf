"""The hash chain of events: any change breaks it."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import JobSubmitted
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from tests.support.event_examples import EVENT_EXAMPLES, NOON, make_job_submitted
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_chain, check_log, load_event_documents


@pytest.mark.parametrize("name", ["event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev"])
async def test_changed_field_breaks_hash_chain(unstreamed_ledger: Ledger, name: str) -> None:
    await unstreamed_ledger.submit_job()
    [document] = await load_event_documents(unstreamed_ledger.db)
    check_chain([document])
    changes: dict[str, Any] = {
        "version": 2,
        "schema": 2,
        "time": document["time"] + timedelta(milliseconds=1),
        "data": document["data"] | {"user_id": "mallory"},
        "meta": document["meta"] | {"actor": "user:mallory"},
        "prev": b"\1" + GENESIS_HASH[1:],
    }
    forged = document | {name: changes.get(name, f"{document.get(name)}x")}
    assert sha256(build_hash_input(forged)).digest() != document["hash"]


async def test_missing_or_swapped_event_breaks_hash_chain(unstreamed_ledger: Ledger) -> None:
    submitted = await unstreamed_ledger.submit_job()
    await handle_command(
        unstreamed_ledger.event_store, submitted.events[0].stream, ClaimJob("w1", NOON), meta=EVENT_METADATA
    )
    documents = await load_event_documents(unstreamed_ledger.db)
    check_log(documents)
    for forged in (documents[1:], documents[::-1]):
        with pytest.raises(AssertionError):
            check_chain(forged)


async def test_hash_does_not_include_position(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    [document] = await load_event_documents(unstreamed_ledger.db)
    check_chain([document | {"_id": 4711}])


async def test_stored_chains_verify_for_all_kinds_of_content(unstreamed_ledger: Ledger) -> None:
    full = EVENT_EXAMPLES[0]
    assert isinstance(full, JobSubmitted)
    await unstreamed_ledger.submit_job(full)
    plain: list[Any] = [2**40, -1, 0.1, 1.0, -0.0, 1e300, "😀\0", None, True, [], {}, [{"a.b": [[]]}]]
    for value in plain:
        await unstreamed_ledger.submit_job(
            make_job_submitted(parameters={"value": value, "nested": [{"value": value}]})
        )
    check_log(await load_event_documents(unstreamed_ledger.db))
