"""projections: two collections of one view, compared document by document."""

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
_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class Difference:
    """A document that is not what the log says. One of the two is None where there is no such document."""

    view: str
    key: str
    actual: Document | None
    expected: Document | None

    @property
    def fields(self) -> list[str]:
        """The names of the fields in which they differ."""
        live, fresh = self.actual or {}, self.expected or {}
        return sorted(
            name
            for name in live.keys() | fresh.keys()
            if name not in live or name not in fresh or not _same(live[name], fresh[name])
        )

    def __str__(self) -> str:
        if self.actual is None:
            return f"{self.view}: {self.key} is missing"
        if self.expected is None:
            return f"{self.view}: {self.key} should not be there"
        told = [
            f"{name} is {_short(self.actual, name)} and should be {_short(self.expected, name)}" for name in self.fields
        ]
        return f"{self.view}: {self.key}: {'; '.join(told)}"


async def find_differences(
    view: str, actual: AsyncCollection[Document], expected: AsyncCollection[Document], session: AsyncClientSession
) -> AsyncIterator[Difference]:
    """Yield what differs, in the order of the keys, in bounded memory. `live` is read with `session`, `fresh` as it is.

    Raises:
        PyMongoError: the database failed.
    """
    ours = actual.with_options(codec_options=_RAW).find({}, sort=[("_id", 1)], batch_size=_AT_ONCE, session=session)
    theirs = expected.with_options(codec_options=_RAW).find({}, sort=[("_id", 1)], batch_size=_AT_ONCE)
    async with ours, theirs:
        one, other = await anext(ours, None), await anext(theirs, None)
        while one is not None or other is not None:
            if other is None or (one is not None and one["_id"] < other["_id"]):
                assert one is not None  # noqa: S101 - narrows the type: not both are None
                yield Difference(view, one["_id"], _decoded(one), None)
                one = await anext(ours, None)
            elif one is None or other["_id"] < one["_id"]:
                yield Difference(view, other["_id"], None, _decoded(other))
                other = await anext(theirs, None)
            else:
                # Nearly all are the same to the byte; the order of fields is the only other way to be the same.
                if one.raw != other.raw:
                    found = Difference(view, one["_id"], _decoded(one), _decoded(other))
                    if found.fields:
                        yield found
                one, other = await anext(ours, None), await anext(theirs, None)


def _decoded(document: RawBSONDocument) -> Document:
    return bson.decode(document.raw, codec_options=LENIENT_CODEC)


def _same(one: Any, other: Any) -> bool:
    """Compare like the database: whatever the order of fields, but 1, 1.0 and true are not the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _short(document: Document, name: str) -> str:
    if name not in document:
        return "missing"
    text = repr(document[name])
    return text if len(text) <= 80 else f"{text[:79]}…"
