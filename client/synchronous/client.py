# Generated from client/asynchronous/client.py by `make reference`. Change that file instead.
"""The client of the HTTP API for programs without an event loop.

with Client.from_env() as client:
    job = client.submit("session", {"url": …})
    results = job.result(timeout=600)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar, Unpack, overload

import httpx
from pydantic import BaseModel

from jobledger.client.checkpoint import FileCheckpoint, find_state_dir
from jobledger.client.events import check_position, get_type_names
from jobledger.client.models import Batch, Job, Results
from jobledger.client.resources import find_file, read_id, read_notes
from jobledger.client.responses import get_list, read_position
from jobledger.client.results import create_result_reader, read_results
from jobledger.client.settings import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    DEFAULT_URL,
    ClientSettings,
    Key,
    read_environment,
)
from jobledger.client.submission import (
    OPTION_NAMES,
    JobFilters,
    JobFunction,
    NewJob,
    SubmitOptions,
    Webhook,
    build_batch_body,
    split_arguments,
)
from jobledger.client.synchronous.batches import BatchHandle
from jobledger.client.synchronous.event_stream import EventStream, LiveFeed
from jobledger.client.synchronous.files import download_file, read_file
from jobledger.client.synchronous.jobs import JobHandle
from jobledger.client.synchronous.lists import iterate_list
from jobledger.client.synchronous.transport import Call, Transport
from jobledger.client.urls import check_path
from jobledger.ledger.domain.events import AccessControl, Asset, Event, ResultFile

P = ParamSpec("P")
R = TypeVar("R")
_MAX_READ_BYTES: Final = 64 * 1024 * 1024


class Client:
    """Submits jobs, returns their results, follows them, and changes them.

    Each request has a timeout, and is repeated after transient errors. A repeated change has no second effect. Reads
    show what this client has written before.

    Args:
        url: The URL of the API.
        key: An API key or token, or a function that returns the current one. It is called for each request.
        timeout: Seconds for one request, except waits, streams and files.
        max_retries: How often a request is repeated after a transient error.
        http: A client of httpx to use, for example with proxies or certificates of your own. You close it.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: Key = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_MAX_RETRIES,
        http: httpx.Client | None = None,
    ) -> None:
        self._transport = Transport(ClientSettings.create(url, key, timeout, max_retries), http)
        self._options: SubmitOptions = {}

    @classmethod
    def from_env(
        cls,
        *,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        max_retries: int = DEFAULT_MAX_RETRIES,
        http: httpx.Client | None = None,
    ) -> Self:
        """Return a client for the URL in JOBLEDGER_URL with the key in JOBLEDGER_KEY, as the commands use them.

        Args:
            timeout: As for the class.
            max_retries: As for the class.
            http: As for the class.

        Raises:
            ConfigurationError: A variable is invalid.
        """
        url, key = read_environment(os.environ)
        return cls(url, key=key, timeout=timeout, max_retries=max_retries, http=http)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._transport.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    # Submit -------------------------------------------------------------------------------------------------------

    def with_options(self, **options: Unpack[SubmitOptions]) -> Self:
        """Return this client with other defaults for the options of `submit`. Both use the same connections.

        Type checkers cannot see options beside the parameters of a job function. They do see them here:
        `client.with_options(key="inv-4711", priority=5).submit(invoice, customer="x")`.
        """
        if unknown := sorted(options.keys() - OPTION_NAMES):
            raise TypeError(f"there is no option {unknown[0]!r}; options are {', '.join(sorted(OPTION_NAMES))}")
        other = copy.copy(self)
        other._options = {**self._options, **options}
        return other

    @overload
    def submit(self, job: JobFunction[P, R], /, *args: P.args, **kwargs: P.kwargs) -> JobHandle[R]: ...

    @overload
    def submit(
        self, job: str, /, parameters: Mapping[str, Any] | BaseModel, **options: Unpack[SubmitOptions]
    ) -> JobHandle[Results]: ...

    def submit(self, job: JobFunction[..., Any] | str, /, *args: Any, **kwargs: Any) -> JobHandle[Any]:
        """Submit a job: by its function with arguments, or by its job type with parameters.

        Args:
            job: A function made by `jobledger.job`, or the name of a job type.
            args: Arguments of the function, or the parameters of the job type as one mapping or model.
            kwargs: Arguments of the function, and options (`SubmitOptions`). A name of an argument is never an option.

        Raises:
            InvalidRequestError: The parameters or options are invalid.
            ClientError: The job was not submitted, or the client cannot know whether it was. A repeated call with
                the same `key` submits it once.
        """
        read_result: Callable[[Job], Any] = read_results
        if isinstance(job, str):
            job_type, options = job, kwargs
            parameters = options.pop("parameters", None) if not args else args[0]
            if len(args) > 1 or not isinstance(parameters, Mapping | BaseModel):
                raise TypeError("submit() with a job type expects its parameters as one mapping: submit(type, {…})")
        else:
            arguments, options = split_arguments(job, kwargs)
            job_type, parameters = job.name, job.bind(*args, **arguments)
            read_result = create_result_reader(job.result_type)
        options = {**self._options, **options}
        key = options.pop("key", None)
        body = NewJob(job_type, parameters, **options).to_body()
        answer = self._transport.change("POST", "/api/events/jobs", body, key=key)
        job_id, notes = read_id(answer.content, "job_id", answer.url), read_notes(answer.content, answer.url)
        return JobHandle(self._transport, job_id, read_result, notes=notes)

    def submit_many(
        self,
        jobs: Iterable[NewJob | Mapping[str, Any]],
        *,
        name: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        key: str | None = None,
        on_end: Webhook | None = None,
        user_id: str | None = None,
        access_control: AccessControl | Mapping[str, Any] | None = None,
    ) -> BatchHandle:
        """Submit up to 10,000 jobs as one batch: all of them or none.

        Args:
            jobs: The jobs, or bodies of jobs as the API defines them.
            name: A name for people.
            parameters: Defaults for the parameters of each job.
            key: Makes the submission repeatable, as for `submit`.
            on_end: Where to send a message when all jobs are finished.
            user_id: The owner, if an administrator submits for another user.
            access_control: Who else may read or change the batch and its jobs.

        Raises:
            ValueError: There are no jobs, or more than 10,000.
            InvalidRequestError: A job is invalid. No job is submitted.
        """
        body = build_batch_body(
            jobs, name=name, parameters=parameters, on_end=on_end, user_id=user_id, access_control=access_control
        )
        answer = self._transport.change("POST", "/api/events/batches", body, key=key)
        batch_id, notes = read_id(answer.content, "batch_id", answer.url), read_notes(answer.content, answer.url)
        job_ids = get_list(answer.content, "job_ids", answer.url)
        return BatchHandle(self._transport, batch_id, job_ids=job_ids, notes=notes)

    # Jobs and batches ---------------------------------------------------------------------------------------------

    @overload
    def job(self, job_id: str, function: JobFunction[..., R]) -> JobHandle[R]: ...

    @overload
    def job(self, job_id: str, function: None = None) -> JobHandle[Results]: ...

    def job(self, job_id: str, function: JobFunction[..., Any] | None = None) -> JobHandle[Any]:
        """Return a handle of a job. Sends no request.

        Args:
            job_id: The ID of the job.
            function: The function of the job type, so that `result` has its type.
        """
        read_result = read_results if function is None else create_result_reader(function.result_type)
        return JobHandle(self._transport, job_id, read_result)

    def batch(self, batch_id: str) -> BatchHandle:
        """Return a handle of a batch. Sends no request."""
        return BatchHandle(self._transport, batch_id)

    def get(self, job_id: str) -> Job:
        """Return a job as it is now.

        Raises:
            NotFoundError: It does not exist, or the user may not read it.
        """
        return self.job(job_id).get()

    def result(self, job_id: str, timeout: float | timedelta | None = None) -> Results:
        """Return the results of a job when it is completed: see `JobHandle.result`."""
        return self.job(job_id).result(timeout)

    def cancel(self, job_id: str, *, reason: str | None = None) -> Job:
        """Cancel a job: see `JobHandle.cancel`."""
        return self.job(job_id).cancel(reason=reason)

    def restart(
        self,
        job_id: str,
        *,
        parameters: Mapping[str, Any] | BaseModel | None = None,
        reuse_steps: bool = True,
        reason: str | None = None,
    ) -> Job:
        """Restart a finished job, with other parameters if they are given: see `JobHandle.restart`."""
        return self.job(job_id).restart(parameters=parameters, reuse_steps=reuse_steps, reason=reason)

    def iter_jobs(self, *, page_size: int = 100, **filters: Unpack[JobFilters]) -> Iterator[Job]:
        """Yield the jobs that match all filters, newest first. Pages are read when they are needed.

        Large fields are left out, and named in `Job.omitted`. `include` requests them.
        """
        return iterate_list(self._transport, "/api/events/jobs", "jobs", Job, filters, page_size)

    def iter_batches(
        self,
        *,
        page_size: int = 100,
        status: str | None = None,
        user_id: str | None = None,
        archived: bool | None = None,
        q: str | None = None,
        oldest_first: bool = False,
    ) -> Iterator[Batch]:
        """Yield the batches that match all filters, newest first. Pages are read when they are needed."""
        filters = {"status": status, "user_id": user_id, "archived": archived, "q": q, "oldest_first": oldest_first}
        return iterate_list(self._transport, "/api/events/batches", "batches", Batch, filters, page_size)

    # Events -------------------------------------------------------------------------------------------------------

    def follow(self, job_id: str, *, types: Collection[type[Event] | str] | None = None, after: int = 0) -> EventStream:
        """Return the events of a job, from its submission until it is finished: see `JobHandle.follow`."""
        return self.job(job_id).follow(types=types, after=after)

    def events(
        self,
        *,
        name: str | None = None,
        types: Collection[type[Event] | str] | None = None,
        after: int | None = None,
        state_dir: str | PathLike[str] | None = None,
    ) -> EventStream:
        """Return all events that the user may see: those of the past, and then new ones. It does not end.

        With a name, a file keeps the position, and the next call with this name continues there. An event counts as
        processed when the next one is requested. So after a crash, the events of the last second are returned again.

        Args:
            name: The name of this reader. One process at a time may use it.
            types: Only events of these types.
            after: Start after this position; 0 is the beginning of the log. Default: the saved position, otherwise 0.
            state_dir: The directory of the file. Default: JOBLEDGER_STATE_DIR, otherwise `~/.local/state/jobledger`.

        Raises:
            ValueError: A type or the name is invalid.
            CheckpointError: Another process uses this name, or its file is damaged.
        """
        names, checkpoint, after = get_type_names(types), None, None if after is None else check_position(after)
        if name is not None:
            checkpoint = FileCheckpoint(Path(state_dir) if state_dir else find_state_dir(os.environ), name)
            saved = checkpoint.open()
            after = saved if after is None else after
        query = {"types": ",".join(sorted(names))} if names else {}
        return EventStream(LiveFeed(self._transport, query, after=after or 0), checkpoint=checkpoint)

    def head(self) -> int:
        """Return the newest position of the log. `events(after=…)` then returns new events only."""
        answer = self._transport.get("/api/ledger/head")
        return read_position(answer.content, "head", answer.url)

    # Files --------------------------------------------------------------------------------------------------------

    def download(self, file: ResultFile | Asset | str, to: str | PathLike[str]) -> Path:
        """Save a result file, and return its path.

        The file appears when it is complete. After a lost connection, the download continues where it ended.

        Args:
            file: A file or an asset of the results, its path, or its URL.
            to: The path to save to. If it is a directory, the file keeps its name.
        """
        return download_file(self._transport, find_file(file), Path(to))

    def read_bytes(self, file: ResultFile | Asset | str, *, max_bytes: int = _MAX_READ_BYTES) -> bytes:
        """Return the content of a result file.

        Args:
            file: A file or an asset of the results, its path, or its URL.
            max_bytes: The largest file to read into memory.

        Raises:
            ValueError: The file is larger.
        """
        return read_file(self._transport, find_file(file), max_bytes=max_bytes)

    # Everything else ----------------------------------------------------------------------------------------------

    def request(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None
    ) -> Mapping[str, Any]:
        """Send any request of the HTTP API, and return the content of its response.

        Retries, timeouts and errors are those of the other methods.

        Args:
            method: The HTTP method.
            path: The quoted path, such as `/api/monitoring/events/stats`.
            query: Query parameters.
            body: The body, encoded as JSON.
        """
        check_path(path)
        if method.upper() == "GET":
            return (self._transport.request(Call("GET", path, query or {}, is_view=True))).content
        return (self._transport.change(method.upper(), path, body, query=query)).content
