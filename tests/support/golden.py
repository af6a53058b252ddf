"""tests: golden histories: stored events, one of every type, that every later version must still be able to read.

They are made once, by `python -m tests.support.golden`, which records the types that have none yet. What is recorded
is never overwritten: a payload that changed gets a higher schema number and a file of its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path

from bson import json_util

from jobledger.ledger.domain.delivery import name_of
from jobledger.ledger.domain.events import BATCH_EVENTS, DELIVERY_EVENTS, JOB_EVENTS, Event, PositionVoided
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.store.command_handler import new_batch_id, new_job_id
from jobledger.ledger.store.envelope import Append, Head
from tests.support.examples import EXAMPLES, NOON
from tests.support.ledgers import META, ledger_on, lose_a_ticket, stored

GOLDEN = Path(__file__).parents[1] / "golden"


def file_of(event: type[Event], directory: Path = GOLDEN) -> Path:
    return directory / f"{event.__name__}.{event.schema_version}.json"


def histories(directory: Path = GOLDEN) -> list[Document]:
    as_the_driver_reads = json_util.JSONOptions(tz_aware=True, tzinfo=UTC)
    texts = [path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.json"))]
    return [json_util.loads(text, json_options=as_the_driver_reads) for text in texts]


def write(document: Document, path: Path) -> None:
    """Keep a stored event for ever. Raises FileExistsError rather than overwrite one."""
    text = json_util.dumps(document, json_options=json_util.CANONICAL_JSON_OPTIONS, indent=2, ensure_ascii=False)
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")


async def record(uri: str, examples: Sequence[Event], directory: Path = GOLDEN) -> None:
    """Append the examples to a log, and keep what the database holds then."""
    async with ledger_on(Connection(uri, "golden"), live=False) as ledger:
        for stream, members in (
            (new_job_id(), JOB_EVENTS),
            (new_batch_id(), BATCH_EVENTS),
            (name_of("job-1", 5), DELIVERY_EVENTS),
        ):
            if events := [example for example in examples if type(example) in members]:
                await ledger.log.append(Append(stream, Head(), events, META, NOON))
        if any(isinstance(example, PositionVoided) for example in examples):
            await lose_a_ticket(ledger.db)
            after = await ledger.log.head()
            await ledger.log.append(Append("job-behind-the-hole", Head(), EXAMPLES[:1], META, NOON))
            await ledger.log.read(after=after)
        wanted = {type(example).__name__: file_of(type(example), directory) for example in examples}
        for document in await stored(ledger.db, {"stream": {"$ne": "job-behind-the-hole"}}):
            write(document, wanted[document["type"]])


if __name__ == "__main__":
    new = [example for example in EXAMPLES if not file_of(type(example)).exists()]
    with tempfile.TemporaryDirectory() as data, EmbeddedServer.start(Path(data)) as server:
        asyncio.run(record(server.uri, new))
    sys.stdout.write(f"recorded: {', '.join(type(example).__name__ for example in new) or 'nothing was missing'}\n")
