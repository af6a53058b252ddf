"""api: requests that are repeated, that expect a version, that wait for an end, that look back.

`Idempotency-Key`: no memory of its own is needed. What is submitted with a key is named after it, so the log itself
refuses a second one; what is done with a key is noted in its event. So a key is good for as long as the log is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

import orjson
from starlette.requests import Request

from jobledger.api.auth.permissions import require_user_id
from jobledger.api.http.errors import ApiError
from jobledger.api.http.middleware import track_waiting_request
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState
from jobledger.projections.views import projection_errors

MAX_WAIT_SECONDS: Final = 60
_KEY: Final = re.compile(r"[\x21-\x7e]{1,200}")
_ETAG: Final = re.compile(r'(?:W/)?"(\d+)(?:-[0-9a-f]+)*"')


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A request with an Idempotency-Key: `key` tells it from others, `body` tells what it asked for."""

    key_digest: str
    body_digest: str

    @classmethod
    def from_request(cls, request: Request, content: Any) -> IdempotencyKey | None:
        """Return what the header says; None if there is none. The same key of another user is another one.

        Raises:
            ApiError: 400, when it is no key; 401.
        """
        given = request.headers.get("idempotency-key")
        if given is None:
            return None
        if not _KEY.fullmatch(given):
            message = "An Idempotency-Key has 1 to 200 visible ASCII characters; a UUID is a good one."
            raise ApiError(400, "malformed_idempotency_key", message)
        asked_for = (require_user_id(request), request.method, request.url.path, given)
        return cls(_digest(*asked_for), _digest(_text(content)))

    def derive_id(self, number: int = 0) -> str:
        """Return the 24 hexadecimal digits after which the `number`th thing that is submitted is named."""
        return _digest(self.key_digest, str(number))[:24]

    @property
    def request_marker(self) -> str:
        """How an event says that this request caused it."""
        return f"{self.key_digest} {self.body_digest}"

    def find_in(self, events: Iterable[RecordedEvent]) -> RecordedEvent | None:
        """Return the last of the events that an earlier request with this key has caused.

        Raises:
            ApiError: 422, when that one asked for something else.
        """
        mine = [
            event for event in events if (event.meta.request_fingerprint or "").partition(" ")[0] == self.key_digest
        ]
        if not mine:
            return None
        if mine[-1].meta.request_fingerprint != self.request_marker:
            message = "This Idempotency-Key came with another body before: use a new key for a new request."
            raise ApiError(422, "idempotency_key_reused", message)
        return mine[-1]


def _text(content: Any) -> str:
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        return json.dumps(content, sort_keys=True)  # has integers beyond 64 bit, which orjson refuses


def _digest(*parts: str) -> str:
    text = "\0".join(parts)
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def get_request_marker(once: IdempotencyKey | None) -> str | None:
    """Return what an event says of the request that caused it."""
    return None if once is None else once.request_marker


# Versions ---------------------------------------------------------------------------------------------------------


def etag_matches_version(header: str, version: int) -> bool:
    """Return whether one of the tags of a header names this version."""
    if header.strip() == "*":
        return True
    return any(found[1] == str(version) for tag in header.split(",") if (found := _ETAG.fullmatch(tag.strip())))


def require_if_match(request: Request, check: Callable[[StreamState], None]) -> Callable[[StreamState], None]:
    """Return a check that also refuses every version but the one that `If-Match` names.

    The check raises 412 then: somebody else has changed it since the caller looked.
    """
    if "if-match" not in request.headers:
        return check
    wanted = ",".join(request.headers.getlist("if-match"))

    def check_both(known: StreamState) -> None:
        check(known)
        if not etag_matches_version(wanted, known.head.version):
            message = (
                f"It is at version {known.head.version} by now, not at the one that If-Match names: read it again."
            )
            raise ApiError(412, "precondition_failed", message, details={"version": known.head.version})

    return check_both


# Waiting and looking back ----------------------------------------------------------------------------------------


@contextmanager
def preferred_wait(request: Request) -> Iterator[float]:
    """Yield for how many seconds the caller prefers to wait for an end, 0 for not at all; count it as held meanwhile.

    What was reserved for the body is given back: the caller keeps nothing of it during the wait.
    The response names the preference that was applied. Where too many requests are held, it is not (RFC 7240, 2).
    """
    seconds = _preferred_seconds(request)
    if not seconds:
        yield 0
        return
    with track_waiting_request(request.scope) as allowed:
        if allowed:
            request.scope["preference_applied"] = f"wait={seconds}"
            request.scope["memory_reservation"].release()
        yield seconds if allowed else 0


def prefers_wait(request: Request) -> bool:
    """Return whether the caller prefers to wait for an end."""
    return "prefer" in request.headers and _preferred_seconds(request) > 0


def _preferred_seconds(request: Request) -> int:
    """Return what `Prefer: wait` says (RFC 7240). What cannot be understood is ignored, as the RFC asks."""
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition("=")
        seconds = value.strip().strip('"')
        if name.strip().lower() == "wait" and seconds.isascii() and seconds.isdecimal() and len(seconds) < 9:
            return min(int(seconds), MAX_WAIT_SECONDS)
    return 0


def as_of_filter(as_of: int | datetime) -> Callable[[RecordedEvent], bool]:
    """Return what tells the events up to a position of the log or a moment from later ones."""
    if isinstance(as_of, int):
        return lambda event: event.position <= as_of
    return lambda event: isinstance(event.document.get("time"), datetime) and event.time <= as_of


def events_up_to(events: Sequence[RecordedEvent], last: RecordedEvent) -> list[RecordedEvent]:
    """Return the events of a stream up to one of them."""
    return [event for event in events if event.version <= last.version]


@contextmanager
def translate_damaged_events(stream: str) -> Iterator[None]:
    """Answer 409 if a job or batch as it was cannot be read, because an event was changed in the database."""
    try:
        yield
    except (UnreadableEvent, AttributeError, LookupError, TypeError) as error:
        message = (
            f"{stream} as it was then cannot be read: an event of it is damaged. `jobledger log verify` says more."
        )
        raise ApiError(409, "event_damaged", message) from error


def fold_events(
    fold: Callable[[Document | None, RecordedEvent], Document | None], events: Iterable[RecordedEvent]
) -> Document | None:
    """Return the document that events make; up to one that cannot be read, which `projection_error` names then.

    Raises:
        UnreadableEvent: the first event cannot be read.
    """
    document: Document | None = None
    for event in events:
        try:
            document = fold(document, event)
        except UnreadableEvent as error:
            if document is None:
                raise
            return {**document, projection_errors.ERROR_FIELD: projection_errors.event_problem(event, error)}
    return document
