"""Build the body of a webhook message. It reflects the log at the end of the job or batch, so it is always the same.

Only files are read in their current state. If a file was deleted since, it is left out and `warnings` contains a note.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.errors import FileLost, JobledgerError
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import batches, jobs
from jobledger.projections.views.files import prefix_result_urls

SCHEMA_VERSION: Final = 1
_MAX_MARKDOWN_BYTES: Final = 8 * 1024 * 1024
_JOB_FIELDS: Final = (
    *("job_id", "job_type", "job_name", "status", "created_at", "started_at", "completed_at", "parameters", "batch_id"),
    *("results", "error", "attempt", "retries", "priority", "user_id", "version"),
)
_BATCH_FIELDS: Final = (
    *("batch_id", "batch_name", "status", "created_at", "completed_at", "total_jobs", "job_ids", "parameters"),
    *("summary", "user_id", "version"),
)


class BodyUnavailable(JobledgerError):
    """The body of a webhook cannot be built from the log."""


async def build_body(
    event_store: EventStore,
    file_store: FileStore,
    delivery_id: str,
    delivery: Delivery,
    *,
    sequence: int,
    endpoint_id: str,
    base_url: str,
) -> bytes:
    """Return the body as JSON in UTF-8. `docs/how-to/webhooks.md` contains an example.

    Args:
        sequence: Rank of the delivery among those of its endpoint, from 1.
        base_url: URL of the API, without a slash at the end.

    Raises:
        BodyUnavailable: The job or batch is not in the log, or cannot be represented as JSON.
        UnreadableEvent: An event of its stream is damaged, or a newer version of Jobledger wrote it.
        LedgerUnavailable: The event store or the result store cannot be read.
    """
    spec = delivery.spec
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "type": spec.event_type,
        "delivery_id": delivery_id,
        "endpoint_id": endpoint_id,
        "sequence": sequence,
        "deliveries_url": f"{base_url}/api/monitoring/events/webhooks?endpoint_id={endpoint_id}",
    }
    if spec.source.startswith("job-"):
        body |= await _build_job_content(event_store, file_store, delivery, urlsplit(base_url).path)
    elif spec.source.startswith("batch-"):
        body |= await _build_batch_content(event_store, delivery)
    try:
        return orjson.dumps(body, option=orjson.OPT_UTC_Z)
    except TypeError as error:
        raise BodyUnavailable(f"{spec.source} cannot be represented as JSON: {error}") from error


async def _build_job_content(
    event_store: EventStore, file_store: FileStore, delivery: Delivery, prefix: str
) -> dict[str, Any]:
    spec, job = delivery.spec, None
    for event in await event_store.read_stream(spec.source, limit=spec.source_version):
        job = jobs.fold(job, event)
    if job is None:
        raise BodyUnavailable(f"{spec.source} is not in the log")
    content: dict[str, Any] = {"timestamp": job["completed_at"], "job": {name: job[name] for name in _JOB_FIELDS}}
    metadata: Document = {}
    if job["results"] is not None:
        metadata = job["results"]["metadata"]
        results = prefix_result_urls(prefix, job["results"])
        content["job"]["results"] = {name: value for name, value in results.items() if name != "metadata"}
    if spec.batch_id is not None and (submitted := await event_store.read_stream(spec.batch_id, limit=1)):
        content["batch"] = {"batch_id": spec.batch_id, "batch_name": submitted[0].data.get("batch_name")}
    if spec.webhook.include_markdown:
        content["markdown"], warnings = await _load_markdown(file_store, job)
        if warnings:
            content["warnings"] = warnings
    if spec.webhook.include_metadata:
        content["metadata"] = {**metadata, "steps": job["steps"]}
    if job["error"] is not None:
        content["error"] = content["job"]["error"] = _omit_traceback(job["error"])
    return content


def _omit_traceback(error: Document) -> Document:
    """Return an error without its traceback, which is for developers and may name paths of the worker's machine."""
    return {**error, "details": {name: value for name, value in error["details"].items() if name != "traceback"}}


async def _build_batch_content(event_store: EventStore, delivery: Delivery) -> dict[str, Any]:
    spec, batch, last_event = delivery.spec, None, None
    for event in await event_store.read_stream(spec.source, limit=spec.source_version):
        batch, last_event = batches.fold(batch, event), event
    if batch is None or last_event is None:
        raise BodyUnavailable(f"{spec.source} is not in the log")
    counts = last_event.data.get("counts", {})
    content = {name: batch[name] for name in _BATCH_FIELDS} | {
        f"{name}_jobs": number for name, number in counts.items()
    }
    content["summary"] = last_event.data.get("summary", batch["summary"])
    return {"timestamp": batch["completed_at"], "batch": content}


async def _load_markdown(file_store: FileStore, job: Document) -> tuple[str | None, list[str]]:
    results = job["results"] or {}
    main = results.get("markdown_file")
    file = next((file for file in results.get("files", ()) if main == f"/events/{file['path']}"), None)
    if file is None:
        return None, []
    if file["size"] > _MAX_MARKDOWN_BYTES:
        return None, [f"The Markdown is omitted: {file['size']} bytes exceed the limit for webhooks."]
    try:
        opened = await file_store.open(file["sha256"], file["size"])
        try:
            chunks = [chunk async for chunk in opened.read(0, opened.size)]
        finally:
            await opened.close()
    except FileLost:
        return None, ["The Markdown is omitted: it is no longer in the result store."]
    return b"".join(chunks).decode(errors="replace"), []
