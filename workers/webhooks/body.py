"""workers: what the receiver of a webhook is told. It is made from the log as it was at the end: always the same.

Only files are read as they are now: what was deleted since is missing, and `warnings` says so.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from jobledger.ledger.domain.delivery import Delivery
from jobledger.ledger.domain.errors import FileLost, JobledgerError
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import batches, jobs
from jobledger.projections.views.files import prefix_result_urls

SCHEMA_VERSION: Final = 1
_LARGEST_MARKDOWN_BYTES: Final = 8 * 1024 * 1024
_OF_JOB: Final = (
    "job_id",
    "job_type",
    "job_name",
    "status",
    "created_at",
    "started_at",
    "completed_at",
    "parameters",
    "batch_id",
    "results",
    "error",
    "attempt",
    "retries",
    "priority",
    "user_id",
    "version",
)
_OF_BATCH: Final = (
    "batch_id",
    "batch_name",
    "status",
    "created_at",
    "completed_at",
    "total_jobs",
    "job_ids",
    "parameters",
    "summary",
    "user_id",
    "version",
)


class BodyUnavailable(JobledgerError):
    """What is to be told cannot be read from the log."""


async def build_body(
    log: EventStore,
    file_store: FileStore,
    delivery_id: str,
    delivery: Delivery,
    *,
    sequence: int,
    endpoint_id: str,
    base_url: str,
) -> bytes:
    """Return the body, JSON in UTF-8: `docs/how-to/webhooks.md` shows one. `base` is the address of the API.

    Raises:
        NotComposable: the job or batch is not in the log, or JSON cannot say it.
        UnreadableEvent: a later version of this program has written it.
        LedgerUnavailable: the log or the store cannot be read.
    """
    asked = delivery.spec
    body: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "type": asked.event_type,
        "delivery_id": delivery_id,
        "endpoint_id": endpoint_id,
        "sequence": sequence,
        "deliveries_url": f"{base_url}/api/monitoring/events/webhooks?endpoint_id={endpoint_id}",
    }
    if asked.source.startswith("job-"):
        body |= await _of_job(log, file_store, delivery, urlsplit(base_url).path)
    elif asked.source.startswith("batch-"):
        body |= await _of_batch(log, delivery)
    try:
        return orjson.dumps(body, option=orjson.OPT_UTC_Z)
    except TypeError as error:
        raise BodyUnavailable(f"{asked.source} cannot be written as JSON: {error}") from error


async def _of_job(log: EventStore, store: FileStore, delivery: Delivery, prefix: str) -> dict[str, Any]:
    asked, job = delivery.spec, None
    for event in await log.read_stream(asked.source, limit=asked.source_version):
        job = jobs.fold(job, event)
    if job is None:
        raise BodyUnavailable(f"{asked.source} is not in the log")
    told: dict[str, Any] = {"timestamp": job["completed_at"], "job": {name: job[name] for name in _OF_JOB}}
    metadata: Document = {}
    if job["results"] is not None:
        metadata = job["results"]["metadata"]
        results = prefix_result_urls(prefix, job["results"])
        told["job"]["results"] = {name: value for name, value in results.items() if name != "metadata"}
    if asked.batch_id is not None and (begun := await log.read_stream(asked.batch_id, limit=1)):
        told["batch"] = {"batch_id": asked.batch_id, "batch_name": begun[0].data.get("batch_name")}
    if asked.webhook.include_markdown:
        told["markdown"], warnings = await _markdown(store, job)
        if warnings:
            told["warnings"] = warnings
    if asked.webhook.include_metadata:
        told["metadata"] = {**metadata, "steps": job["steps"]}
    if job["error"] is not None:
        told["error"] = job["error"]
    return told


async def _of_batch(log: EventStore, delivery: Delivery) -> dict[str, Any]:
    asked, batch, last = delivery.spec, None, None
    for event in await log.read_stream(asked.source, limit=asked.source_version):
        batch, last = batches.fold(batch, event), event
    if batch is None or last is None:
        raise BodyUnavailable(f"{asked.source} is not in the log")
    counts = last.data.get("counts", {})
    told = {name: batch[name] for name in _OF_BATCH} | {f"{name}_jobs": number for name, number in counts.items()}
    told["summary"] = last.data.get("summary", batch["summary"])
    return {"timestamp": batch["completed_at"], "batch": told}


async def _markdown(store: FileStore, job: Document) -> tuple[str | None, list[str]]:
    results = job["results"] or {}
    main = results.get("markdown_file")
    file = next((it for it in results.get("files", ()) if main == f"/events/{it['path']}"), None)
    if file is None:
        return None, []
    if file["size"] > _LARGEST_MARKDOWN_BYTES:
        return None, [f"The Markdown is left out: {file['size']} bytes are too many for a webhook."]
    try:
        opened = await store.open(file["sha256"], file["size"])
        try:
            parts = [part async for part in opened.read(0, opened.size)]
        finally:
            await opened.close()
    except FileLost:
        return None, ["The Markdown is left out: it is not in the store any more."]
    return b"".join(parts).decode(errors="replace"), []
