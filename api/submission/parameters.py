"""api: validate the parameters of jobs. Models of plug-ins are applied in a process of their own.

A validator of a plug-in may raise anything, run for ever (a regular expression holds the interpreter lock meanwhile),
or end the process. In a process of its own it affects only the request that needs it. Each job type has its own
processes, so a slow validator holds up no other job type. The models of the job types that
come with Jobledger are applied here, because a process costs about half a millisecond for each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_json

from jobledger.api.http.errors import ApiError, format_location
from jobledger.api.processes.limited_function import CallTimeout, LimitedFunction, ProcessEnded, ProcessPoolBusy
from jobledger.api.submission.plugin_validation import build_validator_error

_OWN_MODELS: Final = "jobledger.workers."
_PROCESSES: Final = 2
_SECONDS: Final = 3.0
_SECONDS_PER_JOB: Final = 0.01
_MOST_SECONDS: Final = 10.0
_QUEUE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class ParameterCheck:
    """Parameters to validate, and where they stand in the body."""

    job_type: str
    model: type[BaseModel]
    parameters: Mapping[str, Any]
    within: tuple[str | int, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether the model comes with Jobledger."""
        return self.model.__module__.startswith(_OWN_MODELS)


class ParameterValidator:
    """Applies models of plug-ins in limited processes."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._functions: dict[str, LimitedFunction] = {}

    async def check(self, checks: Iterable[ParameterCheck]) -> None:
        """Apply models of plug-ins, one job type after the other.

        Raises:
            ApiError: 422, naming the first hundred wrong fields of a job, or why there is no verdict; 503, when it
                takes too long.
        """
        by_type: dict[str, list[ParameterCheck]] = {}
        for it in checks:
            by_type.setdefault(it.job_type, []).append(it)
        for job_type, wanted in by_type.items():
            if (answer := await self._answer(job_type, wanted)) is not None:
                raise ApiError(answer["status"], answer["code"], answer["message"], details=answer["details"])

    async def close(self) -> None:
        """End the processes."""
        for function in self._functions.values():
            await function.close()

    def _function(self, job_type: str) -> LimitedFunction:
        if job_type not in self._functions:
            self._functions[job_type] = LimitedFunction(
                "jobledger.api.submission.plugin_validation:answer_to",
                processes=_PROCESSES,
                queue_seconds=_QUEUE_SECONDS,
            )
        return self._functions[job_type]

    async def _answer(self, job_type: str, checks: list[ParameterCheck]) -> Any:
        request = to_json(
            [
                {
                    "job_type": it.job_type,
                    "model": f"{it.model.__module__}:{it.model.__qualname__}",
                    "parameters": it.parameters,
                    "within": it.within,
                }
                for it in checks
            ]
        )
        seconds = min(self._seconds + _SECONDS_PER_JOB * len(checks), _MOST_SECONDS)
        try:
            return await self._function(job_type).call(request, seconds)
        except ProcessPoolBusy:
            raise _too_slow("Other requests are being validated. Try again later.") from None
        except CallTimeout as error:
            raise _too_slow(f"Validating parameters of job type {job_type} {error}.") from None
        except ProcessEnded as error:
            return build_validator_error(format_location(checks[0].within), job_type, str(error))


def _too_slow(why: str) -> ApiError:
    return ApiError(503, "validation_timeout", why, retry_after_seconds=5)
