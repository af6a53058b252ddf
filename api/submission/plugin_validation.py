"""api: validate parameters with models of plug-ins. Runs in a limited process (`limited_process.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any, Final

from pydantic import BaseModel

from jobledger.api.http.errors import ApiError, format_location
from jobledger.api.http.validation import validate_content

_RAISED: Final = (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)
"""What a validator may raise. Anything else ends the process, which is an answer, too."""


def validate_parameters(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first error, as the arguments of `ApiError`, or None."""
    for check in checks:
        where = tuple(check["within"])
        try:
            validate_content(_model(check["model"]), check["parameters"], within=where)
        except ApiError as error:
            return {"status": error.status, "code": error.code, "message": error.message, "details": error.details}
        except _RAISED as error:
            return build_validator_error(
                format_location(where), check["job_type"], f"raised {type(error).__name__}: {_text_of(error)}"
            )
    return None


def build_validator_error(where: str, job_type: str, why: str) -> dict[str, Any]:
    """Return the error for a validator that gives no verdict."""
    message = f"could not be validated: the validator of job type {job_type!r} {why}"
    return {
        "status": 422,
        "code": "invalid_content",
        "message": f"{where}: {message}",
        "details": {"errors": [{"path": where, "message": message}]},
    }


def _text_of(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except _RAISED:  # also __str__ is code of the plug-in
        return "(without a text)"


@cache
def _model(name: str) -> type[BaseModel]:
    model: type[BaseModel] = resolve_name(name)
    return model
