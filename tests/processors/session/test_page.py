"""Pages are read in any encoding. Their text is kept, and navigation and boilerplate are removed."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.page import MAX_CHARACTERS, PageText, read_page, require_html_type
from jobledger.workers.processors.session.safe_markdown import escape_link_target, escape_text, sanitize_markdown
from tests.processors.session.fixtures import CONFERENCE_PAGE, without_deadline

HTML = "text/html"
URL = "https://conference.example/2025/talks/ledgers/"

GERMAN_PAGE = """<!doctype html><html lang="de"><head>{meta}<title>Größer als gedacht | Beispielkonferenz</title></head>
<body><header><a href="/">Beispielkonferenz</a><nav><a href="/programm">Programm</a></nav></header>
<main><article><h1>Größer als gedacht</h1>
<p>Wie man mit <b>Ereignissen</b> statt Zuständen arbeitet – und warum das Übung braucht.</p>
<h2>Inhalt</h2><ul><li>Grundlagen</li><li>Fallstricke<ul><li>Uhren</li><li>Reihenfolge</li></ul></li></ul>
</article></main><footer>Impressum</footer></body></html>"""


def read(text: str, *, title: str = "Some talk") -> PageText:
    return read_page(text.encode(), content_type="text/html; charset=utf-8", url=URL, session_title=title)


def test_text_of_page_is_kept_with_its_structure() -> None:
    page = read(CONFERENCE_PAGE, title="Ledgers that never forget")
    for markdown in (
        "State that is overwritten is *gone*.",
        "[our paper](https://conference.example/2025/talks/paper.html)",
        "## What you will learn",
        "- How **optimistic** appends work",
        "`seq < 2`",
        "### Agenda",
        "1. History\n2. Demonstration",
        "| Version | Year |\n| --- | --- |\n| 1.0 | 2023 |",
        "```\ngit clone https://conference.example/ledger.git\ncd ledger\n```",
    ):
        assert markdown in page.markdown


def test_menus_scripts_and_footers_are_removed() -> None:
    markdown = read(CONFERENCE_PAGE).markdown
    for text in ("Schedule", "News", "tracking", "Imprint", "Creative Commons", "ExampleConf'25"):
        assert text not in markdown


def test_title_language_intro_and_keywords_are_read() -> None:
    page = read(CONFERENCE_PAGE)
    assert page.title == "Ledgers that never forget"
    assert page.language == "en"
    assert page.intro == "Why an append-only log is the calmest way to keep state."
    assert page.keywords == ["databases", "event sourcing"]


def test_short_page_keeps_its_lists() -> None:
    page = read(
        "<html><body><nav><a href=/>Home</a></nav><h1>Hello</h1><p>A short talk about saying hello.</p>"
        "<ul><li>one</li><li>two</li></ul></body></html>"
    )
    assert page.markdown.endswith("A short talk about saying hello.\n\n- one\n- two")


def test_headings_start_at_level_two_without_the_title() -> None:
    page = read(
        "<main><h1>My Talk!</h1><p>It begins with some words.</p><h1>Part one</h1><p>More words here.</p>"
        "<h3>Detail</h3><p>And the end.</p></main>",
        title="My talk",
    )
    assert [line for line in page.markdown.splitlines() if line.startswith("#")] == ["## Part one", "#### Detail"]


UNMARKED_PAGE = """<html><head><title>A talk</title></head><body><div class="top"><a href="/">ExampleConf</a></div>
<div class="navbar"><ul><li><a href="/a">Programme</a></li><li><a href="/b">Venue</a></li></ul></div>
<div class="container"><div class="row"><div class="col-8"><h1>A talk</h1><div>Given by Ada, in <b>room</b> 5.</div>
<p>This talk is about things that matter.</p><h2>Outline</h2><ul><li>One</li><li>Two</li></ul>
<h2>Biography</h2><p>Ada writes databases.</p></div>
<div class="col-4 sidebar"><h3>Sponsors</h3><ul><li><a href="/s">Acme</a></li></ul></div></div></div>
<div class="footer"><p>Copyright ExampleConf</p></div></body></html>"""


def test_page_without_main_element_keeps_its_headings() -> None:
    assert read(UNMARKED_PAGE, title="A talk").markdown == (
        "This talk is about things that matter.\n\n## Outline\n\n- One\n- Two\n\n## Biography\n\nAda writes databases."
    )


@pytest.mark.parametrize(
    "template", ["<main>{}</main>", "<body>{}</body>", "<body><div><section>{}</section></div></body>"]
)
def test_headings_are_kept_in_any_container(template: str) -> None:
    text = "<h1>Other</h1><p>Some words.</p><h2>Part</h2><ul><li>a</li><li>b</li></ul><h3>Detail</h3><p>The end.</p>"
    page = read(template.format(text))
    assert page.markdown == "## Other\n\nSome words.\n\n### Part\n\n- a\n- b\n\n#### Detail\n\nThe end."


@pytest.mark.parametrize(
    ("encoding", "content_type", "meta"),
    [
        ("utf-8", "text/html; charset=utf-8", ""),
        ("utf-8", HTML, '<meta charset="utf-8">'),
        ("utf-8", HTML, ""),
        ("utf-8", 'text/html; charset="UTF8"', '<meta charset="iso-8859-1">'),
        ("windows-1252", "text/html;charset=ISO-8859-1", ""),
        ("windows-1252", HTML, '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">'),
        ("windows-1252", HTML, ""),
        ("windows-1252", "text/html; charset=nonsense", "<meta charset=windows-1252>"),
        ("utf-8", HTML, "<meta charset=utf-16>"),
        ("utf-8-sig", "text/html; charset=iso-8859-1", ""),
        ("utf-16", HTML, ""),
    ],
)
def test_umlauts_are_decoded_for_every_encoding_declaration(encoding: str, content_type: str, meta: str) -> None:
    body = GERMAN_PAGE.format(meta=meta).encode(encoding)
    page = read_page(body, content_type=content_type, url=URL, session_title="x")
    assert page.title == "Größer als gedacht"
    assert "Zuständen arbeitet – und warum das Übung braucht" in page.markdown
    assert "- Fallstricke\n  - Uhren" in page.markdown
    assert page.language == "de"


def test_xhtml_with_xml_declaration_is_read() -> None:
    text = '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><body><p>Übung.</p></body></html>'
    assert read(text).markdown == "Übung."


def test_shift_jis_page_is_read() -> None:
    body = "<html><body><p>忘れない台帳についての短い講演です。</p></body></html>".encode("shift_jis")
    assert (
        "忘れない台帳"
        in read_page(body, content_type="text/html; charset=Shift_JIS", url=URL, session_title="").markdown
    )


@pytest.mark.parametrize("media_type", ["application/pdf", "image/png", "text/plain", "application/json"])
def test_media_type_other_than_html_is_rejected(media_type: str) -> None:
    with pytest.raises(ProcessorError) as caught:
        require_html_type(media_type)
    assert (caught.value.code, caught.value.transient) == ("NOT_HTML", False)


@pytest.mark.parametrize("body", [b"%PDF-1.7 ...", b"just words", b"\x89PNG\r\n"])
def test_body_without_media_type_that_is_not_html_is_rejected(body: bytes) -> None:
    with pytest.raises(ProcessorError) as caught:
        read_page(body, content_type="", url=URL, session_title="")
    assert caught.value.code == "NOT_HTML"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        codecs.BOM_UTF8,
        b"<html><head><title>Talk</title></head><body></body></html>",
        b"<html><body><script>render()</script><noscript>Please enable it</noscript></body></html>",
        b"<html><body><img src=x.png></body></html>",
    ],
)
def test_page_without_text_is_rejected(body: bytes) -> None:
    with pytest.raises(ProcessorError) as caught:
        read_page(body, content_type=HTML, url=URL, session_title="Talk")
    assert (caught.value.code, caught.value.transient) == ("EMPTY_PAGE", False)


def test_page_without_main_text_uses_all_visible_text() -> None:
    page = read("<html><body><aside>Only <b>an</b>\naside<br>2. *here*<script>no</script></aside></body></html>")
    assert page.markdown == "Only **an** aside\\\n2\\. \\*here\\*"
    assert len(page.warnings) == 1


def test_very_long_page_is_cut_with_warning() -> None:
    page = read("<main>" + "".join(f"<p>Many words in a row, this is row {n}.</p>" for n in range(7_000)) + "</main>")
    assert len(page.markdown) <= MAX_CHARACTERS
    assert "too long" in page.warnings[0]


def test_html_and_images_in_page_text_stay_text() -> None:
    markdown = read(CONFERENCE_PAGE).markdown
    rendered = MarkdownIt("commonmark").render(markdown)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in rendered
    assert "<script" not in rendered
    assert "<img" not in rendered


def test_link_that_is_not_http_keeps_only_its_text() -> None:
    page = read(
        '<main><p>A page with <a href="javascript:alert(1)">bad</a>, <a href="#top">inner</a>, '
        '<a href="http://[broken">broken</a> and <a href="/a (1)">good</a> links in it.</p></main>'
    )
    assert page.markdown == (
        "A page with bad, inner, broken and [good](https://conference.example/a%20%281%29) links in it."
    )


FRAGMENTS = [*"`~<>![]()#*_-+=|&;:\\ \n\t'\"/.1ax", "script", "javascript:", "http://", "```", "](", "<!--"]
NASTY_MARKDOWN = st.lists(st.sampled_from(FRAGMENTS)).map("".join)


@without_deadline
@given(NASTY_MARKDOWN)
def test_sanitized_markdown_has_no_html_or_open_blocks(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"{sanitize_markdown(text)}\n\n# The end\n")
    all_tokens = [token for block in tokens for token in (block, *(block.children or []))]
    assert not {"html_block", "html_inline", "image"} & {token.type for token in all_tokens}
    assert (tokens[-3].tag, tokens[-3].level, tokens[-2].content) == ("h1", 0, "The end")
    targets = [str(token.attrs["href"]) for token in all_tokens if token.type == "link_open"]
    assert all(target.startswith(("http://", "https://", "mailto:")) for target in targets)


@without_deadline
@given(NASTY_MARKDOWN | st.text())
@example("__0__")
def test_escaped_text_renders_as_the_original(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(escape_text(text))
    words = "".join(child.content for block in tokens for child in block.children or [])
    assert words == " ".join(text.split()).replace("\x00", "\ufffd")
    assert {block.type for block in tokens} <= {"paragraph_open", "inline", "paragraph_close"}


@without_deadline
@given(st.text())
def test_escaped_link_target_stays_one_link(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(f"[x](https://conference.example/{escape_link_target(text)}) end")
    kinds = [child.type for child in tokens[1].children or []]
    assert kinds == ["link_open", "text", "link_close", "text"]


def test_code_in_list_keeps_its_blank_lines() -> None:
    page = read(
        "<main><h2>Steps</h2><ul><li><p>Write:</p><pre>a:\n\n- one\n\n- two</pre></li><li>Run it.</li></ul></main>"
    )
    assert "- Write:\n\n  ```\n  a:\n\n  - one\n\n  - two\n  ```\n" in page.markdown
