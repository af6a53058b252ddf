"""Limits on what an event may contain, and size budgets of the documents of views. Pure.

MongoDB stores at most 16 MiB in one document, so nothing that enters a view's document may grow without bound. There
are two kinds of numbers here:

* Limits are checked when an event is appended (`check_event`), for every caller: API, worker, command or library.
* Budgets are what the views keep of each field. The projector truncates larger values, so events that were written
  by earlier versions or by other programs also fit into documents.

A job's document is the largest. In MiB:

    parameters 7.5 + results 2 + search keys 1 + steps 1 + logs 1 + access 0.5 + error 0.125 + texts 0.25 = 13.4 < 16

A batch's document holds one submission (at most 8, see `envelope.MAX_EVENT_BYTES`) and its list index: 8 + 2 = 10 < 16.
A delivery's document holds 50 attempts (50 × 0.03), its webhook and its list index: less than 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import orjson

from jobledger.ledger.domain import events
from jobledger.ledger.domain.errors import InvalidEvent

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
MAX_DOCUMENT_BYTES: Final = 16 * _MIB
"""The largest document that MongoDB stores."""

# Per submission.
MAX_PARAMETERS_BYTES: Final = 15 * _MIB // 2
MAX_ACCESS_NAMES: Final = 200
"""Names in all three lists of an access control together. Each name adds rows to the list index."""
MAX_TEAMS: Final = 200
"""Groups of the owner that are recorded with a job or batch."""
MAX_NAME_CHARACTERS: Final = 200
MAX_JOB_TYPE_CHARACTERS: Final = 100
MAX_PRIORITY: Final = 1000
"""Priorities are between this number and its negative."""
MAX_ATTEMPTS: Final = 100
MAX_TIMEOUT_SECONDS: Final = 7 * 86_400
MAX_BATCH_JOBS: Final = 10_000
MAX_WEBHOOK_HEADERS: Final = 50
MAX_WEBHOOK_HEADER_BYTES: Final = 16_000
"""Names and values of all headers of a webhook together. Common servers read 16 KiB of headers, and so does the API."""
MAX_TITLE_CHARACTERS: Final = 500
MAX_URL_CHARACTERS: Final = 2000
MAX_REASON_CHARACTERS: Final = 2000

# Per job or attempt.
MAX_RESULTS_BYTES: Final = 2 * _MIB
MAX_RESULT_FILES: Final = 2000
MAX_FILE_BYTES: Final = 16 * 1024 * _MIB
"""Size of a file that a job saves, and of any other file that a job process writes."""
MAX_STEPS: Final = 2000
"""Completed steps of a job that are kept for its next attempt."""
MAX_STEP_OUTPUT_BYTES: Final = 64 * _MIB
"""Outputs of all completed steps of a job together, as JSON. Its worker and its job process hold them in memory."""
MAX_CHANGED_PARAMETERS_BYTES: Final = 64 * _MIB
"""Parameters of all changes of a job together, as JSON. Each decision on the job reads its whole stream."""
MAX_JOB_LOG_BYTES: Final = 16 * _MIB
"""Log entries of a job in all attempts: their texts, and `LOG_ENTRY_OVERHEAD_BYTES` each. The worker drops the rest."""
LOG_ENTRY_OVERHEAD_BYTES: Final = 64
MAX_STEP_NAME_CHARACTERS: Final = 500
MAX_STEP_WARNINGS: Final = 1000
MAX_STEP_WARNING_BYTES: Final = 64 * _KIB

# These are truncated instead of rejected: rejecting an error or progress would hide it.
MAX_ERROR_MESSAGE_CHARACTERS: Final = 10_000
MAX_ERROR_DETAILS_BYTES: Final = 64 * _KIB
MAX_PROGRESS_STEP_CHARACTERS: Final = 500
MAX_PROGRESS_MESSAGE_CHARACTERS: Final = 2000
MAX_RESPONSE_CHARACTERS: Final = 4096

# Size budgets of the documents of views.
MAX_VIEW_LOGS_BYTES: Final = 1 * _MIB
MAX_VIEW_STEPS_BYTES: Final = 1 * _MIB
MAX_LIST_INDEX_BYTES: Final = 1 * _MIB
"""For each of the two kinds of rows, `list_keys` and `search_keys`."""
MAX_LIST_INDEX_ROWS: Final = 5000
"""For each of the two kinds. MongoDB allows at most 100,000 index keys per document."""
MAX_BATCH_LIST_INDEX_BYTES: Final = 512 * _MIB
"""For both kinds together, for all jobs of a batch. Each name that may read a job adds rows for each word and field."""
MAX_SEARCHED_CHARACTERS: Final = 4000
"""Characters of a document's texts that are searchable."""

_BSON_FACTOR: Final = 9
"""BSON takes up to this many times the bytes of JSON: 17 for `0,` in a long list."""
_MAX_CHARACTERS: Final = {
    "job_name": MAX_TITLE_CHARACTERS,
    "job_type": MAX_NAME_CHARACTERS,
    "batch_name": MAX_TITLE_CHARACTERS,
    "step": MAX_STEP_NAME_CHARACTERS,
    "reason": MAX_REASON_CHARACTERS,
}


def check_event(event: events.Event, text_bytes: int) -> None:
    """Reject an event that exceeds a limit.

    Args:
        event: The event to append.
        text_bytes: The size of its canonical JSON. It shows cheaply that most events are far below all limits.

    Raises:
        InvalidEvent: The message contains the field, the limit and the actual value.
    """
    if (check := _CHECKS.get(type(event))) is not None:
        check(event, text_bytes)
    fields = vars(event)
    if (access_control := fields.get("access_control")) is not None:
        _check_access(access_control)
    if text_bytes * _BSON_FACTOR > MAX_PARAMETERS_BYTES:
        _check_bytes("parameters", fields.get("parameters"), MAX_PARAMETERS_BYTES)
    if text_bytes > MAX_NAME_CHARACTERS:
        for field, limit in _MAX_CHARACTERS.items():
            if (text := fields.get(field)) is not None:
                _check_text(field, text, limit)


def check_steps(count: int, output_bytes: int) -> None:
    """Reject a completed step if the job then has too many steps, or too large outputs of all steps together.

    Raises:
        InvalidEvent: The message contains the limit.
    """
    _check_count("steps", count, MAX_STEPS, "completed steps of one job")
    if output_bytes > MAX_STEP_OUTPUT_BYTES:
        raise InvalidEvent(
            f"the outputs of all completed steps of a job must have at most {MAX_STEP_OUTPUT_BYTES} bytes, got "
            f"{output_bytes}. Save large content as files"
        )


def check_changed_parameters(total_bytes: int) -> None:
    """Reject a change of a job's parameters if all changes together are too large.

    Raises:
        InvalidEvent: The message contains the limit.
    """
    if total_bytes > MAX_CHANGED_PARAMETERS_BYTES:
        raise InvalidEvent(
            f"all changes of a job's `parameters` together must have at most {MAX_CHANGED_PARAMETERS_BYTES} bytes, got "
            f"{total_bytes}. Submit a new job"
        )


def _check_submission(submission: events.JobSubmitted | events.BatchSubmitted, _text_bytes: int) -> None:
    if submission.teams:
        _check_count("teams", len(submission.teams), MAX_TEAMS, "groups")
    if submission.webhook is not None:
        _check_text("webhook.url", submission.webhook.url, MAX_URL_CHARACTERS)
        _check_count("webhook.headers", len(submission.webhook.header_names), MAX_WEBHOOK_HEADERS, "headers")
    _check_text("user_id", submission.user_id, MAX_NAME_CHARACTERS)


def _check_batch(submission: events.BatchSubmitted, text_bytes: int) -> None:
    _check_submission(submission, text_bytes)
    _check_count("jobs", len(submission.job_ids), MAX_BATCH_JOBS, "jobs")


def _check_step(event: events.StepCompleted, text_bytes: int) -> None:
    if text_bytes > MAX_STEP_NAME_CHARACTERS:
        _check_count("warnings", len(event.warnings), MAX_STEP_WARNINGS, "warnings")
        _check_count("files", len(event.files), MAX_RESULT_FILES, "files")
        _check_bytes("warnings", event.warnings, MAX_STEP_WARNING_BYTES)


def _check_results(event: events.JobCompleted, text_bytes: int) -> None:
    if text_bytes > MAX_RESULT_FILES:
        _check_count("results.files", len(event.results.files), MAX_RESULT_FILES, "files")
        _check_count("results.assets", len(event.results.assets), MAX_RESULT_FILES, "assets")
    if text_bytes * _BSON_FACTOR > MAX_RESULTS_BYTES:
        _check_bytes("results", event.results.model_dump(), MAX_RESULTS_BYTES)


_CHECKS: Final[Mapping[type[events.Event], Callable[[Any, int], None]]] = {
    events.JobSubmitted: _check_submission,
    events.BatchSubmitted: _check_batch,
    events.StepCompleted: _check_step,
    events.JobCompleted: _check_results,
}


def _check_access(access: events.AccessControl) -> None:
    if not (access.read_access or access.write_access or access.admin_access):
        return
    total = 0
    for field in ("read_access", "write_access", "admin_access"):
        names: list[str] = getattr(access, field)
        total += len(names)
        _check_count(f"access_control.{field}", len(names), MAX_ACCESS_NAMES, "names")
        for index, name in enumerate(names):
            _check_text(f"access_control.{field}[{index}]", name, MAX_NAME_CHARACTERS)
    _check_count("access_control", total, MAX_ACCESS_NAMES, "names in all lists together")


def _check_count(where: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidEvent(f"`{where}` must have at most {limit} {what}, got {count}")


def _check_text(where: str, text: str | None, limit: int) -> None:
    if text is not None and len(text) > limit:
        raise InvalidEvent(f"`{where}` must have at most {limit} characters, got {len(text)}")


def _check_bytes(where: str, value: Any, limit: int) -> None:
    if value is not None and (size := compute_bson_size(value)) > limit:
        raise InvalidEvent(f"`{where}` must have at most {limit} bytes as BSON, got {size}")


# Sizes and truncation ----------------------------------------------------------------------------------------------


def compute_bson_size(value: Any) -> int:
    """Return the bytes that a value takes in a document, without its name (bsonspec.org).

    Exact for the types of events: those of JSON, times and bytes. Values of other types count as their text. This needs
    no driver, because the domain imports none. BSON stores a list as a document whose names are the indexes.
    """
    if isinstance(value, str):
        return 5 + _count_text_bytes(value)
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return 4 if -(2**31) <= value < 2**31 else 8
    if isinstance(value, float | datetime):
        return 8
    if isinstance(value, Mapping):
        return 5 + sum(2 + _count_text_bytes(str(name)) + compute_bson_size(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return 5 + sum(2 + len(str(index)) + compute_bson_size(item) for index, item in enumerate(value))
    if isinstance(value, bytes):
        return 5 + len(value)
    return 0 if value is None else 5 + len(str(value))


def compute_json_size(value: Any) -> int:
    """Return the approximate size of a value as JSON. Cheap. BSON takes at most nine times as much."""
    return len(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))


def fits_in_document(value: Any, limit: int, *, text_bytes: int | None = None) -> bool:
    """Return whether a value takes at most `limit` bytes in a document. Cheap for values far below the limit.

    `text_bytes` is the result of `compute_json_size`, if the caller has it.
    """
    text_bytes = compute_json_size(value) if text_bytes is None else text_bytes
    return text_bytes * _BSON_FACTOR <= limit or compute_bson_size(value) <= limit


def truncate_text(text: str, limit: int) -> str:
    """Return a text truncated to `limit` characters, with an ellipsis if anything was removed."""
    return text if len(text) <= limit else f"{text[: limit - 2]} …"


def truncate_error(error: events.ErrorInfo) -> events.ErrorInfo:
    """Return an error whose code, message and details fit. Details that are too large are replaced by their size."""
    details = error.details
    if not fits_in_document(details, MAX_ERROR_DETAILS_BYTES):
        kept = {name: details[name] for name in ("retryable",) if isinstance(details.get(name), bool)}
        details = {**kept, "truncated": True, "bytes": compute_bson_size(error.details)}
    message = truncate_text(error.message, MAX_ERROR_MESSAGE_CHARACTERS)
    code = truncate_text(error.code, MAX_NAME_CHARACTERS)
    if (code, message) == (error.code, error.message) and details is error.details:
        return error
    return events.ErrorInfo(code=code, message=message, details=details)


def count_newest_within(items: Sequence[Mapping[str, Any]], budget: int) -> int:
    """Return how many of the last items fit into a budget of bytes. Counts their texts and 100 bytes per item."""
    used = 0
    for number, item in enumerate(reversed(items)):
        used += 100 + sum(_count_texts(value) for value in item.values())
        if used > budget:
            return number
    return len(items)


def _count_texts(value: Any) -> int:
    """Return the approximate bytes of the texts in a value."""
    if isinstance(value, str):
        return _count_text_bytes(value)
    if isinstance(value, list):
        return sum(20 + _count_texts(item) for item in value)
    return 0


def _count_text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
