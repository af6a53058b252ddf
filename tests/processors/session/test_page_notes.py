"""Notes of a page keep their meaning in Markdown: labels, footnotes, numbers of formulas, file names above code."""

from __future__ import annotations

import pytest

from jobledger.workers.processors.session.page import PageText, read_page

ABSTRACT = (
    "<p>Event sourcing has a reputation for turning small programs into large ones. This talk argues that the idea "
    "itself is small: write down what happened, and never change it.</p>"
)
MORE = (
    "<p>We take one modest system, a queue that renders conference recordings, and rebuild it around a ledger. Along "
    "the way we show which problems disappear.</p>"
)


def read(content: str, around: str = "") -> PageText:
    html = f"<html lang=en><body><nav><a href=/>Home</a></nav><main>{content}</main>{around}</body></html>"
    return read_page(
        html.encode(), content_type="text/html", url="https://conference.example/talk", session_title="Ledgers"
    )


@pytest.mark.parametrize(
    ("html", "label"),
    [
        ('<div class="admonition note"><p class="admonition-title">Note</p><p>{}</p></div>', "Note"),
        (
            '<div class="theme-admonition admonition_xJq3 alert"><div class="admonitionHeading_Gv"><span></span>warning'
            '</div><div class="admonitionContent_Bu"><p>{}</p></div></div>',
            "Warning",
        ),
        (
            '<div class="markdown-alert markdown-alert-tip"><p class="markdown-alert-title">Tip</p><p>{}</p></div>',
            "Tip",
        ),
    ],
)
def test_admonition_becomes_quotation_with_bold_label(html: str, label: str) -> None:
    text = "An average hides the worst minute. Look at the 99th percentile."
    assert f"> **{label}**\n>\n> {text}\n" in read(ABSTRACT + html.format(text) + MORE).markdown


@pytest.mark.parametrize(
    "html",
    [
        '<div class="codeBlockContainer"><div class="codeBlockTitle">simulate.py</div><div><pre><code>{}</code></pre>'
        "</div></div>",
        '<div class="highlight"><span class="filename">simulate.py</span><pre><code>{}</code></pre></div>',
        '<div class="literal-block-wrapper"><div class="code-block-caption"><span>simulate.py</span></div>'
        '<div class="highlight"><pre>{}</pre></div></div>',
    ],
)
def test_title_of_code_is_kept_above_code(html: str) -> None:
    code = "import heapq\n\ndef wait(load):\n    return load / (1 - load)"
    assert f"simulate.py\n\n```\n{code}\n```" in read(ABSTRACT + html.format(code) + MORE).markdown


@pytest.mark.parametrize(
    ("reference", "footnote", "markdown"),
    [
        (
            '<a href="#f1" id="r1" role="doc-noteref"><span>[</span>1<span>]</span></a>',
            '<aside class="footnote-list"><aside class="footnote brackets" id="f1" role="doc-footnote"><span '
            'class="label"><span>[</span><a role="doc-backlink" href="#r1">1</a><span>]</span></span>'
            "<p>Except the pigeon.</p></aside></aside>",
            "¹ Except the pigeon.",
        ),
        (
            '<sup id="fnref:1"><a class="footnote-ref" href="#fn:1">1</a></sup>',
            '<div class="footnote"><hr><ol><li id="fn:1"><p>Except the pigeon. '
            '<a class="footnote-backref" href="#fnref:1">↩</a></p></li></ol></div>',
            "1. Except the pigeon.",
        ),
        (
            '<sup><a href="#user-content-fn-1">1</a></sup>',
            '<section class="footnotes"><ol><li id="user-content-fn-1"><p>Except the pigeon.</p></li></ol></section>',
            "1. Except the pigeon.",
        ),
        (
            '<a class="footnote-reference" href="#footnote-1">1</a>',
            '<dl class="footnote brackets"><dt class="label" id="footnote-1">1</dt>'
            "<dd><p>Except the pigeon.</p></dd></dl>",
            "Except the pigeon.",
        ),
    ],
)
def test_footnote_of_kept_text_is_kept(reference: str, footnote: str, markdown: str) -> None:
    page = read(f"{ABSTRACT}<p>All the birds of the courtyard sing{reference}.</p>{MORE}{footnote}")
    assert "All the birds of the courtyard sing¹." in page.markdown
    assert page.markdown.endswith(markdown)


def test_number_of_formula_becomes_its_tag() -> None:
    html = '<div class="math"><span class="eqno">(1)<a href="#e1">¶</a></span>\\[E = m c^2\\]</div>'
    markdown = read(ABSTRACT + html + MORE).markdown
    assert "$$\nE = m c^2 \\tag{1}\n$$" in markdown
    assert "\\(1" not in markdown
    assert "\n(1)" not in markdown


def test_warning_quotes_longest_omitted_text() -> None:
    omitted = "The organizers thank the ferry company for the boats that brought the speakers to the island. " * 3
    page = read(ABSTRACT + MORE, around=f"<div><div><p>{omitted}</p></div></div>")
    assert omitted[:40] not in page.markdown
    assert f"begins: “{omitted[:40]}" in page.warnings[0]


def test_last_sentence_with_file_is_kept_before_list_of_links() -> None:
    note = '<p><b>Note:</b> The slides are <a href="/slides.pdf">here</a>.</p>'
    links = '<div><ul><li><a href="#">Google Calendar</a></li><li><a href="#">iCalendar</a></li><li><a href="#">Outlook'
    page = read(f"<div>{ABSTRACT}{MORE}{note}</div>{links}</a></li></ul></div>")
    assert page.markdown.endswith("**Note:** The slides are [here](https://conference.example/slides.pdf).")
