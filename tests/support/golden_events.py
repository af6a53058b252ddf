"""Golden events: one stored event of every type that all later versions must be able to read.

`python -m tests.support.golden_events` records the types that have no golden event. Golden events are never
overwritten: a changed payload gets a higher schema number and another file.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path

from bson import ObjectId, json_util

from jobledger.ledger.domain.delivery import build_delivery_id
from jobledger.ledger.domain.events import (
    BATCH_EVENTS,
    DELIVERY_EVENTS,
    JOB_EVENTS,
    WORKER_EVENTS,
    Event,
    PositionVoided,
)
from jobledger.ledger.domain.worker import build_worker_stream
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.support.event_examples import EVENT_EXAMPLES, NOON
from tests.support.ledger_setup import EVENT_METADATA, create_position_gap, load_event_documents, open_ledger

GOLDEN_DIRECTORY = Path(__file__).parents[1] / "golden"


def golden_path(event: type[Event], directory: Path = GOLDEN_DIRECTORY) -> Path:
    return directory / f"{event.__name__}.{event.schema_version}.json"


def load_golden_events(directory: Path = GOLDEN_DIRECTORY) -> list[Document]:
    driver_options = json_util.JSONOptions(tz_aware=True, tzinfo=UTC)
    texts = [path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.json"))]
    return [json_util.loads(text, json_options=driver_options) for text in texts]


def write_golden_event(document: Document, path: Path) -> None:
    """Write a golden event.

    Raises:
        FileExistsError: The golden event exists. It is never overwritten.
    """
    text = json_util.dumps(document, json_options=json_util.CANONICAL_JSON_OPTIONS, indent=2, ensure_ascii=False)
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")


async def record_golden_events(uri: str, examples: Sequence[Event], directory: Path = GOLDEN_DIRECTORY) -> None:
    """Append the examples to a log and record the stored documents."""
    async with open_ledger(Connection(uri, "golden"), with_change_stream=False) as ledger:
        for stream, event_types in (
            (create_job_id(), JOB_EVENTS),
            (create_batch_id(), BATCH_EVENTS),
            (build_delivery_id(create_job_id(), 5), DELIVERY_EVENTS),
            (build_worker_stream(f"host-{ObjectId()}"), WORKER_EVENTS),
        ):
            if events := [example for example in examples if type(example) in event_types]:
                await ledger.event_store.append(StreamAppend(stream, StreamHead(), events, EVENT_METADATA, NOON))
        if any(isinstance(example, PositionVoided) for example in examples):
            await create_position_gap(ledger.db)
            after = await ledger.event_store.read_head_position()
            await ledger.event_store.append(
                StreamAppend("job-after-gap", StreamHead(), EVENT_EXAMPLES[:1], EVENT_METADATA, NOON)
            )
            await ledger.event_store.read(after=after)
        paths = {type(example).__name__: golden_path(type(example), directory) for example in examples}
        for document in await load_event_documents(ledger.db, {"stream": {"$ne": "job-after-gap"}}):
            write_golden_event(document, paths[document["type"]])


if __name__ == "__main__":
    new = [example for example in EVENT_EXAMPLES if not golden_path(type(example)).exists()]
    with tempfile.TemporaryDirectory() as data, EmbeddedServer.start(Path(data)) as server:
        asyncio.run(record_golden_events(server.uri, new))
    sys.stdout.write(f"recorded: {', '.join(type(example).__name__ for example in new) or 'none'}\n")
