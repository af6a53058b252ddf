"""What the client does with jobs and batches in the same way: their paths, and how they are read from responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from jobledger.client.models import Batch, Job, WebhookSecret
from jobledger.client.responses import build_unexpected_content_error, read_model, read_models
from jobledger.ledger.domain.events import Asset, ResultFile

_FILES_PATH: Final = "/api/events/files/"
Snapshot_co = TypeVar("Snapshot_co", Job, Batch, covariant=True)


@dataclass(frozen=True, slots=True)
class Resource(Generic[Snapshot_co]):
    """A job or a batch.

    Attributes:
        stream_id: Its ID.
        path: Its path in the API.
        stream_query: The query of the live stream for its events.
        read: Returns it from the content of a response.
    """

    stream_id: str
    path: str
    stream_query: Mapping[str, str]
    read: Callable[[Mapping[str, Any], str], Snapshot_co]


def create_job_resource(job_id: str) -> Resource[Job]:
    """Return the job with an ID."""
    return Resource(job_id, f"/api/events/jobs/{_quote_id(job_id)}", {"job_id": job_id}, _read_job)


def create_batch_resource(batch_id: str) -> Resource[Batch]:
    """Return the batch with an ID."""
    return Resource(batch_id, f"/api/events/batches/{_quote_id(batch_id)}", {"batch_id": batch_id}, _read_batch)


def _read_job(content: Mapping[str, Any], url: str) -> Job:
    return read_model(Job, content, "job", url)


def _read_batch(content: Mapping[str, Any], url: str) -> Batch:
    return read_model(Batch, content, "batch", url)


def _quote_id(resource_id: str) -> str:
    if not resource_id:
        raise ValueError(
            f"the ID of a job or batch is a text such as job-6b0c8f6e40646f410c6f4b58, got {resource_id!r}"
        )
    return quote(resource_id, safe="")


class SubmissionNotes(NamedTuple):
    """What the API returns once for a submission."""

    webhook_secrets: tuple[WebhookSecret, ...]
    warnings: tuple[str, ...]


NO_NOTES: Final = SubmissionNotes((), ())


def read_notes(content: Mapping[str, Any], url: str) -> SubmissionNotes:
    """Return what the API notes about a submission, from the response to it."""
    secrets = read_models(WebhookSecret, content, "webhook_secrets", url) if "webhook_secrets" in content else ()
    return SubmissionNotes(tuple(secrets), tuple(map(str, content.get("warnings", ()))))


def read_id(content: Mapping[str, Any], name: str, url: str) -> str:
    """Return an ID in a response.

    Raises:
        UnexpectedResponseError: It is missing.
    """
    resource_id = content.get(name)
    if not isinstance(resource_id, str):
        raise build_unexpected_content_error(url, f"{name}: not an ID")
    return resource_id


class RemoteFile(NamedTuple):
    """A result file of the API. `sha256` is its digest, if it is known."""

    path: str
    name: str
    sha256: str | None


def find_file(file: ResultFile | Asset | str) -> RemoteFile:
    """Return where the API has a file of the results. A text is its path in the results, or its URL."""
    text = file if isinstance(file, str) else file.url if isinstance(file, Asset) else file.path
    _, separator, quoted = text.partition(_FILES_PATH)
    quoted = quoted.partition("?")[0] if separator else quote(text, safe="/")
    name = unquote(quoted.rpartition("/")[2])
    is_valid = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    return RemoteFile(
        f"{_FILES_PATH}{quoted}", name if is_valid else "file", file.sha256 if isinstance(file, ResultFile) else None
    )
