"""The API key of a service is hidden in what the service returns, whatever form it gives the key."""

from __future__ import annotations

import html
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.workers.processors.session.hidden_key import PLACEHOLDER, HiddenKey

KEY = 'sk-proj-AbCd/12+"34&xyz=<789>~00'
LOWER_CASE = re.sub("%..", lambda code: code[0].lower(), quote(KEY, safe=""))
texts = st.text(st.characters(codec="utf-8"), max_size=30)


@given(before=texts, after=texts)
@pytest.mark.parametrize(
    "form",
    [KEY, quote(KEY), quote(KEY, safe=""), LOWER_CASE, html.escape(KEY)],
    ids=["plain", "url path", "url", "lower case", "html"],
)
def test_key_is_hidden_in_each_form(form: str, before: str, after: str) -> None:
    hidden = HiddenKey(KEY).hide(f"{before}{form}|{after}{form}{form}")
    assert hidden.replace(PLACEHOLDER, "") == f"{before}|{after}"
    assert hidden.count(PLACEHOLDER) == 3


def test_key_that_was_cut_is_hidden() -> None:
    hidden = HiddenKey(KEY)
    assert hidden.hide(f"Invalid key Bearer {KEY[:20]}… Try again") == f"Invalid key Bearer {PLACEHOLDER}… Try again"
    assert hidden.hide(KEY[:6]) == KEY[:6]  # as services show which key it is


def test_start_of_a_short_key_is_an_ordinary_word() -> None:
    hidden = HiddenKey("jobledger-2026")
    assert hidden.hide("jobledger uses jobledger-2026.") == f"jobledger uses {PLACEHOLDER}."


@pytest.mark.parametrize("key", [None, "none", "sk-1234"])
def test_key_that_is_none_hides_nothing(key: str | None) -> None:
    text = f"a text with {key} in it"
    assert HiddenKey(key).hide(text) == text


def test_key_is_hidden_at_any_depth_of_json() -> None:
    value = {"a": [1, None, {"b": [f"x{KEY}"]}], "c": True}
    assert HiddenKey(KEY).hide_in_json(value) == {"a": [1, None, {"b": [f"x{PLACEHOLDER}"]}], "c": True}
