"""Retry policies of job types, and durations as text."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal, get_args

Duration = timedelta | float | str
"""A time span: a `timedelta`, a number of seconds, or text such as "90s", "10m", "1h30m" or "2d"."""
Backoff = Literal["exponential", "linear", "constant"]
DEFAULT_MAX_ATTEMPTS: Final = 3
DEFAULT_TIMEOUT_SECONDS: Final = 3600.0
MAX_ATTEMPTS: Final = 100
MAX_TIMEOUT_SECONDS: Final = 7 * 86_400.0
_MAX_DELAY_SECONDS: Final = 7 * 86_400.0
_MIN_DELAY_SECONDS: Final = 0.1
_UNIT_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*")


def parse_duration(value: Duration, name: str) -> float:
    """Return a duration in seconds.

    Args:
        value: The duration.
        name: Name of the value in error messages.

    Raises:
        TypeError: The value has another type.
        ValueError: The text is not a duration, or the duration is negative or not finite.
    """
    given: object = value  # callers without a type checker may pass anything
    if isinstance(given, timedelta):
        seconds = given.total_seconds()
    elif isinstance(given, str):
        seconds = _parse_text(given, name)
    elif isinstance(given, int | float) and not isinstance(given, bool):
        seconds = float(given)
    else:
        raise TypeError(f"{name} must be a timedelta, seconds, or text such as '10m', not a {type(given).__name__}")
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} must be a finite duration of at least 0 seconds, got {value!r}")
    return seconds


def parse_timeout(value: Duration, name: str) -> float:
    """Return the timeout of a job type in seconds.

    Raises:
        TypeError: The value has another type.
        ValueError: It is no duration, or out of range.
    """
    seconds = parse_duration(value, name)
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise ValueError(f"{name} must be more than 0 and at most 7 days, got {value!r}")
    return seconds


def _parse_text(text: str, name: str) -> float:
    seconds, position = 0.0, 0
    for part in _PART.finditer(text.strip()):
        if part.start() != position:
            break
        seconds, position = seconds + float(part[1]) * _UNIT_SECONDS[part[2]], part.end()
    if not text.strip() or position != len(text.strip()):
        raise ValueError(f"{name} must be a duration such as '90s', '10m', '1h30m' or '2d', got {text!r}")
    return seconds


def _is_exception_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


@dataclass(frozen=True, slots=True)
class Retry:
    """When and how often a failed job is retried.

    Attributes:
        max_attempts: Attempts of a job whose submission does not say how many.
        on: Exception classes that are retried if nothing handles them. None: all. `PermanentError` and other
            `ProcessorError`s that are not transient are never retried. Transient errors, timeouts, and processes that
            were killed are always retried.
        backoff: How the delay grows from `base_delay`: it doubles with each attempt (`exponential`), grows by
            `base_delay` (`linear`), or stays (`constant`). An exponential delay is random below the computed one, the
            others vary by 10 percent, so that jobs that failed together do not retry together.
        base_delay: The first delay. None: `event_worker.retry_base_seconds`.
        max_delay: Upper limit of the delay, at least `base_delay`. None: `event_worker.retry_max_seconds`, or
            `base_delay` if that is longer.
    """

    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    on: type[BaseException] | Sequence[type[BaseException]] | None = None
    backoff: Backoff = "exponential"
    base_delay: Duration | None = None
    max_delay: Duration | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError: A value has the wrong type.
            ValueError: A value is out of range.
        """
        if type(self.max_attempts) is not int:
            raise TypeError(f"Retry.max_attempts must be an integer, not a {type(self.max_attempts).__name__}")
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(f"Retry.max_attempts must be between 1 and {MAX_ATTEMPTS}, got {self.max_attempts}")
        if self.backoff not in get_args(Backoff):
            raise ValueError(f"Retry.backoff must be one of {', '.join(get_args(Backoff))}, got {self.backoff!r}")
        for error_class in () if self.on is None else self._classes:
            if not _is_exception_class(error_class):
                raise TypeError(f"Retry.on must contain exception classes, got {error_class!r}")
        for name in ("base_delay", "max_delay"):
            if (value := getattr(self, name)) is None:
                continue
            if parse_duration(value, f"Retry.{name}") > _MAX_DELAY_SECONDS:
                raise ValueError(f"Retry.{name} must be at most 7 days, got {value!r}")
        if self.base_delay is not None and self.max_delay is not None:
            base, limit = (parse_duration(value, "delay") for value in (self.base_delay, self.max_delay))
            if base > limit:
                raise ValueError(
                    f"Retry.base_delay must be at most max_delay, got {self.base_delay!r} and {self.max_delay!r}"
                )

    @property
    def _classes(self) -> tuple[type[BaseException], ...]:
        return (self.on,) if isinstance(self.on, type) else tuple(self.on or ())

    def matches(self, error: BaseException) -> bool:
        """Return whether an exception that nothing handled is retried."""
        return self.on is None or any(issubclass(type(error), error_class) for error_class in self._classes)

    def choose_delay(
        self, attempt: int, *, base_seconds: float, max_seconds: float, requested_seconds: float = 0.0
    ) -> float:
        """Return the seconds until the next attempt.

        Args:
            attempt: The number of attempts so far.
            base_seconds: The first delay, if the policy has none.
            max_seconds: The maximum delay, if the policy has none.
            requested_seconds: The delay that another system requested. The delay begins after it.
        """
        base = base_seconds if self.base_delay is None else parse_duration(self.base_delay, "base_delay")
        if self.max_delay is not None:
            limit = parse_duration(self.max_delay, "max_delay")
        else:  # the job type says how long to wait: a setting for all types must not cut it
            limit = max_seconds if self.base_delay is None else max(max_seconds, base)
        factors = {"exponential": 2.0 ** min(attempt - 1, 64), "linear": float(attempt), "constant": 1.0}
        delay = min(base * factors[self.backoff], limit)
        lowest = _MIN_DELAY_SECONDS if self.backoff == "exponential" else 0.9 * delay
        highest = delay if self.backoff == "exponential" else 1.1 * delay
        waited = min(max(requested_seconds, 0.0), limit)
        return waited + random.uniform(lowest, highest)  # noqa: S311 - spreads load, guards no secret
