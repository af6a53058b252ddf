"""Secrets of a processor do not get into what its jobs report, whatever form a service gives them."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr

from jobledger.workers.results.hidden_secrets import PLACEHOLDER, HiddenSecrets, find_secrets

KEY = 'sk-proj-AbCd/12+"34&xyz=<789>~00'
texts = st.text(st.characters(codec="utf-8"), max_size=30)


@given(before=texts, after=texts)
@pytest.mark.parametrize(
    "form",
    [KEY, json.dumps(KEY)[1:-1], quote(KEY), quote(KEY, safe=""), html.escape(KEY)],
    ids=["plain", "json", "url path", "url", "html"],
)
def test_secret_is_hidden_in_each_form(form: str, before: str, after: str) -> None:
    hidden = HiddenSecrets([KEY]).hide(f"{before}{form}|{after}{form}{form}")
    assert hidden.replace(PLACEHOLDER, "") == f"{before}|{after}"
    assert hidden.count(PLACEHOLDER) == 3


def test_secret_that_was_cut_is_hidden() -> None:
    hidden = HiddenSecrets([KEY])
    assert hidden.hide(f"Invalid key Bearer {KEY[:20]}… Try again") == f"Invalid key Bearer {PLACEHOLDER}… Try again"
    assert hidden.hide(f"Invalid key: {KEY[:20]}") == f"Invalid key: {PLACEHOLDER}"
    assert hidden.hide(KEY[:6]) == KEY[:6]  # as services show which key it is


def test_begin_of_a_short_secret_is_an_ordinary_word() -> None:
    hidden = HiddenSecrets(["jobledger-2026"])
    assert hidden.hide("jobledger uses jobledger-2026.") == f"jobledger uses {PLACEHOLDER}."


def test_secret_with_several_lines_is_hidden_on_one_line() -> None:
    key = "-----BEGIN KEY-----\nMIIBVgIBADANBgkqhkiG9w0BAQEF\n-----END KEY-----\n"
    assert HiddenSecrets([key]).hide(f"bad: {' '.join(key.split())}") == f"bad: {PLACEHOLDER}"


@pytest.mark.parametrize("secret", ["", "short", "   \n ", "x" * 10_001])
def test_text_that_is_no_usable_secret_hides_nothing(secret: str) -> None:
    text = f"a text with {secret} in it"
    assert HiddenSecrets([secret]).hide(text) == text


def test_secrets_are_hidden_at_any_depth_of_json() -> None:
    value: Any = {"a": [1, None, {KEY: [f"x{KEY}"]}], "b": True}
    assert HiddenSecrets([KEY]).hide_in_json(value) == {
        "a": [1, None, {PLACEHOLDER: [f"x{PLACEHOLDER}"]}],
        "b": True,
    }


def test_bytes_that_are_no_text_stay_unchanged() -> None:
    content = bytes(range(256))
    hidden = HiddenSecrets([KEY])
    assert hidden.hide_in_bytes(content + KEY.encode() + content) == content + PLACEHOLDER.encode() + content


# Where secrets are ----------------------------------------------------------------------------------------------------


class Service(BaseModel):
    api_key_file: Path | None = None
    password: str = ""


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")
    credential: SecretStr = SecretStr("")
    raw: SecretBytes = SecretBytes(b"")
    services: list[Service] = []


def test_secrets_are_found_in_settings(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("key-in-a-file\n")
    settings = Settings.model_validate(
        {
            "credential": "secret-text",
            "raw": b"secret-bytes",
            "services": [{"api_key_file": file}, {"password": "password-in-a-list"}],
            "headers": {"api_key": "key-in-a-dict", "accept": "text/html"},
            "OPENAI_API_KEY": "key-in-capitals",
            "token": "token-text",
            "refresh_token": "refresh-text",
            "model": "no-secret-model",
            "sort_key": "created_at",
            "eos_token": "<|endoftext|>",
            "max_tokens": 1000,
        }
    )
    assert {secret.strip() for secret in find_secrets(settings, {})} == {
        *("secret-text", "secret-bytes", "key-in-a-file", "password-in-a-list"),
        *("key-in-a-dict", "key-in-capitals", "token-text", "refresh-text"),
    }


def test_secrets_are_found_in_environment_variables() -> None:
    environment = {
        "OPENAI_API_KEY": "first",
        "GITHUB_ACCESS_TOKEN": "second",
        "DB_PASSWORD": "third",
        "AWS_SECRET_ACCESS_KEY": "fourth",
        "KEYBOARD": "us",
        "SSH_KEY_PATH": "/home/x",
        "LANG": "de_DE.UTF-8",
    }
    assert find_secrets(Settings(), environment) == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("name", ["missing", "."])
def test_secret_file_that_cannot_be_read_is_left_to_the_processor(tmp_path: Path, name: str) -> None:
    assert find_secrets(Service(api_key_file=tmp_path / name), {}) == []


def test_lines_of_a_secret_file_are_secrets_as_well(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first-secret\nsecond-secret\n")
    hidden = HiddenSecrets(find_secrets(Service(api_key_file=file), {}))
    assert hidden.hide("second-secret, first-secret") == f"{PLACEHOLDER}, {PLACEHOLDER}"
