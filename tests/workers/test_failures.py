"""Exceptions of processors as failures of attempts: tracebacks, and which of them are retried."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import jobledger
from jobledger.ledger.domain.events import ErrorInfo
from jobledger.ledger.domain.limits import truncate_error
from jobledger.workers.child.failures import convert_exception_to_failure


class Evil(Exception):
    def __str__(self) -> str:
        raise SystemExit


def recurse() -> None:
    recurse()


def raise_long_text() -> None:
    raise ValueError("x\U0001f600" * 1_000_000)


def raise_evil() -> None:
    raise Evil


def raise_group() -> None:
    raise ExceptionGroup("many", [ValueError(str(number)) for number in range(10_000)])


def raise_chain() -> None:
    error: Exception | None = None
    for number in range(500):
        try:
            raise RuntimeError(str(number)) from error
        except RuntimeError as caught:
            error = caught
    assert error is not None
    raise error


def catch(function: Callable[[], None]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001 - any exception is the example
        return error
    raise AssertionError("no exception")


@pytest.mark.parametrize("function", [recurse, raise_long_text, raise_evil, raise_group, raise_chain])
def test_traceback_of_any_exception_is_bounded_and_kept(function: Callable[[], None]) -> None:
    failure = convert_exception_to_failure(catch(function))
    text = failure.details["traceback"]
    assert 0 < len(text) < 16_200
    assert failure.code == "PROCESSOR_FAULT"
    stored = truncate_error(ErrorInfo(code=failure.code, message=failure.message, details=failure.details))
    assert stored.details["traceback"] == text


def test_traceback_has_the_raising_line_and_its_cause() -> None:
    def fail() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    text = convert_exception_to_failure(catch(fail)).details["traceback"]
    assert "KeyError: 'inner'" in text
    assert text.splitlines()[-1] == "ValueError: outer"
    assert 'raise ValueError("outer") from error' in text


class Missing(jobledger.PermanentError):
    """An error of an application."""


ERRORS: dict[str, tuple[BaseException, jobledger.Retry | None, bool]] = {
    "any": (ValueError(), jobledger.Retry(), True),
    "exit": (SystemExit(1), jobledger.Retry(), True),
    "cancelled": (asyncio.CancelledError(), jobledger.Retry(), True),
    "listed": (ConnectionError(), jobledger.Retry(on=(OSError,)), True),
    "not listed": (ValueError(), jobledger.Retry(on=(OSError,)), False),
    "single class": (ValueError(), jobledger.Retry(on=ValueError), True),
    "group of listed": (ExceptionGroup("", [OSError(), OSError()]), jobledger.Retry(on=OSError), True),
    "group with another": (ExceptionGroup("", [OSError(), ValueError()]), jobledger.Retry(on=OSError), False),
    "permanent": (jobledger.PermanentError("no"), jobledger.Retry(on=Exception), False),
    "own permanent": (Missing("no"), jobledger.Retry(), False),
    "transient": (jobledger.TransientError("later"), jobledger.Retry(on=OSError), True),
    "memory": (MemoryError(), jobledger.Retry(), False),
    "never": (ValueError(), None, False),
}


@pytest.mark.parametrize("name", ERRORS)
def test_policy_decides_which_exceptions_are_transient(name: str) -> None:
    error, retry, is_transient = ERRORS[name]
    assert convert_exception_to_failure(error, retry=retry).transient is is_transient


def test_transient_error_requests_a_pause() -> None:
    error = jobledger.TransientError("busy", code="BUSY", retry_after="1m30s", details={"queue": 3})
    failure = convert_exception_to_failure(error)
    assert (failure.code, failure.details) == ("BUSY", {"queue": 3, "retry_after": 90.0})
