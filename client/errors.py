"""All errors of the client, in one hierarchy.

JobledgerError
└── ClientError                     status, code, details and request_id are those of the response, if there is one
    ├── ApiUnavailableError         no connection, no response in time, or status 502, 503 or 504
    ├── RateLimitError              status 429
    ├── AuthenticationError         status 401: the key is missing, invalid, expired or revoked
    ├── ForbiddenError              status 403
    ├── NotFoundError               status 404
    ├── ConflictError               status 409 or 412: the state does not allow the action
    ├── InvalidRequestError         another status 4xx: the request is wrong
    ├── ServerError                 status 500 or 507
    ├── UnexpectedResponseError     the response does not come from a Jobledger API
    ├── CheckpointError             the saved position of `events` is damaged or in use
    ├── InvalidResultError          the result of a job does not fit the type that the job function declares
    ├── JobFailedError              `result` was called for a job that failed
    ├── JobCancelledError           `result` was called for a job that was cancelled
    └── WaitTimeoutError            the job or batch is not finished in time (also a TimeoutError)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobledger.client.models import Job
from jobledger.ledger.domain.errors import JobledgerError


class ClientError(JobledgerError):
    """The base class of all errors of the client.

    Attributes:
        message: What is wrong and how to fix it, for people.
        status: The HTTP status. None if there was no response.
        code: The error code of the API, such as `job_not_found`, for programs. None if the API did not send one.
        details: More data of the API. `details["errors"]` lists each wrong field with its path.
        request_id: The ID of the request in the log of the server.
        retry_after: Seconds after which a retry may succeed, from the header `Retry-After`.
        is_transient: Whether a retry may help. The client has already retried.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        is_transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.details = dict(details or {})
        self.request_id = request_id
        self.retry_after = retry_after
        self.is_transient = is_transient

    @property
    def is_response_lost(self) -> bool:
        """Whether the API may have executed the request, although it is not known."""
        return isinstance(self, ApiUnavailableError) and self.status in (None, 502, 504)


class ApiUnavailableError(ClientError):
    """The API cannot be reached, did not respond in time, or cannot serve the request now."""


class RateLimitError(ClientError):
    """The API accepts no more requests of this user now."""


class AuthenticationError(ClientError):
    """The API requires a key, or does not accept this one."""


class ForbiddenError(ClientError):
    """The user may read the job or batch, but not do this."""


class NotFoundError(ClientError):
    """The job, batch or file does not exist, or the user may not read it."""


class ConflictError(ClientError):
    """The state of the job or batch does not allow the action."""


class InvalidRequestError(ClientError):
    """The request is wrong: `details["errors"]` lists each wrong field."""


class ServerError(ClientError):
    """The API failed. Its log has the details under `request_id`."""


class UnexpectedResponseError(ClientError):
    """The response does not come from a Jobledger API: the URL or a proxy is wrong."""


class CheckpointError(ClientError):
    """The saved position of `events` cannot be used."""


class InvalidResultError(ClientError):
    """The result of a job does not fit the type that its job function declares. `job` is the job."""

    def __init__(self, message: str, job: Job) -> None:
        super().__init__(message)
        self.job = job


class JobFailedError(ClientError):
    """The job failed. `code` and `details` are those of the job's error, and `job` is the job."""

    def __init__(self, job: Job) -> None:
        error = job.error
        code, reason = (error.code, error.message) if error else ("", "")
        super().__init__(
            f"Job {job.job_id} failed: {code}: {reason}", code=code, details=error.details if error else None
        )
        self.job = job


class JobCancelledError(ClientError):
    """The job was cancelled. `job` is the job."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"Job {job.job_id} was cancelled.")
        self.job = job


class WaitTimeoutError(ClientError, TimeoutError):
    """The job or batch was not finished in time. It continues."""
