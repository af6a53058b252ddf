"""api: validate the parameters of jobs. Models of plug-ins are applied in a process of their own.

A validator of a plug-in may raise anything, run for ever (a regular expression holds the interpreter lock meanwhile),
or end the process. In a process of its own it affects only the request that needs it. The models of the job types that
come with Jobledger are applied here, because a process costs about half a millisecond for each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_json

from api.errors import ApiError, path
from api.limited_function import CallTimeout, LimitedFunction, ProcessEnded, TooBusy
from api.plugin_validation import failed

_OWN_MODELS: Final = "workers."
_PROCESSES: Final = 2
_SECONDS: Final = 3.0
_SECONDS_PER_JOB: Final = 0.01
_QUEUE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """Parameters to validate, and where they stand in the body."""

    job_type: str
    model: type[BaseModel]
    parameters: Mapping[str, Any]
    within: tuple[str | int, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether the model comes with Jobledger."""
        return self.model.__module__.startswith(_OWN_MODELS)


class ParametersValidator:
    """Applies models of plug-ins in limited processes."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._function = LimitedFunction(
            "api.plugin_validation:answer_to", processes=_PROCESSES, queue_seconds=_QUEUE_SECONDS
        )

    async def check(self, checks: Iterable[Check]) -> None:
        """Apply models of plug-ins.

        Raises:
            ApiError: 422, naming the first hundred wrong fields, or why there is no verdict; 503, when it takes too
                long.
        """
        wanted = list(checks)
        if wanted and (answer := await self._answer(wanted)) is not None:
            raise ApiError(answer["status"], answer["code"], answer["message"], details=answer["details"])

    async def close(self) -> None:
        """End the processes."""
        await self._function.close()

    async def _answer(self, checks: list[Check]) -> Any:
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
        try:
            return await self._function.call(request, self._seconds + _SECONDS_PER_JOB * len(checks))
        except TooBusy:
            raise _too_slow("Other requests are being validated. Try again later.") from None
        except CallTimeout as error:
            names = ", ".join(sorted({it.job_type for it in checks}))
            raise _too_slow(f"Validating parameters of job type {names} {error}.") from None
        except ProcessEnded as error:
            return failed(path(checks[0].within), checks[0].job_type, str(error))


def _too_slow(why: str) -> ApiError:
    return ApiError(503, "validation_timeout", why, retry_after_seconds=5)
