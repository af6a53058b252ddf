"""Events of the log, as the API sends them: the same class that `ledger_client` yields."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final

import orjson

from jobledger.client.models import Batch, Job
from jobledger.client.responses import build_unexpected_content_error
from jobledger.ledger.domain.events import EVENT_TYPES, Event, RecordedEvent

_ENDING_TYPES: Final = frozenset(
    {"JobCompleted", "JobFailed", "JobCancelled", "JobDeleted", "BatchFinished", "BatchDeleted"}
)
_MAX_POSITION: Final = 2**63 - 1
_REOPENING_TYPES: Final = frozenset({"JobRestarted", "BatchReopened"})


def read_event(content: Any, url: str) -> RecordedEvent:
    """Return an event of the API. Its payload is parsed when `event` is used.

    Raises:
        UnexpectedResponseError: It is not an event.
    """
    try:
        document = {**content, "_id": content["position"], "time": datetime.fromisoformat(content["time"])}
        # The hash covers fields that the API does not send, so it cannot be compared here.
        digest = document.pop("hash", None)
        if digest is not None and content["type"] in EVENT_TYPES:
            document["hash"] = bytes.fromhex(digest)
    except (KeyError, TypeError, ValueError) as error:
        raise build_unexpected_content_error(url, f"it sent something else than an event ({error!r})") from None
    return RecordedEvent(document)


def parse_event(data: bytes, url: str) -> RecordedEvent:
    """Return the event in a block of the live stream.

    Raises:
        UnexpectedResponseError: It is not an event.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise build_unexpected_content_error(url, "its live stream contains something else than JSON") from None
    return read_event(content, url)


def get_type_names(types: Collection[type[Event] | str] | None) -> frozenset[str] | None:
    """Return the names of event types, None for all.

    Raises:
        ValueError: `types` is empty, or has something else than event types.
    """
    if types is None:
        return None
    if isinstance(types, str) or not types:
        raise ValueError(f"types must be a list of event types, or None for all, got {types!r}")
    return frozenset(_get_type_name(event_type) for event_type in types)


def check_position(position: int) -> int:
    """Return a position of the log.

    Raises:
        ValueError: It is not a position.
    """
    if not 0 <= position <= _MAX_POSITION:
        raise ValueError(f"after must be a position of the log, 0 or more, got {position!r}")
    return position


def _get_type_name(event_type: type[Event] | str) -> str:
    name = event_type if isinstance(event_type, str) else getattr(event_type, "__name__", repr(event_type))
    if name not in EVENT_TYPES:
        similar = difflib.get_close_matches(name, EVENT_TYPES, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"there are {', '.join(sorted(EVENT_TYPES))}"
        raise ValueError(f"there is no event type {name!r}; {hint}")
    return name


class EndDetector:
    """Recognizes when a job or batch is finished, or deleted.

    Events up to the version of the snapshot are history: an earlier end may have been followed by a restart.
    """

    def __init__(self, stream: str, snapshot: Job | Batch, *, after: int) -> None:
        self._stream = stream
        self._version = snapshot.version
        self._is_finished = snapshot.is_finished
        self._is_caught_up = after >= snapshot.position

    @property
    def is_end(self) -> bool:
        """Whether nothing more is to be expected."""
        return self._is_finished and self._is_caught_up

    def take(self, events: Sequence[RecordedEvent]) -> list[RecordedEvent]:
        """Return the events up to the end."""
        taken: list[RecordedEvent] = []
        for event in events:
            if self.is_end:
                break
            taken.append(event)
            if event.stream == self._stream and event.version >= self._version:
                self._is_caught_up = True
                if event.version > self._version and event.type in _ENDING_TYPES | _REOPENING_TYPES:
                    self._is_finished = event.type in _ENDING_TYPES
        return taken
