"""tests: what a client may say about a session, and what it is told when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobledger.workers.processors.session import SessionParameters, SessionSettings
from tests.processors.session.fixtures import make_parameters

SAMPLES = Path(__file__).resolve().parents[4] / "shared" / "data" / "fosdem-2025-sessions.json"


def valid() -> dict[str, Any]:
    return make_parameters().model_dump(exclude={"extra"})


def complaint(**changes: Any) -> tuple[tuple[int | str, ...], str]:
    with pytest.raises(ValidationError) as refused:
        SessionParameters.model_validate(valid() | changes)
    (line,) = refused.value.errors()
    return line["loc"], line["msg"]


def samples() -> list[dict[str, Any]]:
    if SAMPLES.exists():
        found: list[dict[str, Any]] = json.loads(SAMPLES.read_text())
        return found
    return [
        valid() | {"session": f"Talk {number}: “näher” 💌 \u00a01", "speakers": speakers, "video_url": video}
        for number in range(50)
        for speakers in (None, ["Stephen  Walli", 'Richard "RichiH" H.'])
        for video in (None, f"https://video.conference.example/{number}/talk.av1.webm")
    ]


def test_all_samples_are_valid_and_stay_as_they_were_sent() -> None:
    for sample in samples():
        assert SessionParameters.model_validate(sample).model_dump() == sample | {"extra": None}


def test_only_five_fields_are_needed() -> None:
    needed = {name: valid()[name] for name in ("event", "session", "url", "filename", "track")}
    parameters = SessionParameters.model_validate(needed)
    assert (parameters.source_language, parameters.target_language) == ("en", "de")
    assert (parameters.speakers, parameters.day, parameters.extra) == (None, None, None)
    for name in needed:
        with pytest.raises(ValidationError, match=name):
            SessionParameters.model_validate({key: value for key, value in needed.items() if key != name})


def test_spaces_around_a_value_are_left_alone() -> None:
    assert make_parameters(session="  A talk ", day=" Sunday").session == "  A talk "


def test_the_clients_own_reference_comes_back_unchanged() -> None:
    reference = {"id": 7, "nested": {"a": [1, None, "ü"]}}
    assert make_parameters(extra=reference).model_dump()["extra"] == reference


@pytest.mark.parametrize("name", ["event", "session", "filename", "track"])
@pytest.mark.parametrize("blank", ["", "   ", "\n\t"])
def test_a_needed_field_may_not_be_blank(name: str, blank: str) -> None:
    assert complaint(**{name: blank}) == ((name,), "must not be blank")


@pytest.mark.parametrize(
    ("url", "sentence"),
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
def test_an_address_must_lead_to_the_web(name: str, url: str, sentence: str) -> None:
    where, said = complaint(**{name: url})
    assert where == (name,)
    assert sentence in said


@pytest.mark.parametrize("time", ["9:00", "24:00", "10:60", "10.30", "1000", "", "１０:00", "10:00:00"])
def test_a_time_is_hours_and_minutes(time: str) -> None:
    assert complaint(starttime=time) == (("starttime",), "must be a time of day in the form HH:MM, for example 09:30")


@pytest.mark.parametrize("language", ["", "english", "e", "de_DE", "d3", "de-", "de-toolongsubtag"])
def test_a_language_is_a_code(language: str) -> None:
    assert complaint(target_language=language)[1].startswith("must be a language code")


@pytest.mark.parametrize("language", ["de", "pt-BR", "zh-Hant-TW", "gsw"])
def test_longer_language_codes_are_languages_too(language: str) -> None:
    assert make_parameters(source_language=language).source_language == language


def test_a_misspelt_field_is_named_with_what_was_probably_meant() -> None:
    assert complaint(starttme="10:00") == (("starttme",), "unknown field `starttme`; did you mean `starttime`?")
    assert complaint(**{"{colour}": 1})[1] == "unknown field `{colour}`; put your own values in `extra`"


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as refused:
        SessionParameters.model_validate(valid() | {"url": "x", "track": " ", "speakers": "Ada", "colour": 1})
    assert [line["loc"] for line in refused.value.errors()] == [("url",), ("track",), ("speakers",), ("colour",)]


def test_what_is_too_long_is_refused_with_both_numbers() -> None:
    assert complaint(session="x" * 2_001)[1] == "must be at most 2,000 characters long, got 2,001"
    assert complaint(speakers=["x"] * 501)[1] == "must have at most 500 speakers, got 501"
    assert "must be at most 16,000 characters as JSON" in complaint(extra={"x": "y" * 16_000})[1]


def test_a_wrong_kind_of_value_is_not_bent_into_shape() -> None:
    for changes in ({"session": 7}, {"speakers": "Ada"}, {"extra": [1]}, {"day": 3}, {"starttime": 930}):
        assert complaint(**changes)[0] == tuple(changes)


def test_settings_have_working_defaults_and_every_one_is_described() -> None:
    assert SessionSettings().allowed_private_hosts == []
    assert all(field.description for field in SessionSettings.model_fields.values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"alow_private": []},
        {"allowed_private_hosts": ["10.0.0.0/33"]},
        {"allowed_private_hosts": ["localhost:80"]},
        {"max_pdf_pages": 0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SessionSettings.model_validate(wrong)


def test_hosts_and_networks_may_be_allowed() -> None:
    entries = ["127.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "intranet.example", "localhost"]
    assert SessionSettings.model_validate({"allowed_private_hosts": entries}).allowed_private_hosts == entries
