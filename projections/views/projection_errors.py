"""View `projection_errors`: the documents of other views that differ from the log, with the reason.

One stream must not stop the projection of all others. So the projection writer isolates a stream if one of its events
cannot be applied, or if its document cannot be stored: it is too large, BSON cannot hold a number in it, or the server
rejects the write.

* If an event cannot be applied, the document keeps its previous content and gets the field `projection_error`. Of
  further events only the types are applied (the status), so counts and the end of the batch remain correct.
* If a document cannot be stored, it is folded as usual, but stored without the fields that may be large (`reduced`),
  with the field `projection_error`. Once it can be stored again, it is stored completely.

Both depend only on the events of the stream and not on where chunks end. So a rebuild creates the same documents, and
repairs them after the program was fixed. The log is complete in any case.
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
"""Access fields of a document whose own ones are too large. Only admins see it."""
MAX_LISTED: Final = 100
_MAX_MESSAGE_CHARACTERS: Final = 1000


def is_isolated(document: Document) -> bool:
    """Return whether an event of the document's stream could not be applied."""
    return ERROR_FIELD in document and REDUCED_FIELD not in document


def event_problem(event: RecordedEvent, error: Exception) -> Document:
    """Return the problem of an event that cannot be applied."""
    reason = next(iter(str(error).splitlines()), "")
    message = f"{event.type} cannot be applied: {type(error).__name__}: {reason}"
    return {
        "position": event.position,
        "version": event.version,
        "type": event.type,
        "message": truncate_text(message, _MAX_MESSAGE_CHARACTERS),
    }


def document_problem(document: Document, message: str) -> Document:
    """Return the problem of a document that cannot be stored."""
    return {
        "position": document.get("position"),
        "version": document.get("version"),
        "type": None,
        "message": truncate_text(message, _MAX_MESSAGE_CHARACTERS),
    }


def unstorable_reason(document: Document) -> str | None:
    """Return why the database cannot store a document, or None if it can."""
    try:
        size = len(bson.encode(document))
    except (BSONError, ValueError, OverflowError, TypeError, RecursionError) as error:
        return f"The document cannot be encoded as BSON: {error}"
    if size > MAX_DOCUMENT_BYTES:
        return f"The document has {size} bytes, the database stores at most {MAX_DOCUMENT_BYTES}."
    return None


def build_row(view: str, key: str, problem: Document) -> Document:
    """Return the row for a document that differs from the log."""
    return {"_id": f"{view}/{key}", "view": view, "key": key, **problem}


def rows_query(view: str) -> Document:
    """Return the database query for the rows of one view."""
    return {"_id": {"$gte": f"{view}/", "$lt": f"{view}0"}}  # in ASCII, "0" follows "/"


async def count(views: Views) -> int:
    """Return the number of rows, from the metadata of the collection."""
    with translate_errors("counting projection errors"):
        return await views[NAME].estimated_document_count()


async def list_problems(views: Views, *, limit: int = MAX_LISTED) -> list[Document]:
    """Return at most `limit` rows, sorted by key."""
    with translate_errors("reading projection errors"):
        return await views[NAME].find({}, sort=[("_id", 1)], limit=limit).to_list()
