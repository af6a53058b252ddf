"""Convert the exceptions of a processor to a failure of its attempt.

A processor is third-party code. Nothing that an exception class of it does, such as a `__str__` that raises, leaves
this module.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from jobledger.workers.child.messages import AttemptFailed
from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.results.conversion import InvalidResult, format_validation_error, get_type_name, to_json, to_text
from jobledger.workers.retry import Retry

T = TypeVar("T")
_CALLING_DIRECTORIES: Final = (
    *(f"{Path(__file__).parents[1] / name}/" for name in ("child", "attempts", "job_types")),
    *(f"{path}/" for module in (asyncio, concurrent.futures) for path in module.__path__),
)
"""Code that calls processors. Its frames at the beginning of a traceback are omitted."""
_MAX_TRACEBACK_CHARACTERS: Final = 16_000
_MAX_TRACEBACK_FRAMES: Final = 40
"""Maximum number of frames of each exception in a traceback."""
_MACHINE_ERRORS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
)
"""System errors that may be failures of the machine."""
_MAX_DETAIL_CHARACTERS: Final = 100_000
"""Maximum size of one detail of an error."""
_MAX_DETAILS_CHARACTERS: Final = 1_000_000
"""Maximum size of all details of an error together."""
_MAX_DETAILS: Final = 100
_MAX_LISTED_ERRORS: Final = 10
"""Maximum number of errors of an exception group that the details list."""
_DEFAULT_RETRY: Final = Retry()
_MAX_DEPTH: Final = 20
"""Maximum depth to which exception groups, and chains of causes, are searched."""


def convert_exception_to_failure(
    error: BaseException, *, scratch_dir: Path | None = None, retry: Retry | None = _DEFAULT_RETRY
) -> AttemptFailed:
    """Convert an exception of a processor to the failure of its attempt. Never raises.

    In an exception group, the most informative error decides. An exception that nothing handled is transient if the
    policy retries it.

    Args:
        error: The exception.
        scratch_dir: The worker's scratch directory. Any error of a file below it may be a failure of the machine.
        retry: The retry policy of the job type.
    """
    leaves = list(_iterate_leaf_errors(error, 0))
    processor_errors = [leaf for leaf in leaves if isinstance(leaf, ProcessorError)]
    memory_errors = [leaf for leaf in leaves if isinstance(leaf, MemoryError)]
    other_errors = [
        leaf for leaf in leaves if not isinstance(leaf, ProcessorError | MemoryError | asyncio.CancelledError)
    ]
    group_details: dict[str, JSON] = {}
    if len(leaves) > 1:
        group_details["errors"] = [
            f"{get_type_name(leaf)}: {to_text(leaf, 1000)}" for leaf in leaves[:_MAX_LISTED_ERRORS]
        ]
    error_number = _find_errno(error, leaves, scratch_dir)
    if memory_errors:
        message = "The job needed more memory than event_worker.memory_limit_mb allows."
        return AttemptFailed("OUT_OF_MEMORY", message, details=group_details)
    if processor_errors and not other_errors:
        permanent_errors = [leaf for leaf in processor_errors if not _read_attribute(leaf, "transient", bool)]
        return _convert_processor_error((permanent_errors or processor_errors)[0], group_details, error_number)
    first = (other_errors or leaves)[0]
    if isinstance(first, ValidationError) and first.title in ("Results", "SavedFile"):
        root = "results" if first.title == "Results" else "saved file"
        return AttemptFailed(
            "INVALID_RESULT", to_text(f"The results are invalid: {format_validation_error(first, root)}")
        )
    details: dict[str, JSON] = {
        "exception": get_type_name(first),
        "at": _find_raise_location(first if first.__traceback__ is not None else error),
        **group_details,
        "traceback": format_traceback(error),
    }
    message = f"The processor failed unexpectedly: {get_type_name(first)}: {to_text(first)}"
    is_retried = retry is not None and all(retry.matches(leaf) for leaf in other_errors or leaves)
    return AttemptFailed("PROCESSOR_FAULT", to_text(message), is_retried, details=details, errno=error_number)


def format_traceback(error: BaseException) -> str:
    """Return the traceback of an exception with its causes, without the frames of Jobledger before it. Never raises.

    It has at most `_MAX_TRACEBACK_CHARACTERS`: its beginning and its end.
    """
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_CALLING_DIRECTORIES):
            frames = frames.tb_next
        formatted = traceback.TracebackException(
            type(error), error, frames, limit=-_MAX_TRACEBACK_FRAMES, max_group_width=5, max_group_depth=5
        )
        text = "".join(formatted.format())
    except BaseException as problem:  # noqa: BLE001 - the class of the exception is third-party code
        return f"<the traceback cannot be read: {get_type_name(problem)}>"
    half = _MAX_TRACEBACK_CHARACTERS // 2
    if len(text) > _MAX_TRACEBACK_CHARACTERS:
        text = f"{text[:half]}\n… ({len(text) - 2 * half:,} characters were cut)\n{text[-half:]}"
    return to_text(text, 2 * _MAX_TRACEBACK_CHARACTERS)


def _iterate_leaf_errors(error: BaseException, depth: int) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup) and depth < _MAX_DEPTH:
        for inner in BaseExceptionGroup.exceptions.__get__(error):  # a subclass may override the attribute
            yield from _iterate_leaf_errors(inner, depth + 1)
    else:
        yield error


def _convert_processor_error(
    error: ProcessorError, group_details: dict[str, JSON], error_number: int | None
) -> AttemptFailed:
    details = _read_attribute(error, "details", dict)
    return AttemptFailed(
        to_text(_read_attribute(error, "code", str) or "PROCESSOR_ERROR", 100),
        to_text(_read_attribute(error, "message", str) or error),
        transient=_read_attribute(error, "transient", bool),
        details={**_convert_details(details), **group_details},
        errno=error_number,
    )


def _read_attribute(error: object, name: str, kind: type[T]) -> T:
    """Return an attribute of a third-party exception converted to `kind`, or an empty value if that fails."""
    try:
        value = getattr(error, name)
        if isinstance(value, kind):
            return value
        return kind() if value is None else kind(value)  # type: ignore[call-arg]  # str, bool and dict accept one argument
    except BaseException:  # noqa: BLE001 - the attribute of a third-party class may be missing or raise anything
        return kind()


def _convert_details(details: Mapping[Any, Any]) -> dict[str, JSON]:
    """Convert the details of an error one by one: a detail that cannot be stored must not hide the error."""
    converted: dict[str, JSON] = {}
    remaining = _MAX_DETAILS_CHARACTERS
    for key, value in list(details.items())[:_MAX_DETAILS]:
        try:
            one = to_json({key: value}, "details")
            if (size := len(str(value))) > min(_MAX_DETAIL_CHARACTERS, remaining):
                raise InvalidResult("details", "it is too large", "Shorten it.")
            remaining -= size
            converted.update(one)
        except BaseException as problem:  # noqa: BLE001 - a third-party value may raise anything
            converted[to_text(key, 100).lstrip("$").replace("\0", "")] = f"<not stored: {to_text(problem, 500)}>"
    return converted


def _find_raise_location(error: BaseException) -> str:
    """Return the file and line where an exception was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "unknown"


def _find_errno(error: BaseException, leaves: list[BaseException], scratch_dir: Path | None) -> int | None:
    """Return the errno of a system error behind an exception that may be a failure of the machine."""
    for leaf in [error, *leaves]:
        current: BaseException | None = leaf
        for _ in range(_MAX_DEPTH):
            if current is None:
                break
            if isinstance(current, OSError):
                error_number = _read_attribute(current, "errno", int)
                file = Path(_read_attribute(current, "filename", str))
                if error_number in _MACHINE_ERRORS or (
                    error_number and scratch_dir and file.is_relative_to(scratch_dir)
                ):
                    return error_number
            current = current.__cause__ or current.__context__
    return None
