"""Check which jobs a program has submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx
import orjson
from pydantic_core import to_jsonable_python

from jobledger.client.asynchronous.client import AsyncClient
from jobledger.client.synchronous.client import Client
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id
from jobledger.workers.job_types.function import JobFunction

_URL: Final = "http://recording.invalid"
_JOBS_PATH: Final = "/api/events/jobs"
_BATCHES_PATH: Final = "/api/events/batches"
_MAX_LISTED: Final = 20
_MAX_PARAMETER_CHARACTERS: Final = 300


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was submitted."""

    job_id: str
    job_type: str
    parameters: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the request, such as `job_name` and `priority`, and the idempotency `key`, if it was recorded."""

    def __str__(self) -> str:
        text = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.job_type}({text[:_MAX_PARAMETER_CHARACTERS]})"


class HasSubmissions(Protocol):
    """Knows which jobs were submitted: a `Ledger`, a `RecordingClient` or an `AsyncRecordingClient`."""

    def list_submitted(self) -> Sequence[Submitted]:
        """Return all submitted jobs in order."""


def assert_submitted(
    source: HasSubmissions | Client,
    job: JobFunction[..., Any] | str,
    *,
    parameters: Mapping[str, Any] | None = None,
    count: int | None = None,
) -> Sequence[Submitted]:
    """Check that jobs were submitted, and return them.

    Args:
        source: The fixture `ledger`, a client of the API, a `RecordingClient` or an `AsyncRecordingClient`.
        job: A job function, or the name of a job type.
        parameters: Parameters that the jobs must have. They may have others as well. Values may be JSON, or what the
            job function accepts, such as a `Decimal`.
        count: How many there must be. Default: at least one. 0: none.

    Raises:
        AssertionError: There are others. The message lists what was submitted.
        TypeError: `job` is neither a job function nor text.
    """
    if not isinstance(job, JobFunction | str):
        raise TypeError(f"expected a job function or the name of a job type, not {job!r}")
    name = job.name if isinstance(job, JobFunction) else job
    expected = to_jsonable_python(dict(parameters or {}))
    if isinstance(source, Client) and not isinstance(source, RecordingClient):
        submitted = _list_jobs(source)
    else:
        submitted = source.list_submitted()
    found = [it for it in submitted if it.job_type == name and _contains(it.parameters, expected)]
    if len(found) == count or (count is None and found):
        return found
    wanted = "at least 1" if count is None else str(count)
    with_parameters = f" with the parameters {expected!r}" if expected else ""
    lines = [f"expected {wanted} submitted jobs of the type {name!r}{with_parameters}, found {len(found)}"]
    lines.append("Submitted:" if submitted else "No jobs were submitted.")
    lines += [f"- {it}" for it in submitted[:_MAX_LISTED]]
    if len(submitted) > _MAX_LISTED:
        lines.append(f"- … and {len(submitted) - _MAX_LISTED} more")
    raise AssertionError("\n".join(lines))


def _list_jobs(client: Client) -> Sequence[Submitted]:
    jobs = client.iter_jobs(include=["parameters"], oldest_first=True)
    return [Submitted(job.job_id, job.job_type, job.parameters) for job in jobs]


def _contains(parameters: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(name in parameters and parameters[name] == value for name, value in expected.items())


class _Recorder:
    """Responds to the requests of a client like the API, and records the jobs."""

    def __init__(self) -> None:
        self.submitted: list[Submitted] = []
        self._responses: dict[tuple[str, str], dict[str, Any]] = {}

    def respond(self, request: httpx.Request) -> httpx.Response:
        """Return the response to a request."""
        path = request.url.path
        if request.method != "POST" or path not in (_JOBS_PATH, _BATCHES_PATH):
            message = "This client only records submissions: use the fixture `ledger` to run jobs."
            return httpx.Response(501, json={"status": "error", "code": "not_implemented", "message": message})
        key, body = request.headers["Idempotency-Key"], orjson.loads(request.content)
        if (path, key) not in self._responses:  # otherwise, the API returns the first one again
            self._responses[path, key] = self._record(path, key, body)
        return httpx.Response(201, json={"status": "success", **self._responses[path, key]})

    def _record(self, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == _JOBS_PATH:
            return {"job_id": self._record_job(body, {}, {"key": key})}
        jobs, defaults = body.pop("jobs"), body.pop("parameters", {})
        job_ids = [self._record_job(job, defaults, {"key": key, **body}) for job in jobs]
        return {"batch_id": create_batch_id(), "job_ids": job_ids}

    def _record_job(self, body: dict[str, Any], defaults: dict[str, Any], options: dict[str, Any]) -> str:
        job_type, parameters = body.pop("job_type"), {**defaults, **body.pop("parameters", {})}
        self.submitted.append(Submitted(create_job_id(), job_type, parameters, {**options, **body}))
        return self.submitted[-1].job_id


class RecordingClient(Client):
    """A client that records submissions instead of sending them. Pass it to code that calls `submit` or `submit_many`.

    Arguments are checked as by `jobledger.Client`. Other requests, such as that of `result`, raise an error.
    """

    def __init__(self) -> None:
        self._recorder = _Recorder()
        super().__init__(_URL, http=httpx.Client(transport=httpx.MockTransport(self._recorder.respond)))

    def list_submitted(self) -> Sequence[Submitted]:
        """Return all submitted jobs in order."""
        return list(self._recorder.submitted)


class AsyncRecordingClient(AsyncClient):
    """As `RecordingClient`, for code that uses `jobledger.AsyncClient`."""

    def __init__(self) -> None:
        self._recorder = _Recorder()
        super().__init__(_URL, http=httpx.AsyncClient(transport=httpx.MockTransport(self._recorder.respond)))

    def list_submitted(self) -> Sequence[Submitted]:
        """Return all submitted jobs in order."""
        return list(self._recorder.submitted)
