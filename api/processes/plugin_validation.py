"""Validate parameters with the models of plug-ins. Runs in a limited process (api/processes/limited_process.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any, Final

from pydantic import BaseModel

from jobledger.api.http.errors import ApiError, build_validation_error
from jobledger.api.http.validation import validate_content

_RAISED: Final = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)
"""What a validator may raise. Anything else ends the process, which the caller reports as an error, too."""


def validate_parameters(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first error, as the arguments of `ApiError`, or None."""
    for check in checks:
        location = tuple(check["within"])
        try:
            validate_content(_resolve_model(check["model"]), check["parameters"], within=location)
        except ApiError as error:
            return vars(error)
        except _RAISED as error:
            reason = f"raised {type(error).__name__}: {_get_message(error)}"
            return vars(build_validator_error(location, check["job_type"], reason))
    return None


def build_validator_error(location: tuple[str | int, ...], job_type: str, reason: str) -> ApiError:
    """Return the error for a validator that failed."""
    message = f"could not be validated: the validator of job type {job_type!r} {reason}"
    return build_validation_error([{"loc": location, "msg": message}])


def _get_message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except _RAISED:  # __str__ may be code of the plug-in, too
        return "(no message)"


@cache
def _resolve_model(name: str) -> type[BaseModel]:
    model: type[BaseModel] = resolve_name(name)
    return model
