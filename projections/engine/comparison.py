"""Compare two collections of one view, document by document."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import bson
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.mongo.connection import LENIENT_CODEC, Document

_RAW: Final = CodecOptions(document_class=RawBSONDocument)
_READ_BATCH_DOCUMENTS: Final = 1000
_MAX_VALUE_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True)
class Difference:
    """A document of a view that differs from the log.

    Attributes:
        view: Name of the view.
        key: Key of the document.
        actual: The document in the view, or None if the view does not contain it.
        expected: The document according to the log, or None if the view should not contain it.
    """

    view: str
    key: str
    actual: Document | None
    expected: Document | None

    @property
    def fields(self) -> list[str]:
        """The names of the fields that differ."""
        actual, expected = self.actual or {}, self.expected or {}
        return sorted(
            name
            for name in actual.keys() | expected.keys()
            if name not in actual or name not in expected or not _is_same(actual[name], expected[name])
        )

    def __str__(self) -> str:
        if self.actual is None:
            return f"{self.view}: missing document {self.key}"
        if self.expected is None:
            return f"{self.view}: unexpected document {self.key}"
        parts = [
            f"{name} is {_format_value(self.actual, name)} and should be {_format_value(self.expected, name)}"
            for name in self.fields
        ]
        return f"{self.view}: {self.key}: {'; '.join(parts)}"


async def find_differences(
    view: str, actual: AsyncCollection[Document], expected: AsyncCollection[Document], session: AsyncClientSession
) -> AsyncIterator[Difference]:
    """Yield the differences between two collections of a view in the order of keys. Memory is bounded.

    The collection of the active view (`actual`) is read in a snapshot session.

    Raises:
        PyMongoError: The database failed.
    """
    options = {"sort": [("_id", 1)], "batch_size": _READ_BATCH_DOCUMENTS}
    actual_cursor = actual.with_options(codec_options=_RAW).find({}, session=session, **options)
    expected_cursor = expected.with_options(codec_options=_RAW).find({}, **options)
    async with actual_cursor, expected_cursor:
        one, other = await anext(actual_cursor, None), await anext(expected_cursor, None)
        while one is not None or other is not None:
            if other is None or (one is not None and one["_id"] < other["_id"]):
                assert one is not None  # noqa: S101 - narrows the type: at most one of them is None
                yield Difference(view, one["_id"], _decode(one), None)
                one = await anext(actual_cursor, None)
            elif one is None or other["_id"] < one["_id"]:
                yield Difference(view, other["_id"], None, _decode(other))
                other = await anext(expected_cursor, None)
            else:
                # Nearly all documents are equal as bytes. Others may still be equal except for the order of fields.
                if one.raw != other.raw:
                    difference = Difference(view, one["_id"], _decode(one), _decode(other))
                    if difference.fields:
                        yield difference
                one, other = await anext(actual_cursor, None), await anext(expected_cursor, None)


def _decode(document: RawBSONDocument) -> Document:
    return bson.decode(document.raw, codec_options=LENIENT_CODEC)


def _is_same(one: Any, other: Any) -> bool:
    """Compare two values without regard to the order of fields. 1, 1.0 and True differ, as in the database."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _format_value(document: Document, name: str) -> str:
    if name not in document:
        return "missing"
    text = repr(document[name])
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[: _MAX_VALUE_CHARACTERS - 1]}…"
