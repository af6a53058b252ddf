"""Validate the parameters of jobs. The models of plug-ins run in separate processes.

A plug-in's validator may raise any error, run forever (a regular expression holds the interpreter lock meanwhile), or
end the process. In a separate process it affects only the request that needs it. Each job type has its own processes,
so a slow validator does not delay other job types. The models that come with Jobledger run in this process, because a
separate process costs about half a millisecond per request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_json

from jobledger.api.http.errors import ApiError
from jobledger.api.processes.function_process_pool import (
    CallTimeout,
    FunctionProcessPool,
    ProcessEnded,
    ProcessPoolBusy,
)
from jobledger.api.processes.plugin_validation import build_validator_error

_TRUSTED_PACKAGE: Final = "jobledger.workers."
_PROCESSES_PER_JOB_TYPE: Final = 2
_TIMEOUT_SECONDS: Final = 3.0
_TIMEOUT_SECONDS_PER_JOB: Final = 0.01
_MAX_TIMEOUT_SECONDS: Final = 10.0
_QUEUE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class ParameterCheck:
    """Parameters to validate. `within` is their location in the request body."""

    job_type: str
    model: type[BaseModel]
    parameters: Mapping[str, Any]
    within: tuple[str | int, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether the model comes with Jobledger."""
        return self.model.__module__.startswith(_TRUSTED_PACKAGE)


class ParameterValidator:
    """Applies the models of plug-ins in limited processes."""

    def __init__(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        self._pools: defaultdict[str, FunctionProcessPool] = defaultdict(_create_pool)
        """The processes of each job type."""

    async def check(self, checks: Iterable[ParameterCheck]) -> None:
        """Apply the models of plug-ins, one job type after the other.

        Raises:
            ApiError: 422, naming up to 100 invalid fields of a job, or why its validator failed; 503, the validation
                takes too long.
        """
        by_type: dict[str, list[ParameterCheck]] = {}
        for check in checks:
            by_type.setdefault(check.job_type, []).append(check)
        for job_type, of_type in by_type.items():
            await self._check_job_type(job_type, of_type)

    async def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            await pool.close()

    async def _check_job_type(self, job_type: str, checks: list[ParameterCheck]) -> None:
        request = to_json(
            [
                {
                    "job_type": check.job_type,
                    "model": f"{check.model.__module__}:{check.model.__qualname__}",
                    "parameters": check.parameters,
                    "within": check.within,
                }
                for check in checks
            ]
        )
        timeout_seconds = min(self._timeout_seconds + _TIMEOUT_SECONDS_PER_JOB * len(checks), _MAX_TIMEOUT_SECONDS)
        try:
            error = await self._pools[job_type].call(request, timeout_seconds)
        except ProcessPoolBusy:
            raise _build_timeout_error("All validators of this job type are busy. Retry later.") from None
        except CallTimeout as error:
            raise _build_timeout_error(f"Validating parameters of job type {job_type} {error}.") from None
        except ProcessEnded as error:
            raise build_validator_error(checks[0].within, job_type, str(error)) from None
        if error is not None:
            raise ApiError(error["status"], error["code"], error["message"], details=error["details"])


def _create_pool() -> FunctionProcessPool:
    return FunctionProcessPool(
        "jobledger.api.processes.plugin_validation:validate_parameters",
        processes=_PROCESSES_PER_JOB_TYPE,
        queue_seconds=_QUEUE_SECONDS,
    )


def _build_timeout_error(message: str) -> ApiError:
    return ApiError(503, "validation_timeout", message, retry_after_seconds=5)
