"""projections: the view `failures`: which documents of other views do not show what the log says, and why.

One stream must not keep all others from being projected. So a stream is isolated when one of its events cannot be
folded, or its document cannot be stored: too large, a number that BSON cannot hold, a write that the server refuses.

* An event that cannot be folded: the document stays as it was before, with `projection_error`. Further events change
  only what their types say (its status), so counts and the end of its batch stay right.
* A document that cannot be stored: it is folded as ever, and stored without what may be large (`reduced`), with
  `projection_error`. When it can be stored again, it is stored whole.

Both depend on the events of the stream alone, not on where chunks end. So a rebuild comes to the same documents, and
heals them when the program has been mended. The log has everything in any case.
"""

from __future__ import annotations

from typing import Final

import bson
from bson.errors import BSONError
from pymongo import IndexModel

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.limits import MAX_DOCUMENT_BYTES, truncate_text
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.engine.slots import Views

NAME: Final = "projection_errors"
INDEXES: Final[list[IndexModel]] = []
ERROR_FIELD: Final = "projection_error"
"""The field of a document that does not show what the log says."""
REDUCED_FIELD: Final = "reduced"
"""The field of a document that could not be stored whole."""
_MESSAGE_CHARACTERS: Final = 1000
MAX_LISTED: Final = 100


def event_problem(event: RecordedEvent, error: Exception) -> Document:
    """Return what to say of an event that cannot be folded."""
    first = next(iter(str(error).splitlines()), "")
    message = truncate_text(f"{event.type} cannot be folded: {type(error).__name__}: {first}", _MESSAGE_CHARACTERS)
    return {"position": event.position, "version": event.version, "type": event.type, "message": message}


def document_problem(document: Document, message: str) -> Document:
    """Return what to say of a document that cannot be stored."""
    return {
        "position": document.get("position"),
        "version": document.get("version"),
        "type": None,
        "message": truncate_text(message, _MESSAGE_CHARACTERS),
    }


def unstorable_reason(document: Document) -> str | None:
    """Return why the database cannot store a document, None if it can."""
    try:
        size = len(bson.encode(document))
    except (BSONError, ValueError, OverflowError, TypeError, RecursionError) as error:
        return f"The document cannot be stored: {error}"
    if size > MAX_DOCUMENT_BYTES:
        return f"The document takes {size} bytes: the database stores at most {MAX_DOCUMENT_BYTES}."
    return None


def build_row(view: str, key: str, problem: Document) -> Document:
    """Return the row of a document that does not show what the log says."""
    return {"_id": f"{view}/{key}", "view": view, "key": key, **problem}


def rows_query(view: str) -> Document:
    """Return the query for the rows of one view."""
    return {"_id": {"$gte": f"{view}/", "$lt": f"{view}0"}}  # "0" follows "/"


async def count(views: Views) -> int:
    """Return how many documents do not show what the log says, as the server knows without counting."""
    with translate_errors("counting what could not be projected"):
        return await views[NAME].estimated_document_count()


async def list_problems(views: Views, *, limit: int = MAX_LISTED) -> list[Document]:
    """Return what could not be projected, by key, at most `limit` rows."""
    with translate_errors("reading what could not be projected"):
        return await views[NAME].find({}, sort=[("_id", 1)], limit=limit).to_list()
