"""Select the collection of each view.

Each view has two collections, in slot `a` and slot `b`. One slot is active: readers use it. The other slot is the
shadow, in which a rebuild writes the new view (projections/engine/rebuild.py). The checkpoint names the active slot of
each view, so one write switches all views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, Document

Slot = Literal["a", "b"]
SLOTS: Final[tuple[Slot, Slot]] = ("a", "b")
ViewSlots = Mapping[str, Slot]
"""A slot for each view. A view without an entry is in slot `a`."""


def get_collection_name(view: str, slot: Slot) -> str:
    """Return the name of a view's collection: `jobs` in slot a, `jobs.b` in slot b."""
    return view if slot == "a" else f"{view}.b"


def get_other_slot(slot: Slot) -> Slot:
    """Return the other of the two slots."""
    return "b" if slot == "a" else "a"


class Views:
    """The collections of the views, by view name. If the database fails, their methods raise errors of the driver.

    The query functions of `projections/views` translate these errors to LedgerUnavailable (`translate_errors`).

    Attributes:
        slots: The slot of each view. It may change while this object is in use.
    """

    def __init__(self, db: Database, slots: ViewSlots | None = None) -> None:
        self._db = db
        self.slots: ViewSlots = slots or {}

    def __getitem__(self, view: str) -> AsyncCollection[Document]:
        name = get_collection_name(view, self.slots.get(view, "a"))
        # A view may contain the payload of a damaged event, which the strict codec cannot decode.
        return self._db.get_collection(name, codec_options=LENIENT_CODEC)
