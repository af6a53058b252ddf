"""Title, description and language are those of the talk, and not of the site."""

from __future__ import annotations

import lxml.html  # type: ignore[import-untyped]  # it ships no types
import pytest

from jobledger.workers.processors.session.page_metadata import find_intro, find_language, find_title

TEXT = (
    "This talk shows how an append-only log makes the recovery of crashed workers simple. It measures the cost as well."
)
GERMAN = (
    "Dieser Vortrag zeigt, wie ein Log, an das nur angehängt wird, die Wiederherstellung abgestürzter Prozesse einfach "
    "macht. Der zweite Teil misst die Kosten auf einem kleinen Cluster und vergleicht sie mit einem bekannten Broker."
)


def parse(head: str, body: str = "", attributes: str = "") -> lxml.html.HtmlElement:
    return lxml.html.document_fromstring(f"<html {attributes}><head>{head}</head><body>{body}</body></html>")


@pytest.mark.parametrize(
    ("head", "body", "title"),
    [
        ("<title>My talk | ExampleConf 2025</title>", "", "My talk"),
        ("<title>ExampleConf 2025 – My talk</title>", "", "My talk"),
        (
            "<title>ExampleConf 2025</title><meta property=og:title content='ExampleConf 2025'>",
            "<h1>My talk</h1>",
            "My talk",
        ),
        ("<title>Other title | Conf</title><meta property=og:site_name content=Conf>", "", "Other title"),
        ("<title>Conf :: Other: a title</title><meta property=og:site_name content=Conf>", "", "Other: a title"),
        ("<title>Other title - Conf</title>", "<h1>Other title</h1>", "Other title"),
        (
            "<meta property=og:site_name content=Conf><title>Conf</title>",
            "<h1>Conf</h1><h1>Other title</h1>",
            "Other title",
        ),
        ("<title>A | B</title>", "", "A | B"),
        ("", "", None),
    ],
)
def test_title_is_that_of_the_talk(head: str, body: str, title: str | None) -> None:
    assert find_title(parse(head, body), "My talk") == title


@pytest.mark.parametrize(
    ("description", "is_own"),
    [
        ("How an append-only log makes recovery simple.", True),
        ("FOSDEM is a free event for software developers to meet, share ideas and collaborate.", False),
        ("Ledgers that never forget: the calmest way to keep state.", True),
        ("ExampleConf", False),
        ("", False),
    ],
)
def test_intro_describes_the_talk_and_not_the_site(description: str, is_own: bool) -> None:
    head = f"<meta property=og:site_name content=ExampleConf><meta name=description content='{description}'>"
    intro = find_intro(parse(head), TEXT, "Ledgers that never forget")
    assert intro == (description if is_own else None)


def test_japanese_intro_is_compared_by_characters() -> None:
    head = "<meta name=description content='{}'>"
    text = "この講演では、追記専用のログがどのように復旧を簡単にするかを説明します。"
    assert find_intro(parse(head.format("追記専用のログがどのように復旧を簡単にするか")), text, "x")
    assert find_intro(parse(head.format("東京で開催される無料の開発者向けイベントです")), text, "x") is None


@pytest.mark.parametrize(
    ("attributes", "text", "language"),
    [
        ("lang=en", TEXT, "en"),
        ("lang=en", GERMAN, "de"),
        ("", GERMAN, "de"),
        ("lang=de-AT", GERMAN, "de-AT"),
        ("lang=de", "Kafka, MongoDB, Kubernetes", "de"),
        ("lang=en", "追記専用のログがどのように復旧を簡単にするかを説明します。", "ja"),
        (
            "lang=nb",
            "Hva vi lærte da vi flyttet plattformen til skyen, og hvorfor vi ikke ville gjort det igjen. " * 3,
            "nb",
        ),
        ("lang=fr", "A short text that is English.", "fr"),
        ("", "12:30", None),
        ("lang='not a language'", "12:30", None),
    ],
)
def test_language_is_declared_or_detected(attributes: str, text: str, language: str | None) -> None:
    assert find_language(parse("", attributes=attributes), text) == language
