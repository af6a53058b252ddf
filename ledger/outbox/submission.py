"""The documents of the collection `outbox`: one for each job that a program has submitted in its own transaction.

`_id` is the ID of the job. `job` is the submission as JSON text, so that it is the same text in every driver.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Final

from bson import ObjectId
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticSerializationError, to_json

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.access import parse_user_name
from jobledger.ledger.domain.canonical_json import encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import AccessControl, JobSubmitted
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.net.url_policy import USERINFO_MESSAGE, find_userinfo
from jobledger.ledger.store.envelope import MAX_EVENT_BYTES

COLLECTION: Final = "outbox"
REJECTED_COLLECTION: Final = "outbox_rejected"
"""Documents that cannot become jobs, each with a `reason`."""
FINGERPRINT_PREFIX: Final = "outbox"
_JOB_ID: Final = re.compile("job-[0-9a-f]{24}")
_MAX_KEY_CHARACTERS: Final = 200
_MAX_JSON_CHARACTERS: Final = MAX_EVENT_BYTES + 1024 * 1024
"""More than any submission has that can become an event, with its options that are null."""
_OPTION_NAMES: Final = {"job_name": "name", "timeout_s": "timeout"}
"""The names of fields for programs."""


class _AccessControl(AccessControl):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutboxSubmission(BaseModel):
    """A job to submit, with the limits of the API. Options that are None have the default of `JobSubmitted`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_type: str = Field(min_length=1, max_length=limits.MAX_JOB_TYPE_CHARACTERS)
    parameters: dict[str, Any]
    user_id: str
    job_name: str | None = Field(None, max_length=limits.MAX_TITLE_CHARACTERS)
    priority: int | None = Field(None, strict=True, ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)
    not_before: AwareDatetime | None = None
    max_attempts: int | None = Field(None, strict=True, ge=1, le=limits.MAX_ATTEMPTS)
    timeout_s: float | None = Field(None, gt=0, le=limits.MAX_TIMEOUT_SECONDS)
    access_control: _AccessControl | None = None

    @field_validator("user_id")
    @classmethod
    def _check_user_id(cls, name: str) -> str:
        return parse_user_name(name)

    def build_event(self) -> JobSubmitted:
        """Return the event of the submission.

        Raises:
            ValueError: It exceeds a limit, or cannot be stored.
        """
        if (location := next(find_userinfo(self.parameters, ("parameters",)), None)) is not None:
            raise ValueError(f"{'.'.join(map(str, location))}: {USERINFO_MESSAGE}")
        given = {name: value for name, value in self if value is not None}
        if self.access_control is not None:
            given["access_control"] = AccessControl(**self.access_control.model_dump())
        try:
            event = JobSubmitted(**given)
            size = len(encode_canonical_json(event.to_payload()))
            limits.check_event(event, size)
        except (InvalidEvent, RecursionError) as error:
            raise ValueError(str(error)) from error
        if size > MAX_EVENT_BYTES:
            raise ValueError(f"the job must have at most {MAX_EVENT_BYTES} bytes as JSON, got {size}")
        return event


def build_submission(
    job_type: str,
    parameters: Mapping[str, Any] | BaseModel,
    *,
    user_id: str,
    timeout: float | timedelta | None = None,
    name: str | None = None,
    **options: Any,
) -> OutboxSubmission:
    """Return a submission that can be stored.

    Raises:
        ValueError: It is not valid. The message names the field.
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    fields = {"job_type": job_type, "user_id": user_id, "job_name": name, "timeout_s": seconds, **options}
    try:
        content = to_json({**fields, "parameters": parameters}, inf_nan_mode="constants")
        submission = OutboxSubmission.model_validate_json(content)
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise ValueError(f"the job is not JSON: {error}") from error
    except ValidationError as error:
        raise ValueError(_describe(error, _OPTION_NAMES)) from error
    submission.build_event()
    return submission


def _describe(error: ValidationError, names: Mapping[Any, str] | None = None) -> str:
    """Return the first wrong field, with its name for the caller. Values are left out: they may be large, or secret."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str((names or {}).get(part, part)) for part in first['loc'])}: {first['msg']}"


def create_job_id(user_id: str, key: str | None) -> str:
    """Return the ID of a new job, or the one that belongs to a key of a user.

    Raises:
        ValueError: The key is not valid.
    """
    if key is None:
        return f"job-{ObjectId()}"
    if not isinstance(key, str):
        raise ValueError(f"key: expected text, got {type(key).__name__}")  # noqa: TRY004 - as any other wrong option
    if not key or len(key) > _MAX_KEY_CHARACTERS:
        raise ValueError(f"key: expected 1 to {_MAX_KEY_CHARACTERS} characters, got {len(key)}")
    text = "\0".join((COLLECTION, user_id, key))
    return f"job-{blake2b(text.encode(errors='surrogatepass'), digest_size=12).hexdigest()}"


def build_document(job_id: str, submission: OutboxSubmission) -> Document:
    """Return the document of the outbox."""
    return {"_id": job_id, "job": encode_canonical_json(submission.model_dump(mode="json")).decode()}


def parse_document(document: Mapping[str, Any]) -> tuple[str, JobSubmitted, str]:
    """Return the ID of the job, its event and its fingerprint. The document may be anything.

    Raises:
        ValueError: The document cannot become a job.
    """
    job_id, text = document.get("_id"), document.get("job")
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise ValueError("_id: expected job- and 24 hexadecimal digits")
    if not isinstance(text, str):
        raise ValueError("job: expected the submission as JSON text")  # noqa: TRY004 - the content is wrong
    if len(text) > _MAX_JSON_CHARACTERS:  # parsed, it may need twenty times the memory
        raise ValueError(f"job: expected at most {_MAX_JSON_CHARACTERS} characters, got {len(text)}")
    try:
        submission = OutboxSubmission.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"job: {_describe(error)}") from error
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return job_id, submission.build_event(), f"{FINGERPRINT_PREFIX} {digest}"
