"""The parameters of a session job. They are validated on submission and stored unchanged."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
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
        raise ValueError(f"must be at most {MAX_TEXT_CHARACTERS:,} characters long, got {len(value):,}")
    return value


def _check_url(value: str) -> str:
    if not value:
        raise ValueError("must be a URL; send null if there is none")
    if any(character.isspace() or not character.isprintable() for character in value):
        raise ValueError("must not contain spaces or control characters; encode a space as %20")
    try:
        parts = urlsplit(value)
        host, _port = parts.hostname, parts.port  # `port` raises ValueError if it is not a number
    except ValueError as error:
        raise ValueError(f"is not a valid URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must start with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError(f"must have {USERINFO_MESSAGE}")
    if not host:
        raise ValueError("must have a host, as in https://example.org/talk")
    return value


def _check_time_of_day(value: str) -> str:
    if not re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", value):
        raise ValueError("must be a time of day in the form HH:MM, for example 09:30")
    return value


def _check_language(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*", value):
        raise ValueError("must be a language code such as en, de or pt-BR")
    return value


def _check_speaker_count(value: object) -> object:
    """Reject a long list before its items are validated."""
    if isinstance(value, list) and len(value) > MAX_SPEAKERS:
        raise ValueError(f"must have at most {MAX_SPEAKERS} speakers, got {len(value):,}")
    return value


def _check_extra_size(value: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be valid JSON: {error}") from None
    if size > MAX_EXTRA_CHARACTERS:
        raise ValueError(f"must be at most {MAX_EXTRA_CHARACTERS:,} characters as JSON, got {size:,}")
    return value


Text = Annotated[str, AfterValidator(_check_length)]
Name = Annotated[Text, AfterValidator(_check_not_blank)]
WebUrl = Annotated[Text, AfterValidator(_check_url)]
TimeOfDay = Annotated[str, AfterValidator(_check_time_of_day)]
Language = Annotated[str, AfterValidator(_check_language)]
TranslatedPart = Literal["page", "transcript", "slides"]


class SessionParameters(BaseModel):
    """One session of a conference with its page, recording and slides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    event: Name = Field(description="Name of the conference, for example `FOSDEM 2025`.")
    session: Name = Field(description="Title of the talk.")
    url: WebUrl = Field(description="URL of the talk's page. The job fails if it cannot be fetched.")
    filename: Name = Field(description="Name of the Markdown file to create, for example `My-Talk.md`.")
    track: Name = Field(description="Track or room of the talk.")
    day: Text | None = Field(
        default=None, description="Day as the organizers write it, for example `Sunday` or `2025-02-02`."
    )
    starttime: TimeOfDay | None = Field(
        default=None, description="Time of day as HH:MM in the conference's local time."
    )
    endtime: TimeOfDay | None = Field(default=None, description="Time of day as HH:MM in the conference's local time.")
    speakers: Annotated[list[Name], BeforeValidator(_check_speaker_count)] | None = None
    video_url: WebUrl | None = Field(
        default=None, description="URL of the recording: a media file, or a page of a supported video site."
    )
    attachments_url: WebUrl | None = Field(
        default=None, description="URL of the slides. PDF pages are rendered as images."
    )
    source_language: Language = "en"
    target_language: Language = "de"
    translate: Annotated[list[TranslatedPart], Field(max_length=3)] | None = Field(
        default=None,
        description="What is translated into `target_language`: any of `page`, `transcript` and `slides`. An empty "
        "list translates nothing. Default: the setting `language_model.translate`, which is the page.",
    )
    extra: Annotated[dict[str, Any], AfterValidator(_check_extra_size)] | None = Field(
        default=None, description="Your own data, returned unchanged in `results.metadata.extra`."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_field_names(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            lines = [_improve_message(line) for line in error.errors()[:MAX_ERRORS]]
            raise ValidationError.from_exception_data(error.title, lines) from None


def _improve_message(line: Any) -> InitErrorDetails:
    """Return the error line with a message that says how to fix it."""
    kind, message, context = line["type"], line["msg"], line.get("ctx", {})
    if kind == "extra_forbidden":
        name = str(line["loc"][-1])
        similar = get_close_matches(name, SessionParameters.model_fields, n=1)
        hint = f"did you mean `{similar[0]}`?" if similar else "put your own values in `extra`"
        message = f"unknown field `{name}`; {hint}"
    elif kind == "value_error":
        message = str(context["error"])
    return InitErrorDetails(type=PydanticCustomError(kind, message), loc=line["loc"], input=line["input"])
