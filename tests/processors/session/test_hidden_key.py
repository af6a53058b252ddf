"""The API key of a service is hidden in what the service returns, whatever form it gives the key."""

from __future__ import annotations

import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.workers.processors.session.hidden_key import PLACEHOLDER, HiddenKey

KEY = """sk-proj-AbCd/12+"34&x'yz=<789>~\\!"""
FORMS = {
    "plain": KEY,
    "json": json.dumps(KEY)[1:-1],
    "json twice": json.dumps(json.dumps(KEY)[1:-1])[1:-1],
    "php": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "gson": json.dumps(KEY)[1:-1].replace("=", "\\u003d").replace("+", "\\u002B"),
    "url": quote(KEY, safe=""),
    "url path": quote(KEY),
    "lower case": quote(KEY, safe="sk-proj-AbCd").lower().replace("abcd", "AbCd"),
    "html": html.escape(KEY),
    "html numbers": html.escape(KEY).replace("&#x27;", "&#039;").replace("&quot;", "&#34;"),
}
texts = st.text(st.characters(codec="utf-8", exclude_characters="\\"), max_size=30)


def hide_in_error(text: str, key: str | None = KEY) -> str:
    return HiddenKey(key, min_characters=4, may_be_cut=True).hide(text)


@given(before=texts, after=texts)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_key_is_hidden_in_each_form(form: str, before: str, after: str) -> None:
    hidden = hide_in_error(f"{before}{form}|{after}{form}{form}")
    assert hidden.replace(PLACEHOLDER, "") == f"{before}|{after}"
    assert hidden.count(PLACEHOLDER) == 3


def test_key_that_was_cut_is_hidden() -> None:
    assert hide_in_error(f"Invalid key Bearer {KEY[:20]}… Again") == f"Invalid key Bearer {PLACEHOLDER}… Again"
    assert hide_in_error(KEY[:6]) == KEY[:6]  # as services show which key it is
    complete = HiddenKey(KEY, min_characters=16, may_be_cut=False)
    assert complete.hide(f"{KEY[:20]}… {KEY}") == f"{KEY[:20]}… {PLACEHOLDER}"


def test_start_of_a_short_key_is_an_ordinary_word() -> None:
    text = hide_in_error("jobledger uses jobledger-2026.", key="jobledger-2026")
    assert text == f"jobledger uses {PLACEHOLDER}."


@pytest.mark.parametrize("key", [None, "abc"])
def test_key_that_is_none_hides_nothing(key: str | None) -> None:
    text = f"a text with {key} in it"
    assert hide_in_error(text, key) == text


def test_key_is_hidden_at_any_depth_of_json() -> None:
    hidden = HiddenKey(KEY, min_characters=4, may_be_cut=True)
    value = {"a": [1, None, {"b": [f"x{KEY}"]}], "c": True}
    assert hidden.hide_in_json(value) == {"a": [1, None, {"b": [f"x{PLACEHOLDER}"]}], "c": True}


def test_text_of_backslashes_takes_linear_time() -> None:
    text = "\\" * 1_000_000
    assert hide_in_error(text) == text
