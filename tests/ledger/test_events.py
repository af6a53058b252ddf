"""The catalogue: every event survives the database, and every event ever stored can still be read."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import bson
import pytest
from bson.codec_options import CodecOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from jobledger.ledger.domain.events import EVENT_TYPES, Event, EventMetadata, RecordedEvent
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.hash_chain import GENESIS_HASH, hash_input
from tests.support import golden_events
from tests.support.event_examples import EVENT_EXAMPLES, NOON
from tests.support.ledger_setup import check_chain
from tests.support.strategies import event_instances

AS_THE_DRIVER_READS = CodecOptions[dict[str, Any]](tz_aware=True, tzinfo=UTC)
EVERY_TYPE = sorted(EVENT_TYPES.values(), key=lambda event: event.__name__)


def by_name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def document_of(event: Event) -> dict[str, Any]:
    document: dict[str, Any] = {
        "_id": 1,
        "event_id": "01a209d5-0be5-70bb-a8c6-9560ad79fa4f",
        "stream": "job-1",
        "version": 1,
        "type": type(event).__name__,
        "schema": event.schema_version,
        "time": NOON,
        "data": event.to_payload(),
        "meta": EventMetadata("user:alice", "batch-1", "01a209d5", "00-4bf9-00f0-01").to_document(),
        "prev": GENESIS_HASH,
    }
    return {**document, "hash": sha256(hash_input(document)).digest()}


def through_the_database(document: dict[str, Any]) -> dict[str, Any]:
    return bson.decode(bson.encode(document), AS_THE_DRIVER_READS)


@pytest.mark.parametrize("event", EVENT_EXAMPLES, ids=by_name)
def test_every_event_and_its_hash_survive_the_database(event: Event) -> None:
    there = through_the_database(document_of(event))
    check_chain([there])
    assert RecordedEvent(there).event == event
    assert RecordedEvent(there).meta == EventMetadata("user:alice", "batch-1", "01a209d5", "00-4bf9-00f0-01")


@pytest.mark.parametrize("kind", EVERY_TYPE, ids=by_name)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_whatever_is_in_an_event_it_and_its_hash_survive_the_database(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(event_instances(kind))
    there = through_the_database(document_of(event))
    check_chain([there])
    assert RecordedEvent(there).event == event
    assert RecordedEvent(there).event.to_payload() == event.to_payload()


def test_optional_fields_that_were_not_given_are_not_stored() -> None:
    assert EVENT_TYPES["JobCancelled"](by="alice").to_payload() == {"by": "alice"}
    assert EVENT_TYPES["JobUpdated"].model_validate({"by": "alice", "parameters": {}}).to_payload() == {
        "by": "alice",
        "parameters": {},
    }


def test_what_a_required_field_holds_is_stored_even_if_it_is_nothing() -> None:
    step = {"attempt": 1, "step": "page", "key": "k", "output": None, "duration_s": 0.0}
    assert EVENT_TYPES["StepCompleted"].model_validate(step).to_payload()["output"] is None


def test_an_event_cannot_be_changed_once_it_is_made() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EVENT_EXAMPLES[1].attempt = 2  # type: ignore[attr-defined]  # that is the point


def test_there_is_an_example_of_every_event() -> None:
    assert {type(example) for example in EVENT_EXAMPLES} == set(EVENT_TYPES.values())


# Golden histories -------------------------------------------------------------------------------------------------

GOLDEN = golden_events.load_golden_events()


@pytest.mark.parametrize("kind", EVERY_TYPE, ids=by_name)
def test_every_event_has_a_golden_history(kind: type[Event]) -> None:
    assert golden_events.golden_path(kind).exists(), "record it: python -m tests.support.golden_events"


@pytest.mark.parametrize("document", GOLDEN, ids=lambda document: f"{document['type']}.{document['schema']}")
def test_what_was_stored_once_can_still_be_read(document: dict[str, Any]) -> None:
    event = RecordedEvent(document)
    assert event.type == document["type"]
    assert (event.position, event.version, event.stream) == (document["_id"], document["version"], document["stream"])
    assert event.hash == document["hash"]
    assert event.meta.to_document() == document["meta"]
    if document["schema"] == event.event.schema_version:
        assert_contains(event.event.to_payload(), document["data"])


def assert_contains(now: Any, then: Any) -> None:
    """New fields may have come; nothing that was stored is dropped or read differently."""
    if isinstance(then, dict):
        for name, value in then.items():
            assert name in now, f"{name} is not read any more"
            assert_contains(now[name], value)
    elif isinstance(then, list):
        assert len(now) == len(then)
        for mine, its in zip(now, then, strict=True):
            assert_contains(mine, its)
    else:
        assert now == then


def test_the_chains_of_golden_histories_still_verify() -> None:
    streams: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for document in GOLDEN:
        streams[document["stream"]].append(document)
    for void in streams.pop(VOID_STREAM):
        check_chain([void])
    assert len(streams) >= 2
    for documents in streams.values():
        documents.sort(key=lambda document: document["version"])
        assert [document["version"] for document in documents] == list(range(1, len(documents) + 1))
        check_chain(documents)


async def test_recording_is_done_once_and_never_over_an_earlier_record(mongodb_uri: str, tmp_path: Path) -> None:
    await golden_events.record_golden_events(mongodb_uri, EVENT_EXAMPLES[:2], tmp_path)
    before = contents(tmp_path)
    assert sorted(before) == ["JobClaimed.1.json", "JobSubmitted.1.json"]
    with pytest.raises(FileExistsError):
        golden_events.write_golden_event(
            GOLDEN[0] | {"time": datetime.now(UTC)}, golden_events.golden_path(type(EVENT_EXAMPLES[0]), tmp_path)
        )
    assert contents(tmp_path) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
