"""Event types: each event survives a BSON round trip, and every event that was ever stored is readable."""

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
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from tests.support import golden_events
from tests.support.decider_spec import type_name
from tests.support.event_examples import EVENT_EXAMPLES, NOON
from tests.support.ledger_setup import check_chain
from tests.support.strategies import event_instances

DRIVER_CODEC = CodecOptions[dict[str, Any]](tz_aware=True, tzinfo=UTC)
ALL_EVENT_TYPES = sorted(EVENT_TYPES.values(), key=lambda event: event.__name__)


def build_document(event: Event) -> dict[str, Any]:
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
    return {**document, "hash": sha256(build_hash_input(document)).digest()}


def round_trip_bson(document: dict[str, Any]) -> dict[str, Any]:
    return bson.decode(bson.encode(document), DRIVER_CODEC)


@pytest.mark.parametrize("event", EVENT_EXAMPLES, ids=type_name)
def test_example_event_survives_bson_round_trip(event: Event) -> None:
    stored = round_trip_bson(build_document(event))
    check_chain([stored])
    assert RecordedEvent(stored).event == event
    assert RecordedEvent(stored).meta == EventMetadata("user:alice", "batch-1", "01a209d5", "00-4bf9-00f0-01")


@pytest.mark.parametrize("kind", ALL_EVENT_TYPES, ids=type_name)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_generated_event_survives_bson_round_trip(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(event_instances(kind))
    stored = round_trip_bson(build_document(event))
    check_chain([stored])
    assert RecordedEvent(stored).event == event
    assert RecordedEvent(stored).event.to_payload() == event.to_payload()


def test_payload_omits_optional_fields_that_were_not_given() -> None:
    assert EVENT_TYPES["JobCancelled"](by="user:alice").to_payload() == {"by": "user:alice"}
    assert EVENT_TYPES["JobUpdated"].model_validate({"by": "user:alice", "parameters": {}}).to_payload() == {
        "by": "user:alice",
        "parameters": {},
    }


def test_payload_keeps_required_field_with_none() -> None:
    step = {"attempt": 1, "step": "page", "key": "k", "output": None, "duration_s": 0.0}
    assert EVENT_TYPES["StepCompleted"].model_validate(step).to_payload()["output"] is None


def test_event_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        EVENT_EXAMPLES[1].attempt = 2  # type: ignore[attr-defined]  # the event is frozen


def test_every_event_type_has_an_example() -> None:
    assert {type(example) for example in EVENT_EXAMPLES} == set(EVENT_TYPES.values())


# Golden events ----------------------------------------------------------------------------------------------------

GOLDEN = golden_events.load_golden_events()


@pytest.mark.parametrize("kind", ALL_EVENT_TYPES, ids=type_name)
def test_every_event_type_has_a_golden_event(kind: type[Event]) -> None:
    assert golden_events.golden_path(kind).exists(), "record it: python -m tests.support.golden_events"


@pytest.mark.parametrize("document", GOLDEN, ids=lambda document: f"{document['type']}.{document['schema']}")
def test_golden_event_is_readable(document: dict[str, Any]) -> None:
    event = RecordedEvent(document)
    assert event.type == document["type"]
    assert (event.position, event.version, event.stream) == (document["_id"], document["version"], document["stream"])
    assert event.hash == document["hash"]
    assert event.meta.to_document() == document["meta"]
    if document["schema"] == event.event.schema_version:
        assert_contains(event.event.to_payload(), document["data"])


def assert_contains(current: Any, stored: Any) -> None:
    """Check that no stored field is dropped or read differently. New fields are allowed."""
    if isinstance(stored, dict):
        for name, value in stored.items():
            assert name in current, f"{name} is no longer read"
            assert_contains(current[name], value)
    elif isinstance(stored, list):
        assert len(current) == len(stored)
        for current_item, stored_item in zip(current, stored, strict=True):
            assert_contains(current_item, stored_item)
    else:
        assert current == stored


def test_hash_chains_of_golden_events_verify() -> None:
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


async def test_recording_never_overwrites_golden_event(mongodb_uri: str, tmp_path: Path) -> None:
    await golden_events.record_golden_events(mongodb_uri, EVENT_EXAMPLES[:2], tmp_path)
    before = read_files(tmp_path)
    assert sorted(before) == ["JobClaimed.1.json", "JobSubmitted.1.json"]
    with pytest.raises(FileExistsError):
        golden_events.write_golden_event(
            GOLDEN[0] | {"time": datetime.now(UTC)}, golden_events.golden_path(type(EVENT_EXAMPLES[0]), tmp_path)
        )
    assert read_files(tmp_path) == before


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
