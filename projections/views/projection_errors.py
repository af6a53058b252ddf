"""View `projection_errors`: the documents of other views that differ from the log, with the reason.

One stream must not stop the projection of all others. If a stream has a projection error, the projection writer
*isolates* it: only its own document differs from the log. There are two kinds of projection errors:

* An event cannot be applied. The document keeps its previous content and gets the field `projection_error`. Of further
  events only the types are applied (the status), so the counts and the status of the batch remain correct. If the
  stream has no document, only this view shows the error.
* A document is *unstorable*: it is too large, BSON cannot hold a number in it, or the server rejects it. It is folded
  as usual, but stored *reduced*: without the fields that may be large, and with the fields `projection_error` and
  `reduced`. Once it can be stored again, it is stored completely. An unstorable row, and a reduced document that is
  still unstorable, is *skipped*: it is not stored at all.

The result depends only on the events of the stream and not on where chunks end. Therefore, a rebuild creates the same
documents, and repairs them after the program was fixed. The log is complete in any case.
"""

from __future__ import annotations

from typing import Final

import bson
from bson.errors import BSONError
from pymongo import IndexModel

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.limits import MAX_DOCUMENT_BYTES, truncate_text
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "projection_errors"
INDEXES: Final[list[IndexModel]] = []
ERROR_FIELD: Final = "projection_error"
"""The field of a document that differs from the log."""
REDUCED_FIELD: Final = "reduced"
"""The field of a document that could not be stored completely."""
PRIVATE_ACCESS: Final[Document] = {
    "access_control": {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []},
    "teams": [],
}
"""Replaces the access fields of a reduced document, which then only its owner and admins may read."""
MAX_LISTED: Final = 100
_MAX_MESSAGE_CHARACTERS: Final = 1000
_MAX_FIELD_CHARACTERS: Final = 200


def has_unapplied_event(document: Document) -> bool:
    """Return whether an earlier event of the document's stream could not be applied."""
    return ERROR_FIELD in document and REDUCED_FIELD not in document


def read_text(event: RecordedEvent, name: str) -> str | None:
    """Return the beginning of a text field of an event that cannot be read as a whole, or None."""
    value = event.payload_fields.get(name)
    return truncate_text(value, _MAX_FIELD_CHARACTERS) if isinstance(value, str) else None


def build_event_error(event: RecordedEvent, error: Exception) -> Document:
    """Return the projection error of an event that cannot be applied."""
    reason = next(iter(str(error).splitlines()), "")
    message = f"{event.type} cannot be applied: {type(error).__name__}: {reason}"
    return _build_error(message, event.position, event.version, event.type)


def build_document_error(document: Document, message: str) -> Document:
    """Return the projection error of a document that cannot be stored."""
    return _build_error(message, document.get("position"), document.get("version"))


def _build_error(message: str, position: int | None, version: int | None, event_type: str | None = None) -> Document:
    text = truncate_text(message, _MAX_MESSAGE_CHARACTERS)
    return {"position": position, "version": version, "type": event_type, "message": text}


def find_unstorable_reason(document: Document) -> str | None:
    """Return why the database cannot store a document, or None if it can."""
    try:
        size = len(bson.encode(document))
    except (BSONError, ValueError, OverflowError, TypeError, RecursionError) as error:
        return f"The document cannot be encoded as BSON: {error}"
    if size > MAX_DOCUMENT_BYTES:
        return f"The document has {size} bytes, the database stores at most {MAX_DOCUMENT_BYTES}."
    return None


def build_row(view: str, key: str, error: Document) -> Document:
    """Return the row for a document that differs from the log."""
    return {"_id": f"{view}/{key}", "view": view, "key": key, **error}


def build_rows_query(view: str) -> Document:
    """Return the database query for the rows of one view."""
    return {"_id": {"$gte": f"{view}/", "$lt": f"{view}0"}}  # in ASCII, "0" follows "/"


async def count(views: Views) -> int:
    """Return the number of rows, from the metadata of the collection."""
    with translate_errors("counting projection errors"):
        return await views[NAME].estimated_document_count()


async def list_errors(views: Views, *, limit: int = MAX_LISTED) -> list[Document]:
    """Return at most `limit` rows, sorted by key."""
    with translate_errors("reading projection errors"):
        return await views[NAME].find({}, sort=[("_id", 1)], limit=limit).to_list()
