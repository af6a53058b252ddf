"""projections: where the views are. Each has two collections, of which one is live: the checkpoint says which.

So views can be made anew beside those that are read (projections/engine/rebuild.py), and put in their place by one
write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.mongo.connection import TOLERANT, Database, Document

Side = Literal["a", "b"]
SIDES: Final[tuple[Side, Side]] = ("a", "b")
Sides = Mapping[str, Side]
"""Which side of which view is meant; `a` of those that are not named."""


def collection_name(view: str, side: Side) -> str:
    """Return the name of a view's collection: `jobs` is side a of the view `jobs`, and `jobs.b` its other side."""
    return view if side == "a" else f"{view}.b"


def opposite(side: Side) -> Side:
    """Return the other side."""
    return "b" if side == "a" else "a"


class Views:
    """The collections of the views, by the names of the views. `sides` may change while this is in use."""

    def __init__(self, db: Database, sides: Sides | None = None) -> None:
        self._db = db
        self.sides: Sides = sides or {}

    def __getitem__(self, view: str) -> AsyncCollection[Document]:
        name = collection_name(view, self.sides.get(view, "a"))
        return self._db.get_collection(name, codec_options=TOLERANT)  # the payload of a damaged event may be shown
