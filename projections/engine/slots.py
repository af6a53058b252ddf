"""projections: where the views are. Each has two collections, of which one is live: the checkpoint says which.

So views can be made anew beside those that are read (projections/engine/rebuild.py), and put in their place by one
write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, Document

Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, Slot]] = ("a", "b")
ViewSlots = Mapping[str, Slot]
"""Which side of which view is meant; `a` of those that are not named."""


def collection_name(view: str, slot: Slot) -> str:
    """Return the name of a view's collection: `jobs` is side a of the view `jobs`, and `jobs.b` its other side."""
    return view if slot == "a" else f"{view}.b"


def other_slot(slot: Slot) -> Slot:
    """Return the other side."""
    return "b" if slot == "a" else "a"


class Views:
    """The collections of the views, by the names of the views. `sides` may change while this is in use."""

    def __init__(self, db: Database, sides: ViewSlots | None = None) -> None:
        self._db = db
        self.slots: ViewSlots = sides or {}

    def __getitem__(self, view: str) -> AsyncCollection[Document]:
        name = collection_name(view, self.slots.get(view, "a"))
        return self._db.get_collection(name, codec_options=LENIENT_CODEC)  # the payload of a damaged event may be shown
