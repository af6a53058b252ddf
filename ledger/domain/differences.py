"""What a change of a job's parameters changes: the entries that the event records for its readers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

import orjson

from jobledger.ledger.domain.events import ParameterChange
from jobledger.ledger.domain.limits import MAX_NAME_CHARACTERS, truncate_text

MAX_CHANGES_LISTED: Final = 100
MAX_LISTED_VALUE_BYTES: Final = 1024
"""A larger value is left out: the events of the job contain all parameters before and after the change."""
_ABSENT: Final = b""
_JSON_OPTIONS: Final = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS


def find_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ParameterChange]:
    """Return the first changes by name. Values of nested objects are compared, and listed, as a whole."""
    changed = (name for name in sorted({*before, *after}) if _encode(before, name) != _encode(after, name))
    return [_build_change(name, before, after) for name in islice(changed, MAX_CHANGES_LISTED)]


def _build_change(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> ParameterChange:
    return ParameterChange(
        name=truncate_text(name, MAX_NAME_CHARACTERS),
        kind="changed" if name in before and name in after else "added" if name in after else "removed",
        before=_get_listed_value(before, name),
        after=_get_listed_value(after, name),
    )


def _get_listed_value(parameters: Mapping[str, Any], name: str) -> Any:
    return parameters.get(name) if len(_encode(parameters, name)) <= MAX_LISTED_VALUE_BYTES else None


def _encode(parameters: Mapping[str, Any], name: str) -> bytes:
    """Return a value as JSON, because Python considers 1, 1.0 and True equal."""
    if name not in parameters:
        return _ABSENT
    value = parameters[name]
    try:
        return orjson.dumps(value, option=_JSON_OPTIONS)
    except TypeError:  # an integer beyond 64 bits; any other value is rejected by the append
        return repr(value).encode(errors="surrogatepass")
