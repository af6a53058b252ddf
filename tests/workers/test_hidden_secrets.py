"""A secret is hidden in texts, whatever form a service or library gives it, and also where a text was cut."""

from __future__ import annotations

import html
import json
import random
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from jobledger.workers.results.conversion import to_text
from jobledger.workers.secrets.hidden_secrets import PLACEHOLDER, HiddenSecrets

SECRET = """sk-Äb€😀/12+"34&x'yz=<7 9>~\\!;"""
FORMS = {
    "plain": SECRET,
    "json": json.dumps(SECRET)[1:-1],
    "json unicode": json.dumps(SECRET, ensure_ascii=False)[1:-1],
    "json twice": json.dumps(json.dumps(SECRET)[1:-1])[1:-1],
    "repr": repr(SECRET)[1:-1],
    "repr of bytes": repr(SECRET.encode())[2:-1],
    "url": quote(SECRET, safe=""),
    "url twice": quote(quote(SECRET, safe=""), safe=""),
    "url form": quote_plus(SECRET),
    "html": html.escape(SECRET),
    "html twice": html.escape(html.escape(SECRET)),
    "html numbers": "".join(char if char.isascii() and char.isalnum() else f"&#{ord(char)};" for char in SECRET),
    "php": json.dumps(SECRET)[1:-1].replace("/", "\\/"),
    "gson": json.dumps(SECRET)[1:-1].replace("=", "\\u003d").replace("+", "\\u002B"),
    "lower case": quote(SECRET, safe="sk-b").replace("%C3%84", "%c3%84").replace("%3D", "%3d"),
    "html in json": json.dumps(html.escape(SECRET))[1:-1],
    "url in json": json.dumps(quote(SECRET)).replace("/", "\\/")[1:-1],
}
texts = st.text(st.characters(codec="utf-8", exclude_characters="\\%&….["), max_size=30)


@given(before=texts, after=texts)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_secret_is_hidden_in_each_form(form: str, before: str, after: str) -> None:
    hidden = HiddenSecrets(["another secret", SECRET]).hide(f"{before}{form}|{after}{form}{form}")
    assert hidden.replace(PLACEHOLDER, "") == f"{before}|{after}"
    assert hidden.count(PLACEHOLDER) == 3


@given(user=st.text(max_size=5), suffix=st.text(max_size=5))
@pytest.mark.parametrize("encode", [b64encode, urlsafe_b64encode])
def test_secret_is_hidden_within_base64(encode: Callable[[bytes], bytes], user: str, suffix: str) -> None:
    secret = "0123456789abcdef???>>>~~~ABC"
    credentials = encode(f"{user}:{secret}{suffix}".encode("utf-8", "replace")).decode()
    hidden = HiddenSecrets([secret]).hide(f"Authorization: Basic {credentials} rejected")
    assert PLACEHOLDER in hidden
    assert len(hidden) < len(f"Authorization: Basic {credentials} rejected") - 20


@given(st.text(), st.sampled_from(list(FORMS.values())))
def test_text_with_escapes_keeps_everything_else(text: str, form: str) -> None:
    noise = json.dumps(text) + quote(text.encode("utf-8", "replace")) + html.escape(text)
    hidden = HiddenSecrets([SECRET]).hide(f"{noise} {form} {noise}")
    assert hidden == f"{noise} {PLACEHOLDER} {noise}"


@pytest.mark.parametrize("secret", [SECRET, "%2Fescaped%41&lt;", '"quoted"', "back\\slash\\."])
def test_hidden_json_is_valid_json(secret: str) -> None:
    text = json.dumps({'a"\\': f'"{secret}"', "b": [secret, f"\n{secret}\n", f"{secret}{secret}"]})
    assert json.loads(HiddenSecrets([secret]).hide(text)) == {
        'a"\\': f'"{PLACEHOLDER}"',
        "b": [PLACEHOLDER, f"\n{PLACEHOLDER}\n", PLACEHOLDER * 2],
    }


@pytest.mark.parametrize("escape", [str, quote, html.escape, json.dumps])
def test_secret_that_looks_escaped_is_hidden(escape: Callable[[str], str]) -> None:
    hidden = HiddenSecrets(["%2Fescaped%41&lt;"]).hide(f"x {escape('%2Fescaped%41&lt;')} x")
    assert hidden.strip('x "') == PLACEHOLDER


KEY = "sk-proj-0123456789abcdefghijklmnop"


@pytest.mark.parametrize("kept", range(len(KEY) + 1))
def test_part_before_the_cut_of_to_text_is_hidden(kept: int) -> None:
    cut = to_text("x" * (1000 - kept) + KEY + "y" * 50, 1000)
    hidden = HiddenSecrets([KEY]).hide(cut)
    assert KEY[:6] not in hidden
    assert hidden.startswith("x" * 900)
    assert hidden.endswith("more characters were cut)")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"Invalid key {KEY[:7]}…", f"Invalid key {PLACEHOLDER}…"),
        (f"Invalid key {KEY[:7]} [...]", f"Invalid key {PLACEHOLDER} [...]"),
        (f"Invalid key ...{KEY[-7:]} given", f"Invalid key ...{PLACEHOLDER} given"),
        (f"Invalid key {KEY[:9]}", f"Invalid key {PLACEHOLDER}"),
        (f"Invalid key {KEY[:18]}. Try again", f"Invalid key {PLACEHOLDER}. Try again"),
        (f"Invalid key {KEY[:3]}...{KEY[-4:]}.", f"Invalid key {KEY[:3]}...{KEY[-4:]}."),  # as services show it
        (f"The prefix {KEY[:8]} is common", f"The prefix {KEY[:8]} is common"),
    ],
)
def test_part_of_a_secret_is_hidden_where_a_text_was_cut(text: str, hidden: str) -> None:
    assert HiddenSecrets([KEY]).hide(text) == hidden


@pytest.mark.parametrize("encode", [str, json.dumps, quote, html.escape, lambda text: quote(text, safe="")])
@pytest.mark.parametrize("length", [40, 900])
def test_cut_secret_is_hidden_in_each_form_and_length(encode: Callable[[str], str], length: int) -> None:
    secret = 'sk/AbCd1234+EfGh="5678' + random.Random(length).randbytes(length).hex()
    form = encode(secret).strip('"')
    for kept in (form[: len(form) // 3], form[:-1]):
        assert HiddenSecrets([secret]).hide(f"Invalid key {kept} …") == f"Invalid key {PLACEHOLDER} …"
    assert HiddenSecrets([secret]).hide(f"Invalid key …{form[1:]} !") == f"Invalid key …{PLACEHOLDER} !"


def test_cut_base64_of_a_secret_is_hidden() -> None:
    credentials = b64encode(f"bob:{KEY}".encode()).decode()
    hidden = HiddenSecrets([KEY]).hide(f"Authorization: Basic {credentials[:-9]} …")
    assert hidden == f"Authorization: Basic {credentials[:6]}{PLACEHOLDER} …"


@pytest.mark.parametrize("before", range(0, 60, 7))
def test_parts_in_a_validation_error_are_hidden(before: int) -> None:
    class Settings(BaseModel):
        key: int

    with pytest.raises(ValidationError) as raised:
        Settings.model_validate({"key": "x" * before + KEY})
    assert "input_value=" in str(raised.value)
    hidden = HiddenSecrets([KEY]).hide(str(raised.value))
    assert KEY[:6] not in hidden
    assert KEY[-6:] not in hidden


def test_part_of_a_secret_in_a_name_is_not_hidden() -> None:
    hidden = HiddenSecrets([KEY]).hide(f"ask {KEY} {KEY[:10]}", may_be_cut=False)
    assert hidden == f"ask {PLACEHOLDER} {KEY[:10]}"
    github = HiddenSecrets(["github_AbCd1234EfGh5678"])
    assert github.hide("the talk is on github\nwith_github_") == "the talk is on github\nwith_github_"


def test_start_of_a_short_secret_is_an_ordinary_word() -> None:
    hidden = HiddenSecrets(["jobledger-2026"]).hide("jobledger uses jobledger-2026. Start jobledger-202")
    assert hidden == f"jobledger uses {PLACEHOLDER}. Start jobledger-202"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("swordfish", PLACEHOLDER),
        ("key='swordfish'.", f"key='{PLACEHOLDER}'."),
        ("bob:swordfish@host", f"bob:{PLACEHOLDER}@host"),
        (r"key:\nswordfish\n%3Dswordfish%26", rf"key:\n{PLACEHOLDER}\n%3D{PLACEHOLDER}%26"),
        (r"\u003dswordfish\u0026 \x22swordfish\x22", rf"\u003d{PLACEHOLDER}\u0026 \x22{PLACEHOLDER}\x22"),
        ("%2522swordfish \x1b[31mswordfish\x1b[0m", f"%2522{PLACEHOLDER} \x1b[31m{PLACEHOLDER}\x1b[0m"),
        (r"\x1b[1;31mswordfish\x1b[0m", rf"\x1b[1;31m{PLACEHOLDER}\x1b[0m"),
        ("swordfishing in my-swordfish_1", "swordfishing in my-swordfish_1"),
    ],
)
def test_short_secret_is_hidden_only_as_a_whole_word(text: str, hidden: str) -> None:
    assert HiddenSecrets(["swordfish"]).hide(text) == hidden


def test_secret_with_several_lines_is_hidden_as_one_line() -> None:
    assert HiddenSecrets(["first line\nsecond line"]).hide("x first line second line") == f"x {PLACEHOLDER}"


def test_secrets_are_hidden_in_json_and_keys() -> None:
    value = {"a": [1, None, {f"x{KEY}": KEY, f"y{KEY}": 2}], KEY: True, f" {KEY}": 1}
    assert HiddenSecrets([KEY]).hide_in_json(value) == {
        "a": [1, None, {f"x{PLACEHOLDER}": PLACEHOLDER, f"y{PLACEHOLDER}": 2}],
        PLACEHOLDER: True,
        f" {PLACEHOLDER}": 1,
    }


@pytest.mark.parametrize("secrets", [[], [""], [" \n"]])
def test_empty_secret_hides_nothing(secrets: list[str]) -> None:
    hidden = HiddenSecrets(secrets)
    assert hidden.is_empty
    assert hidden.hide("a text") == "a text"


@pytest.mark.parametrize("secret", [KEY, SECRET, r"\\\\\\!!!\\\\\\\"   12   3456", "AAAAAAAAAAAABCDEFGH12345"])
@pytest.mark.parametrize(
    "unit",
    ["\\", "%25", "&amp;", "&amp;amp;", "%C3", "\\u00e4", "\\xe4", "&#", "...", " ", "+", "!", "A", KEY[:6], KEY[:-1]],
)
def test_time_grows_linearly_with_the_text(secret: str, unit: str) -> None:
    hidden = HiddenSecrets([secret])

    def measure(characters: int) -> float:
        text = (unit * characters)[:characters]
        started_at = time.thread_time()
        hidden.hide(text)
        hidden.hide(text + "sk 3456 12")
        return time.thread_time() - started_at

    measure(1000)
    assert measure(400_000) < 0.4 + 40 * measure(40_000)
