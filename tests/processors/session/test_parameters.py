"""Validation of session parameters and settings, and its error messages."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jobledger.workers.processors.session import SessionParameters, SessionSettings
from tests.processors.session.fixtures import load_samples, make_parameters


def make_valid_values() -> dict[str, Any]:
    return make_parameters().model_dump(exclude={"extra"})


def find_error(**changes: Any) -> tuple[tuple[int | str, ...], str]:
    with pytest.raises(ValidationError) as caught:
        SessionParameters.model_validate(make_valid_values() | changes)
    (error,) = caught.value.errors()
    return error["loc"], error["msg"]


def test_samples_are_valid_and_unchanged() -> None:
    for sample in load_samples():
        assert SessionParameters.model_validate(sample).model_dump() == sample | {"extra": None, "translate": None}


def test_only_five_fields_are_required() -> None:
    required = {name: make_valid_values()[name] for name in ("event", "session", "url", "filename", "track")}
    parameters = SessionParameters.model_validate(required)
    assert (parameters.source_language, parameters.target_language) == ("en", "de")
    assert (parameters.speakers, parameters.day, parameters.extra) == (None, None, None)
    for name in required:
        with pytest.raises(ValidationError, match=name):
            SessionParameters.model_validate({key: value for key, value in required.items() if key != name})


def test_surrounding_spaces_are_kept() -> None:
    assert make_parameters(session="  A talk ", day=" Sunday").session == "  A talk "


def test_extra_is_returned_unchanged() -> None:
    reference = {"id": 7, "nested": {"a": [1, None, "ü"]}}
    assert make_parameters(extra=reference).model_dump()["extra"] == reference


@pytest.mark.parametrize("name", ["event", "session", "filename", "track"])
@pytest.mark.parametrize("blank", ["", "   ", "\n\t"])
def test_blank_required_field_is_rejected(name: str, blank: str) -> None:
    assert find_error(**{name: blank}) == ((name,), "must not be blank")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must be a URL; send null if there is none"),
        ("ftp://conference.example/", "must start with http:// or https://"),
        ("conference.example/talk", "must start with http:// or https://"),
        ("https:///talk", "must have a host"),
        ("http://conference.example:port/", "is not a valid URL"),
        ("http://[::1/", "is not a valid URL"),
        ("http://conference.example/a b", "must not contain spaces"),
        ("http://conference.example/\x00", "must not contain spaces or control characters"),
    ],
)
@pytest.mark.parametrize("name", ["url", "video_url", "attachments_url"])
def test_url_that_is_not_http_is_rejected(name: str, url: str, message: str) -> None:
    location, actual_message = find_error(**{name: url})
    assert location == (name,)
    assert message in actual_message


@pytest.mark.parametrize("time", ["9:00", "24:00", "10:60", "10.30", "1000", "", "１０:00", "10:00:00"])
def test_time_not_in_hours_and_minutes_is_rejected(time: str) -> None:
    assert find_error(starttime=time) == (("starttime",), "must be a time of day in the form HH:MM, for example 09:30")


@pytest.mark.parametrize("language", ["", "english", "e", "de_DE", "d3", "de-", "de-toolongsubtag"])
def test_invalid_language_code_is_rejected(language: str) -> None:
    assert find_error(target_language=language)[1].startswith("must be a language code")


@pytest.mark.parametrize("language", ["de", "pt-BR", "zh-Hant-TW", "gsw"])
def test_language_code_with_subtags_is_accepted(language: str) -> None:
    assert make_parameters(source_language=language).source_language == language


def test_unknown_field_error_suggests_the_likely_name() -> None:
    assert find_error(starttme="10:00") == (("starttme",), "unknown field `starttme`; did you mean `starttime`?")
    assert find_error(**{"{colour}": 1})[1] == "unknown field `{colour}`; put your own values in `extra`"


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        SessionParameters.model_validate(
            make_valid_values() | {"url": "x", "track": " ", "speakers": "Ada", "colour": 1}
        )
    assert [error["loc"] for error in caught.value.errors()] == [("url",), ("track",), ("speakers",), ("colour",)]


def test_too_long_value_error_names_limit_and_length() -> None:
    assert find_error(session="x" * 2_001)[1] == "must be at most 2,000 characters long, got 2,001"
    assert find_error(speakers=["x"] * 501)[1] == "must have at most 500 speakers, got 501"
    assert "must be at most 16,000 characters as JSON" in find_error(extra={"x": "y" * 16_000})[1]


def test_value_of_wrong_type_is_not_converted() -> None:
    for changes in ({"session": 7}, {"speakers": "Ada"}, {"extra": [1]}, {"day": 3}, {"starttime": 930}):
        assert find_error(**changes)[0] == tuple(changes)


def test_settings_have_defaults_and_descriptions() -> None:
    assert SessionSettings().allowed_private_hosts == []
    assert all(field.description for field in SessionSettings.model_fields.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"alow_private": []},
        {"allowed_private_hosts": ["10.0.0.0/33"]},
        {"allowed_private_hosts": ["localhost:80"]},
        {"max_pdf_pages": 0},
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        SessionSettings.model_validate(settings)


def test_allowed_private_hosts_accepts_hosts_and_networks() -> None:
    entries = ["127.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "intranet.example", "localhost"]
    assert SessionSettings.model_validate({"allowed_private_hosts": entries}).allowed_private_hosts == entries
