"""session: what a client says about a talk. Checked on submission and stored as sent: nothing is rewritten."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
)
from pydantic import model_validator as validates_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from jobledger.ledger.net.url_policy import USERINFO_MESSAGE

MAX_TEXT_CHARACTERS = 2_000
MAX_SPEAKERS = 500
MAX_EXTRA_CHARACTERS = 16_000
MAX_ERRORS = 100


def _check_not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


def _check_length(value: str) -> str:
    if len(value) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"must be at most {MAX_TEXT_CHARACTERS:,} characters long, this has {len(value):,}")
    return value


def _check_url(value: str) -> str:
    if not value:
        raise ValueError("must be a web address; send null when there is none")
    if any(character.isspace() or not character.isprintable() for character in value):
        raise ValueError("must not contain spaces or control characters; write a space as %20")
    try:
        parts = urlsplit(value)
        host, _port = parts.hostname, parts.port  # `port` raises for one that is no number
    except ValueError as error:
        raise ValueError(f"is not a web address: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError(f"must have {USERINFO_MESSAGE}")
    if not host:
        raise ValueError("must name a host, as in https://example.org/talk")
    return value


def _check_time_of_day(value: str) -> str:
    hours, colon, minutes = value.partition(":")
    digits = (hours + minutes).isascii() and (hours + minutes).isdigit()
    if not (colon and digits and len(hours) == len(minutes) == 2 and int(hours) < 24 and int(minutes) < 60):
        raise ValueError("must be a time of day as HH:MM, for example 09:30")
    return value


def _check_language(value: str) -> str:
    primary, *rest = value.split("-")
    ascii_words = value.replace("-", "").isalnum() and value.isascii()
    if not (ascii_words and primary.isalpha() and len(primary) in (2, 3) and all(1 <= len(tag) <= 8 for tag in rest)):
        raise ValueError("must be a language code such as en, de or pt-BR")
    return value


def _check_speaker_count(value: object) -> object:
    """Refuse too many before each of them is looked at."""
    if isinstance(value, list) and len(value) > MAX_SPEAKERS:
        raise ValueError(f"must name at most {MAX_SPEAKERS} speakers, this names {len(value):,}")
    return value


def _check_extra_size(value: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be plain JSON: {error}") from None
    if size > MAX_EXTRA_CHARACTERS:
        raise ValueError(f"must be at most {MAX_EXTRA_CHARACTERS:,} characters as JSON, this has {size:,}")
    return value


Text = Annotated[str, AfterValidator(_check_length)]
Name = Annotated[Text, AfterValidator(_check_not_blank)]
WebUrl = Annotated[Text, AfterValidator(_check_url)]
TimeOfDay = Annotated[str, AfterValidator(_check_time_of_day)]
Language = Annotated[str, AfterValidator(_check_language)]


class SessionParameters(BaseModel):
    """One session of a conference: its page, its recording, its slides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    event: Name = Field(description="The conference, for example `FOSDEM 2025`.")
    session: Name = Field(description="The title of the talk.")
    url: WebUrl = Field(description="The talk's own page; without it there is nothing to say.")
    filename: Name = Field(description="The name of the Markdown file to make, for example `My-Talk.md`.")
    track: Name = Field(description="The track or room the talk belongs to.")
    day: Text | None = Field(default=None, description="When, in the organisers' words: `Sunday`, `2025-02-02`.")
    starttime: TimeOfDay | None = Field(default=None, description="HH:MM, local time of the conference.")
    endtime: TimeOfDay | None = Field(default=None, description="HH:MM, local time of the conference.")
    speakers: Annotated[list[Name], BeforeValidator(_check_speaker_count)] | None = None
    video_url: WebUrl | None = Field(default=None, description="The recording, as a media file.")
    attachments_url: WebUrl | None = Field(default=None, description="The slides; a PDF becomes images.")
    source_language: Language = "en"
    target_language: Language = "de"
    extra: Annotated[dict[str, Any], AfterValidator(_check_extra_size)] | None = Field(
        default=None, description="The client's own reference, returned unchanged in `results.metadata.extra`."
    )

    @validates_model(mode="wrap")
    @classmethod
    def _unknown_fields_get_a_suggestion(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            lines = [_helpful(line) for line in error.errors()[:MAX_ERRORS]]
            raise ValidationError.from_exception_data(error.title, lines) from None


def _helpful(line: Any) -> InitErrorDetails:
    """The same error line, in words that say what would be right."""
    kind, message, context = line["type"], line["msg"], line.get("ctx", {})
    if kind == "extra_forbidden":
        name = str(line["loc"][-1])
        similar = get_close_matches(name, SessionParameters.model_fields, n=1)
        hint = f"did you mean `{similar[0]}`?" if similar else "your own values belong into `extra`"
        message = f"unknown field `{name}`; {hint}"
    elif kind == "value_error":
        message = str(context["error"])
    return InitErrorDetails(type=PydanticCustomError(kind, message), loc=line["loc"], input=line["input"])
