"""Jobs to submit: their options, and the bodies of the requests."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, ParamSpec, Protocol, TypedDict, TypeVar
from uuid import uuid4

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, to_json

from jobledger.ledger.domain.events import AccessControl

P = ParamSpec("P")
R = TypeVar("R")
MAX_BATCH_JOBS: Final = 10_000
_MAX_PAGE_SIZE: Final = 1000
_IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,200}")


class JobFunction(Protocol[P, R]):
    """A function that `jobledger.job` has made a job type."""

    @property
    def name(self) -> str:
        """The job type."""

    @property
    def Parameters(self) -> type[BaseModel]:
        """The model of its parameters."""

    @property
    def result_type(self) -> TypeAdapter[R]:
        """The type of its result."""

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        """Return these arguments as validated parameters of a job."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to send a message when the job or batch finishes.

    Attributes:
        url: The URL of the endpoint.
        headers: More headers, such as `Authorization`. Their values are not in the log.
        include_markdown: Send the Markdown of the result.
        include_metadata: Send the metadata of the result.
        secrets: Signing secrets of your own (Standard Webhooks: `whsec_…`). Default: the secret of the endpoint.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    include_markdown: bool = False
    include_metadata: bool = False
    secrets: Sequence[str] = field(default=(), repr=False)

    def to_body(self) -> dict[str, Any]:
        """Return the JSON that the API expects."""
        body: dict[str, Any] = {"url": self.url, "headers": dict(self.headers), "secrets": list(self.secrets)}
        return {**body, "include_markdown": self.include_markdown, "include_metadata": self.include_metadata}


class JobOptions(TypedDict, total=False):
    """Options of a job to submit: see `NewJob`."""

    name: str | None
    priority: int | None
    not_before: datetime | None
    max_attempts: int | None
    timeout: float | timedelta | None
    on_end: Webhook | None
    user_id: str | None
    access_control: AccessControl | Mapping[str, Any] | None


class SubmitOptions(JobOptions, total=False):
    """Options of a job to submit, and its key.

    `key` makes the submission repeatable: another one of the same user with the same key and the same job returns the
    job of the first one.
    """

    key: str | None


OPTION_NAMES: Final = SubmitOptions.__required_keys__ | SubmitOptions.__optional_keys__


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to submit. Options that are None have the default of the server.

    Attributes:
        job_type: The job type.
        parameters: Its parameters: JSON, or a pydantic model.
        name: A name for people.
        priority: Jobs with a higher priority start first.
        not_before: The job does not start before this time. It needs a time zone.
        max_attempts: How often the job is tried if it fails with transient errors.
        timeout: The time of one attempt, in seconds or as a timedelta.
        on_end: Where to send a message when the job finishes.
        user_id: The owner, if an administrator submits for another user.
        access_control: Who else may read or change the job.
    """

    job_type: str
    parameters: Mapping[str, Any] | BaseModel
    name: str | None = None
    priority: int | None = None
    not_before: datetime | None = None
    max_attempts: int | None = None
    timeout: float | timedelta | None = None
    on_end: Webhook | None = None
    user_id: str | None = None
    access_control: AccessControl | Mapping[str, Any] | None = None

    @classmethod
    def from_function(cls, function: JobFunction[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> NewJob:
        """Return the job that calls a job function with these arguments."""
        return cls(function.name, function.bind(*args, **kwargs))

    def to_body(self) -> dict[str, Any]:
        """Return the JSON that the API expects.

        Raises:
            ValueError: `not_before` has no time zone.
        """
        if self.not_before is not None and self.not_before.tzinfo is None:
            raise ValueError(f"not_before needs a time zone, such as datetime.now(UTC), got {self.not_before!r}")
        body = {
            "job_name": self.name,
            "priority": self.priority,
            "not_before": self.not_before,
            "max_attempts": self.max_attempts,
            "timeout_s": get_seconds(self.timeout),
            "webhook": self.on_end.to_body() if self.on_end else None,
            "user_id": self.user_id,
            "access_control": self.access_control,
        }
        return {"job_type": self.job_type, "parameters": self.parameters} | remove_none(body)


def build_batch_body(
    jobs: Iterable[NewJob | Mapping[str, Any]],
    *,
    name: str | None,
    parameters: Mapping[str, Any] | None,
    on_end: Webhook | None,
    user_id: str | None,
    access_control: AccessControl | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the body of a batch.

    Raises:
        TypeError: `jobs` is no list of jobs.
        ValueError: There are no jobs, or too many.
    """
    bodies: list[Any] = []
    if isinstance(jobs, NewJob | Mapping | str):
        raise TypeError(f"submit_many() expects a list of jobs, got {type(jobs).__name__}")
    for job in jobs:
        if len(bodies) == MAX_BATCH_JOBS:
            raise ValueError(f"a batch has at most {MAX_BATCH_JOBS:,} jobs: submit several batches")
        bodies.append(job.to_body() if isinstance(job, NewJob) else job)
    if not bodies:
        raise ValueError("a batch needs at least one job")
    options = {
        "batch_name": name,
        "parameters": parameters,
        "webhook": on_end.to_body() if on_end else None,
        "user_id": user_id,
        "access_control": access_control,
    }
    return {"jobs": bodies} | remove_none(options)


def split_arguments(
    function: JobFunction[..., Any], arguments: Mapping[str, Any], option_names: Set[str] = OPTION_NAMES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the options in keyword arguments. A name of a parameter is never an option."""
    names = option_names - function.Parameters.model_fields.keys()
    options = {name: value for name, value in arguments.items() if name in names}
    return {name: value for name, value in arguments.items() if name not in options}, options


def create_idempotency_key(key: str | None) -> str:
    """Return the key of the caller, or a new one.

    Raises:
        ValueError: The API does not accept the key.
    """
    if key is None:
        return uuid4().hex
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise ValueError(f"key must be 1 to 200 visible ASCII characters without spaces, got {key[:210]!r}")
    return key


def get_seconds(time: float | timedelta | None) -> float | None:
    """Return a length of time in seconds.

    Raises:
        ValueError: It is not a length of time.
    """
    if time is None or isinstance(time, timedelta):
        return None if time is None else time.total_seconds()
    if not is_number(time):
        raise ValueError(f"timeout must be seconds, a timedelta or None, got {time!r}")
    return time


def is_number(value: object) -> bool:
    """Return whether a value is a number other than NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def remove_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def encode_json(content: Any) -> bytes:
    """Encode the body of a request. Models, times, decimals and the like become JSON as pydantic does it.

    Raises:
        ValueError: A value has no JSON form.
    """
    try:
        # The API rejects NaN and infinity; null would hide them.
        return to_json(content, inf_nan_mode="constants")
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise ValueError(f"the content of the request is not JSON: {error}") from error


class JobFilters(TypedDict, total=False):
    """Filters of jobs. Only jobs that match all of them are listed.

    `q`: words in the name, ID, session, event, track, file name or speakers. `include`: large fields that lists leave
    out otherwise (`parameters`, `results`, `error`, `logs`, `steps`). `oldest_first`: the order.
    """

    status: str
    batch_id: str
    user_id: str
    job_type: str
    error_code: str
    track: str
    event: str
    day: str
    language: str
    archived: bool
    waiting_for: str
    created_after: datetime
    created_before: datetime
    q: str
    include: Sequence[str]
    oldest_first: bool


_FILTER_NAMES: Final = JobFilters.__optional_keys__


def build_list_query(filters: Mapping[str, Any], page_size: int) -> dict[str, str]:
    """Return the query parameters of a list.

    Raises:
        TypeError: There is no such filter.
        ValueError: `page_size` is not between 1 and 1000.
    """
    if unknown := sorted(filters.keys() - _FILTER_NAMES):
        raise TypeError(f"there is no filter {unknown[0]!r}; filters are {', '.join(sorted(_FILTER_NAMES))}")
    if not 1 <= page_size <= _MAX_PAGE_SIZE:
        raise ValueError(f"page_size must be from 1 to {_MAX_PAGE_SIZE}, got {page_size!r}")
    given = remove_none(filters)
    query = {"limit": str(page_size), "sort": "created_at" if given.pop("oldest_first", False) else "-created_at"}
    for name, value in given.items():
        if isinstance(value, bool):
            query[name] = "true" if value else "false"
        elif isinstance(value, datetime):
            query[name] = value.isoformat()
        else:
            query[name] = value if isinstance(value, str) else ",".join(value)
    return query
