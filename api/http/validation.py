"""api: validate content with a model, with a bounded number of errors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from jobledger.api.http.errors import build_validation_error

_SHOWN_ENTRIES: Final = 100

Model = TypeVar("Model", bound=BaseModel)


def validate_content(model: type[Model], content: Any, *, within: tuple[str | int, ...] = ()) -> Model:
    """Return the content as a model. Of content with many errors, only the first are looked for.

    Raises:
        ApiError: 422, naming the first hundred wrong fields.
    """
    few = _shortened(content)
    try:
        if few is not content:
            _refuse_first_errors(model, few, content, within)
        return model.model_validate(content)
    except ValidationError as error:
        raise build_validation_error(
            error.errors(include_url=False, include_context=False, include_input=False), within
        ) from error


def _shortened(content: Any) -> Any:
    """Return content with the first hundred entries of each object and array, the same object where nothing is cut."""
    if isinstance(content, dict):
        shorter = {key: _shortened(value) for key, value in islice(content.items(), _SHOWN_ENTRIES)}
        same = len(shorter) == len(content) and all(map(operator.is_, shorter.values(), content.values()))
        return content if same else shorter
    if isinstance(content, list):
        entries = [_shortened(value) for value in islice(content, _SHOWN_ENTRIES)]
        return content if len(entries) == len(content) and all(map(operator.is_, entries, content)) else entries
    return content


def _refuse_first_errors(model: type[BaseModel], few: Any, content: Any, within: tuple[str | int, ...]) -> None:
    """Refuse content for the errors that its beginning has. pydantic has no limit: it would collect all errors.

    An error of the beginning is one of the whole content if it is about a value that was not cut. A missing field
    is in neither, so it does not count.

    Raises:
        ApiError: 422, as `validated`.
    """
    try:
        model.model_validate(few)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        if certain := [it for it in found if _is_same(few, content, it["loc"])]:
            raise build_validation_error(certain, within, may_be_incomplete=True) from error


def _is_same(few: Any, content: Any, location: Sequence[str | int]) -> bool:
    if location[-1:] == ("[key]",):  # an error about the name of the entry before
        location = location[:-1]
    try:
        for part in location:
            few, content = few[part], content[part]
    except (LookupError, TypeError):
        return False
    return few is content
