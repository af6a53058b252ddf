# Generated from client/asynchronous/batches.py by `make reference`. Change that file instead.
"""One batch: read it, wait until it is finished, follow it, and change its jobs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Final, Unpack

from jobledger.client.events import get_type_names
from jobledger.client.models import Batch, BatchChange, Job
from jobledger.client.resources import NO_NOTES, RemoteFile, SubmissionNotes, create_batch_resource
from jobledger.client.responses import read_model
from jobledger.client.submission import JobFilters, get_seconds, remove_none
from jobledger.client.synchronous.event_stream import EventStream, FollowFeed
from jobledger.client.synchronous.files import download_file
from jobledger.client.synchronous.lists import iterate_list
from jobledger.client.synchronous.transport import DELETE_SECONDS, Answer, Transport
from jobledger.ledger.domain.events import Event
from jobledger.ledger.domain.statuses import RestartScope


class BatchHandle:
    """A submitted batch. Creating a handle sends no request.

    Attributes:
        batch_id: The ID of the batch.
        job_ids: The IDs of its jobs in the order of submission. Empty for a handle that `submit_many` did not return.
        webhook_secrets: Signing secrets of endpoints that the submission used for the first time. Save them: the API
            does not show them again.
        warnings: What the API notes about the submission.
    """

    def __init__(
        self,
        transport: Transport,
        batch_id: str,
        *,
        job_ids: Sequence[str] = (),
        notes: SubmissionNotes = NO_NOTES,
    ) -> None:
        self.batch_id: Final = batch_id
        self.job_ids: Final = tuple(job_ids)
        self.webhook_secrets: Final = notes.webhook_secrets
        self.warnings: Final = notes.warnings
        self._transport = transport
        self._resource = create_batch_resource(batch_id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.batch_id}>"

    def get(self) -> Batch:
        """Return the batch as it is now.

        Raises:
            NotFoundError: It does not exist, or the user may not read it.
        """
        return self._read(self._transport.get(self._resource.path))

    def wait(self, timeout: float | timedelta | None = None) -> Batch:
        """Return the batch when all its jobs are finished, whatever their statuses then are.

        Args:
            timeout: The time to wait. None: there is no limit.

        Raises:
            WaitTimeoutError: The batch is not finished in time.
        """
        return self._transport.wait_until_finished(self._resource, get_seconds(timeout))

    def follow(self, *, types: Collection[type[Event] | str] | None = None, after: int = 0) -> EventStream:
        """Return the events of the batch and its jobs, from the submission until the batch is finished.

        Args:
            types: Only events of these types.
            after: Only events after this position of the log.
        """
        feed = FollowFeed(self._transport, self._resource, after=after)
        return EventStream(feed, get_type_names(types))

    def iter_jobs(self, *, page_size: int = 100, **filters: Unpack[JobFilters]) -> Iterator[Job]:
        """Yield the jobs of the batch that match all filters, newest first. Pages are read when they are needed."""
        return iterate_list(self._transport, f"{self._resource.path}/jobs", "jobs", Job, filters, page_size)

    def cancel(self, *, reason: str | None = None) -> BatchChange:
        """Cancel the unfinished jobs of the batch."""
        return self._act("cancel", {"reason": reason})

    def restart(
        self, *, only: RestartScope = "failed", reuse_steps: bool = True, reason: str | None = None
    ) -> BatchChange:
        """Restart finished jobs of the batch.

        Args:
            only: The jobs to restart, by their status, or `all`.
            reuse_steps: False: repeat completed steps.
            reason: Why. It is recorded.
        """
        return self._act("restart", {"only": only, "reuse_steps": reuse_steps, "reason": reason})

    def archive(self, *, reason: str | None = None) -> BatchChange:
        """Archive the batch and its jobs: lists show them only on request."""
        return self._act("archive", {"reason": reason})

    def unarchive(self, *, reason: str | None = None) -> BatchChange:
        """Show the batch and its jobs in lists again."""
        return self._act("unarchive", {"reason": reason})

    def pause(self, *, reason: str | None = None) -> None:
        """Start no more jobs of the batch. Running jobs continue."""
        self._transport.change("POST", f"{self._resource.path}/pause", remove_none({"reason": reason}))

    def resume(self, *, reason: str | None = None) -> None:
        """Start jobs of the batch again."""
        self._transport.change("POST", f"{self._resource.path}/resume", remove_none({"reason": reason}))

    def delete(self) -> None:
        """Delete the finished batch, its jobs and their files.

        Raises:
            ConflictError: The batch is not finished.
        """
        self._transport.change("DELETE", self._resource.path, timeout=DELETE_SECONDS)

    def download_archive(self, to: str | PathLike[str]) -> Path:
        """Save the result files of all jobs as a ZIP file, and return its path.

        Raises:
            ConflictError: There are no result files.
        """
        path = f"{self._resource.path}/download-archive"
        return download_file(self._transport, RemoteFile(path, f"{self.batch_id}.zip", None), Path(to))

    def _act(self, action: str, body: Mapping[str, Any]) -> BatchChange:
        answer = self._transport.change("POST", f"{self._resource.path}/{action}", remove_none(body))
        return read_model(BatchChange, {"content": answer.content}, "content", answer.url)

    def _read(self, answer: Answer) -> Batch:
        return self._resource.read(answer.content, answer.url)
