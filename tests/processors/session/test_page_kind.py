"""Pages that are no talk are errors. Talks about the same subjects are not."""

from __future__ import annotations

import time

import pytest

from jobledger.workers.processors.session.page_kind import Verdict, describe_error_page, judge_page
from jobledger.workers.processors.session.page_source import PageSource
from tests.processors.session.no_talk_pages import ABSTRACT, FOOTER, NO_TALK, SPEAKERS, TALKS, TITLE, page, talk

URL = "https://conference.example/talks/ledgers"
CODES_THAT_MAY_PASS = {"SITE_UNAVAILABLE"}


def judge(html: str, *, title: str = TITLE, url: str = URL, requested_url: str = URL) -> Verdict:
    return judge_page(PageSource(url, html), requested_url=requested_url, title=title, speakers=SPEAKERS)


@pytest.mark.parametrize(("code", "html"), NO_TALK.values(), ids=NO_TALK.keys())
def test_page_that_is_no_talk_is_an_error(code: str, html: str) -> None:
    error = judge(html).error
    assert error is not None
    assert (error.code, error.transient) == (code, code in CODES_THAT_MAY_PASS)
    assert URL in error.message


@pytest.mark.parametrize(("title", "html"), TALKS.values(), ids=TALKS.keys())
def test_talk_about_such_pages_is_accepted_without_warning(title: str, html: str) -> None:
    verdict = judge(html, title=title)
    assert (verdict.error, verdict.warning) == (None, None)


@pytest.mark.parametrize(
    "html",
    [
        pytest.param(page("Log in", f"<h1>Log in to see “{TITLE}”</h1><input type=password>"), id="login"),
        pytest.param(
            page("404", f"<h1>Page not found</h1><p>Popular: {TITLE}, {ABSTRACT}</p>"), id="list of other talks"
        ),
        pytest.param(
            page(
                "ExampleConf", f"<h1>Protected: {TITLE}</h1><form class=post-password-form><input type=password></form>"
            ),
            id="password",
        ),
        pytest.param(page("404", f"<h1>404</h1>{'<p>Something else of some length.</p>' * 100}"), id="much text"),
        pytest.param(page("x", f"<div id=app><h1>{TITLE}</h1></div><script></script><p>Loading…</p>"), id="shell"),
        pytest.param(page("ExampleConf 2025", f"<p>Berlin</p>{FOOTER}"), id="nothing of the talk"),
        pytest.param(
            page("ExampleConf 2025", f"<h1>Another one</h1>{'<p>Something else.</p>' * 200}"), id="other talk"
        ),
    ],
)
def test_page_with_little_of_the_talk_is_a_warning(html: str) -> None:
    verdict = judge(html)
    assert verdict.error is None
    assert verdict.warning is not None
    assert verdict.warning.startswith("The page may not be that of the talk")


@pytest.mark.parametrize(
    ("final_url", "html", "code"),
    [
        ("https://conference.example/", page("ExampleConf", "<h1>Welcome</h1>"), "PAGE_NOT_FOUND"),
        ("https://conference.example/en/", page("ExampleConf", "<h1>Welcome</h1>"), "PAGE_NOT_FOUND"),
        ("https://conference.example/index.html", page("ExampleConf", "<h1>Welcome</h1>"), "PAGE_NOT_FOUND"),
        ("https://id.example/sso/start", page("ExampleConf", "<h1>Welcome</h1>"), "LOGIN_REQUIRED"),
        ("https://conference.example/", talk(TITLE, ABSTRACT), None),
        ("https://conference.example/2025/", talk(TITLE, ABSTRACT), None),
    ],
)
def test_redirect_to_home_page_or_login_is_an_error_without_the_talk(
    final_url: str, html: str, code: str | None
) -> None:
    error = judge(html, url=final_url).error
    assert (error.code if error else None) == code


@pytest.mark.parametrize(
    "extra",
    [
        "<h2>We value your privacy</h2><p>We use cookies.</p>",
        "<form><h2>Login</h2><input type=password></form>",
        "<script src=/_Incapsula_Resource?SWJIYLWA=1></script>",
        "<noscript>Please enable JavaScript.</noscript><script></script>",
        "<p>Parking lot is no longer available. Accept all cookies. Stay tuned.</p>",
    ],
)
def test_long_page_of_other_language_is_not_rejected(extra: str) -> None:
    html = page("Programm", f"<h1>Journale</h1>{'<p>Was überschrieben wird, ist für immer weg.</p>' * 40}{extra}")
    assert judge(html).error is None


def test_home_page_that_was_requested_is_accepted() -> None:
    verdict = judge(talk(TITLE, ABSTRACT), url="https://c.example/", requested_url="https://c.example/#talk-1")
    assert (verdict.error, verdict.warning) == (None, None)


@pytest.mark.parametrize(
    ("name", "headers", "found"),
    [
        ("Cloudflare", {}, "is a check for bots"),
        ("Akamai", {}, "is a check for bots"),
        ("login form", {}, "asks for a login"),
        ("nginx 502", {}, None),
        ("soft 404", {"cf-mitigated": "challenge"}, "is a check for bots"),
    ],
)
def test_error_response_says_if_it_is_a_bot_check(name: str, headers: dict[str, str], found: str | None) -> None:
    description = describe_error_page(headers, NO_TALK[name][1].encode())
    assert (description is None) == (found is None)
    assert (found or "") in (description or "")


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 60_000 + "404",
        "<p>" + "a " * 500_000,
        "<script>" + "location" * 100_000 + "</script>",
        page("Not found " * 20_000, "x" * 1_000_000),
        "<noscript>" + "browser " * 200_000 + "</noscript><script></script>",
        "[" * 1_000_000,
        "<?xml " + " " * 1_000_000,
    ],
)
def test_hostile_page_is_judged_in_seconds(html: str) -> None:
    started = time.process_time()
    judge(html)
    assert time.process_time() - started < 10
