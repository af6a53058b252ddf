"""One job: read it, wait for its result, follow it, and change it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel

from jobledger.client.asynchronous.event_stream import AsyncEventStream, AsyncFollowFeed
from jobledger.client.asynchronous.files import download_file
from jobledger.client.asynchronous.transport import DELETE_SECONDS, Answer, AsyncTransport
from jobledger.client.errors import JobCancelledError, JobFailedError
from jobledger.client.events import get_type_names
from jobledger.client.models import Job, JobLogEntry
from jobledger.client.resources import NO_NOTES, RemoteFile, SubmissionNotes, create_job_resource
from jobledger.client.responses import read_models
from jobledger.client.submission import get_seconds, remove_none
from jobledger.ledger.domain.events import AccessControl, Event

R = TypeVar("R")
_PAGE_ENTRIES: Final = "1000"


class AsyncJobHandle(Generic[R]):
    """A submitted job. Creating a handle sends no request.

    Attributes:
        job_id: The ID of the job.
        webhook_secrets: Signing secrets of endpoints that the submission used for the first time. Save them: the API
            does not show them again.
        warnings: What the API notes about the submission.
    """

    def __init__(
        self,
        transport: AsyncTransport,
        job_id: str,
        read_result: Callable[[Job], R],
        *,
        notes: SubmissionNotes = NO_NOTES,
    ) -> None:
        self.job_id: Final = job_id
        self.webhook_secrets: Final = notes.webhook_secrets
        self.warnings: Final = notes.warnings
        self._transport = transport
        self._read_result = read_result
        self._resource = create_job_resource(job_id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job_id}>"

    async def get(self) -> Job:
        """Return the job as it is now.

        Raises:
            NotFoundError: It does not exist, or the user may not read it.
        """
        return self._read(await self._transport.get(self._resource.path))

    async def wait(self, timeout: float | timedelta | None = None) -> Job:
        """Return the job when it is finished, whatever its status then is.

        Args:
            timeout: The time to wait. None: there is no limit.

        Raises:
            WaitTimeoutError: The job is not finished in time.
        """
        return await self._transport.wait_until_finished(self._resource, get_seconds(timeout))

    async def result(self, timeout: float | timedelta | None = None) -> R:
        """Return the result of the job when it is completed.

        A job that was submitted by its function returns what the function returned, with the declared type. Any other
        job returns its `Results`.

        Args:
            timeout: The time to wait. None: there is no limit.

        Raises:
            JobFailedError: The job failed.
            JobCancelledError: The job was cancelled.
            InvalidResultError: The result does not fit the declared type.
            WaitTimeoutError: The job is not finished in time.
        """
        job = await self.wait(timeout)
        if job.status == "failed":
            raise JobFailedError(job)
        if job.status == "cancelled":
            raise JobCancelledError(job)
        return self._read_result(job)

    def follow(self, *, types: Collection[type[Event] | str] | None = None, after: int = 0) -> AsyncEventStream:
        """Return the events of the job, from its submission until it is finished.

        Args:
            types: Only events of these types.
            after: Only events after this position of the log.
        """
        feed = AsyncFollowFeed(self._transport, self._resource, after=after)
        return AsyncEventStream(feed, get_type_names(types))

    async def logs(self) -> AsyncIterator[JobLogEntry]:
        """Yield all log entries of the job, page by page."""
        query = {"limit": _PAGE_ENTRIES}
        while True:
            answer = await self._transport.get(f"{self._resource.path}/logs", query)
            for entry in read_models(JobLogEntry, answer.content, "logs", answer.url):
                yield entry
            if (version := answer.content.get("next_after_version")) is None:
                return
            query["after_version"] = str(version)

    async def cancel(self, *, reason: str | None = None) -> Job:
        """Cancel the job. A running job has `cancel_requested` until its worker has stopped it.

        Raises:
            ConflictError: The job is finished.
        """
        return await self._act("cancel", {"reason": reason})

    async def restart(
        self,
        *,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        reuse_steps: bool = True,
        reason: str | None = None,
        if_version: int | None = None,
    ) -> Job:
        """Restart the finished job.

        Args:
            parameters: New parameters, all of them. None: the job keeps its parameters.
            reuse_steps: False: repeat completed steps.
            reason: Why. It is recorded.
            if_version: The job must have this version.

        Raises:
            ConflictError: The job is not finished, or has another version.
            InvalidRequestError: The parameters are invalid.
        """
        body = {"parameters": parameters, "reuse_steps": reuse_steps, "reason": reason}
        return await self._act("restart", body, if_version)

    async def update(
        self,
        *,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        priority: int | None = None,
        not_before: datetime | None = None,
        access_control: AccessControl | Mapping[str, Any] | None = None,
        if_version: int | None = None,
    ) -> Job:
        """Change the pending job. Its access control can be changed at any time.

        Args:
            parameters: New parameters, all of them.
            priority: The new priority.
            not_before: The job does not start before this time.
            access_control: Who else may read or change the job.
            if_version: The job must have this version.

        Raises:
            ConflictError: The job is not pending, or has another version.
        """
        body = {
            "parameters": parameters,
            "priority": priority,
            "not_before": not_before,
            "access_control": access_control,
        }
        return self._read(
            await self._transport.change("PUT", self._resource.path, remove_none(body), if_version=if_version)
        )

    async def archive(self, *, reason: str | None = None) -> Job:
        """Archive the job: lists show it only on request."""
        return await self._act("archive", {"reason": reason})

    async def unarchive(self, *, reason: str | None = None) -> Job:
        """Show the job in lists again."""
        return await self._act("unarchive", {"reason": reason})

    async def delete(self) -> None:
        """Delete the job and its files. A running job is cancelled first."""
        await self._transport.change("DELETE", self._resource.path, timeout=DELETE_SECONDS)

    async def download_archive(self, to: str | PathLike[str]) -> Path:
        """Save the result files of the job as a ZIP file, and return its path.

        Raises:
            ConflictError: There are no result files.
        """
        path = f"{self._resource.path}/download-archive"
        return await download_file(self._transport, RemoteFile(path, f"{self.job_id}.zip", None), Path(to))

    async def _act(self, action: str, body: Mapping[str, Any], if_version: int | None = None) -> Job:
        path = f"{self._resource.path}/{action}"
        return self._read(await self._transport.change("POST", path, remove_none(body), if_version=if_version))

    def _read(self, answer: Answer) -> Job:
        return self._resource.read(answer.content, answer.url)
