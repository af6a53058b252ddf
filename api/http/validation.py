"""Validate bodies and query parameters with a model and report a limited number of errors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jobledger.api.http.errors import build_validation_error

_MAX_ENTRIES: Final = 100

Model = TypeVar("Model", bound=BaseModel)


def validate_content(model: type[Model], content: Any, *, within: tuple[str | int, ...] = ()) -> Model:
    """Validate parsed JSON. In large content, only the first errors are searched.

    Error messages say that the content is at the location `within` of the body.

    Raises:
        ApiError: 422; the details list the first hundred wrong fields.
    """
    beginning = _truncate(content)
    try:
        if beginning is not content:
            _check_beginning(model, beginning, content, within)
        return model.model_validate(content)
    except ValidationError as error:
        raise build_validation_error(
            error.errors(include_url=False, include_context=False, include_input=False), within
        ) from error


def parse_query(request: Request, model: type[Model]) -> Model:
    """Validate the query parameters.

    Raises:
        ApiError: 422; the details list each wrong parameter.
    """
    return validate_content(model, dict(request.query_params))


def _truncate(content: Any) -> Any:
    """Return content with the first hundred entries of each object and array; the same object if nothing is removed."""
    if isinstance(content, dict):
        shortened = {key: _truncate(value) for key, value in islice(content.items(), _MAX_ENTRIES)}
        is_same = len(shortened) == len(content) and all(map(operator.is_, shortened.values(), content.values()))
        return content if is_same else shortened
    if isinstance(content, list):
        entries = [_truncate(value) for value in islice(content, _MAX_ENTRIES)]
        return content if len(entries) == len(content) and all(map(operator.is_, entries, content)) else entries
    return content


def _check_beginning(model: type[BaseModel], beginning: Any, content: Any, within: tuple[str | int, ...]) -> None:
    """Reject content if its beginning has errors. pydantic itself has no limit and would collect all errors.

    An error in the beginning is an error of the whole content if its value was not truncated. Missing fields are
    ignored, because truncation may have removed them.

    Raises:
        ApiError: 422, as validate_content().
    """
    try:
        model.model_validate(beginning)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        if certain := [entry for entry in errors if _is_same(beginning, content, entry["loc"])]:
            raise build_validation_error(certain, within, may_be_incomplete=True) from error


def _is_same(beginning: Any, content: Any, location: Sequence[str | int]) -> bool:
    if location[-1:] == ("[key]",):  # an error of the key before
        location = location[:-1]
    try:
        for part in location:
            beginning, content = beginning[part], content[part]
    except (LookupError, TypeError):
        return False
    return beginning is content
