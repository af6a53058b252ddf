"""HTML becomes Markdown with the same structure, text and code. No page can make it unsafe."""

from __future__ import annotations

import re
from typing import Any

import lxml.html  # type: ignore[import-untyped]  # it ships no types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from jobledger.workers.processors.session.html_markdown import convert_html_to_markdown
from jobledger.workers.processors.session.safe_markdown import sanitize_markdown
from jobledger.workers.processors.session.visible_text import remove_non_text_elements
from tests.processors.session.fixtures import without_deadline

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def convert(html: str) -> str:
    tree = lxml.html.document_fromstring(f"<html><body>{html}</body></html>")
    remove_non_text_elements(tree)
    markdown, _ = convert_html_to_markdown(tree.find("body"), url="https://conference.example/talks/", base="")
    assert sanitize_markdown(markdown).strip() == markdown.strip()  # it is safe already
    return markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>a <b> bold </b>text</p>", "a **bold** text"),
        ("<p><b>Hello:</b>World</p>", "**Hello**:World"),
        ("<p>see<i>(below)</i>there</p>", "see(*below*)there"),
        ("<p><b>&nbsp;nbsp</b><b></b><b> </b></p>", "**nbsp**"),
        ("<p><b>a<br>b</b></p>", "**a**\\\n**b**"),
        ("<b><div>x</div><div>y</div></b>", "**x**\n\n**y**"),
        ("<strong><h3>Head</h3></strong>", "### Head"),
        ("<h2><b>Head</b></h2>", "## **Head**"),
        ("<p><strong>a <strong>b</strong></strong> <b><i>both</i></b></p>", "**a b** ***both***"),
        ("<p><b>a</b><i>b</i></p>", "**a***b*"),
        ("<p><b><code>x</code></b>y</p>", "`x`y"),
        ("<p>彼は<b>「はい」</b>と<b>強調。</b>次</p>", "彼は「**はい**」と**強調**。次"),
        ("<p><del>old</del> <ins>new</ins></p>", "~~old~~ new"),
    ],
)
def test_emphasis_touches_its_text(html: str, markdown: str) -> None:
    assert convert(html) == markdown
    assert "*" not in re.sub(r"<[^>]*>", "", RENDERER.render(markdown))


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<div>one<br><br>two<br>three<br/><br/><br/>four</div>", "one\n\ntwo\\\nthree\n\nfour"),
        ("<p>one<br>\n<br>\n two</p>", "one\n\ntwo"),
        ("<div>a<div>b</div>c<p>d</p>e</div>", "a\n\nb\n\nc\n\nd\n\ne"),
        ("<div style='white-space: pre-line'>One\nTwo\n\nThree</div>", "One\\\nTwo\n\nThree"),
        ("<p class='whitespace-pre-wrap'>One\nTwo</p>", "One\\\nTwo"),
        ("<p>A line\n   and its end</p>", "A line and its end"),
        ("<p>日本語の\n改行です。\nEnglish</p>", "日本語の改行です。 English"),
        ("<p>한국어\n문장</p>", "한국어 문장"),
        ("<p>a&nbsp;&nbsp; b c&nbsp;d</p><p>&nbsp;</p>", "a b c\u00a0d"),
        ("<p>soft&shy;hyphen zero&#8203;width</p>", "softhyphen zerowidth"),
        ("<p>long<wbr>word</p>", "longword"),
        ("<p>1. a<br># b<br>- c<br>=== d</p>", "1\\. a\\\n\\# b\\\n\\- c\\\n\\=== d"),
        ("<h2></h2><h2> <span></span></h2><p>x</p>", "x"),
        ("<h2># hash #</h2>", "## # hash \\#"),
        ("<h3><button>Section</button></h3><h3>Title<button>Copy</button></h3>", "### Section\n\n### Title"),
        ("<details><summary>More</summary><p>text</p></details>", "**More**\n\ntext"),
        ("<blockquote><p>quote</p><footer>Author</footer></blockquote>", "> quote\n>\n> Author"),
        (
            "<figure><img src=a.png alt=Chart><figcaption>Caption</figcaption></figure>",
            "![Chart](assets/page-image-1)\n\nCaption",
        ),
        (
            "<a href=/x><h3>Card</h3><p>text</p></a>",
            "### [Card](https://conference.example/x)\n\n[text](https://conference.example/x)",
        ),
        ("<p>a<a href=' /y '> spaced </a>b</p>", "a [spaced](https://conference.example/y) b"),
    ],
)
def test_paragraphs_and_headings_are_kept(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<p><abbr title='Event Store'>ES</abbr> and <abbr title='Event Store'>ES</abbr></p>",
            "ES (Event Store) and ES",
        ),
        ("<p><q>quote</q> <kbd>Ctrl</kbd>+<kbd>C</kbd> <var>x</var></p>", "“quote” `Ctrl`+`C` *x*"),
        ("<p><ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby></p>", "漢字(かんじ)"),
        (
            "<p>x<sup>2</sup> H<sub>2</sub>O 10<sup>-3</sup> 2<sup>nd</sup> e<sup>a+b</sup></p>",
            "x² H₂O 10⁻³ 2nd e^(a+b)",
        ),
        (
            "<p>Claim<sup><a href='#f1'>[1]</a></sup></p><ol><li id=f1>Note <a href='#r1'>↩</a></li></ol>",
            "Claim¹\n\n1. Note",
        ),
        ("<p>Claim<a href='#fn:1'>1</a> see <a href='#part'>2</a></p>", "Claim¹ see 2"),
        ("<p><code>x `y` z</code> <code>``</code></p>", "``x `y` z`` ``` `` ```"),
    ],
)
def test_inline_elements_keep_their_meaning(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>Hi!<a href=/x>you</a></p>", "Hi\\![you](https://conference.example/x)"),
        ("<p>`<code>word</code></p>", "\\``word`"),
        ("<pre>`</pre>", "```\n`\n```"),
        ("<pre>```</pre>", "````\n```\n````"),
        ("<h2><ul>word</ul></h2>", "## word"),
        ("<p><a href=/x>[a]:</a></p>", "[\\[a\\]:](https://conference.example/x)"),
        ("<ul><li><code>a<br>b</code>c</ul>", "- ```\n  a\n  b\n  ```\n\n  c"),
        ("<p>.<i><b>.word</b>word</i></p>", ".***.word**word*"),
        ("<p><i>word</i><b>word<i>word</i></b></p>", "word**wordword**"),
        ("<p><b><i>word</i>“”<i>.</i></b></p>", "**word“”.**"),
    ],
)
def test_adjacent_markup_is_not_misread(html: str, markdown: str) -> None:
    assert convert(html) == markdown
    assert "*" not in re.sub(r"<[^>]*>", "", RENDERER.render(markdown))


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<ol start=3><li>a<li>b</ol>", "3. a\n4. b"),
        ("<ol reversed><li>x<li>y</ol>", "- 2\\. x\n- 1\\. y"),
        ("<ol type=a><li>x<li>y</ol>", "- a. x\n- b. y"),
        ("<ol type=I start=4><li>x<li>y</ol>", "- IV. x\n- V. y"),
        ("<ol><li value=5>v<li>w</ol>", "5. v\n6. w"),
        ("<ol><li>a<li value=7>b</ol>", "- 1\\. a\n- 7\\. b"),
        ("<ol><li>a</ol><ol><li>b</ol>", "1. a\n\n1) b"),
        ("<ul><li>a</ul><ul><li>b</ul>", "- a\n\n* b"),
        ("<ul><li>a</li><ul><li>b</li></ul><li>c</li></ul>", "- a\n  - b\n- c"),
        ("<ul><div><li>in div</li></div>loose<li></li></ul>", "- in div\n- loose"),
        ("<ul><li><h4>Head</h4><p>body</p></li></ul>", "- **Head**\n\n  body"),
        ("<ul><li>a<pre>x\n\n  y</pre></li></ul>", "- a\n\n  ```\n  x\n\n    y\n  ```"),
        ("<ul><li>a<ul><li>b<pre>x\n  y</pre></ul></ul>", "- a\n  - b\n\n    ```\n    x\n      y\n    ```"),
        ("<li>lost</li><li>items</li>", "- lost\n- items"),
        ("<ul><li><input type=checkbox checked> done<li><input type=checkbox> open</ul>", "- ☑ done\n- ☐ open"),
        (
            "<dl><dt>Term</dt><dd>Meaning</dd><dt><code>x</code></dt><dd>a<p>b</p></dd></dl>",
            "**Term**\n\nMeaning\n\n`x`\n\na\n\nb",
        ),
    ],
)
def test_lists_keep_numbers_and_nesting(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<table><tr><th>A<th>B</tr><tr><td><ul><li>x<li>y</ul><td><p>p</p><p>q|r</p></tr></table>",
            "| A | B |\n| --- | --- |\n| x; y | p q\\|r |",
        ),
        (
            "<table><tr><td colspan=2>wide<tr><td rowspan=2>tall<td>1<tr><td>2</table>",
            "|  |  |\n| --- | --- |\n| wide |  |\n| tall | 1 |\n|  | 2 |",
        ),
        (
            "<table><tr><th>F<th>G</tr><tr><td><pre>f(x)</pre><td>\\(|x|\\)</tr></table>",
            "| F | G |\n| --- | --- |\n| `f(x)` | $\\vert x\\vert$ |",
        ),
        ("<table role=presentation><tr><td>left<td>right</table>", "left\n\nright"),
        (
            "<table><caption>Cap</caption><tr><th>A<th>B<tr><td>1<td>2</table>",
            "Cap\n\n| A | B |\n| --- | --- |\n| 1 | 2 |",
        ),
    ],
)
def test_tables_keep_the_text_of_their_cells(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    "html",
    [
        "<pre><code>a\n\n\n  b\n</code></pre>",
        "<pre>a<br><br><br>  b</pre>",
        "<code>a<br><br><br>&nbsp;&nbsp;b</code>",
        "<pre><div>a</div><div><br></div><div></div><div>  b</div></pre>",
        "<pre><ol><li>a</li><li></li><li></li><li>  b</li></ol></pre>",
        "<pre class=shiki><code><span class=line>a</span>\n<span class=line></span>\n<span class=line></span>\n"
        "<span class=line>  b</span></code></pre>",
        "<pre class=prism-code><code><span class=token-line>a<br></span>"
        "<span class=token-line><span style='display:inline-block'></span><br></span>"
        "<span class=token-line><br></span><span class=token-line>  b<br></span></code></pre>",
        "<pre class=chroma><code><span class=line><span class=ln>1</span><span class=cl>a\n</span></span>"
        "<span class=line><span class=ln>2</span><span class=cl>\n</span></span>"
        "<span class=line><span class=ln>3</span><span class=cl>\n</span></span>"
        "<span class=line><span class=ln>4</span><span class=cl>  b\n</span></span></code></pre>",
        "<table class=highlight><tr><td class=linenos><pre>1\n2\n3\n4</pre>"
        "<td class=code><pre>a\n\n\n  b</pre></table>",
        "<table><tr><td class=blob-num data-line-number=1><td class=blob-code>a"
        "<tr><td class=blob-num><td class=blob-code><tr><td class=blob-num><td class=blob-code>"
        "<tr><td class=blob-num><td class=blob-code>  b</table>",
        "<div class=syntaxhighlighter><table><tr><td class=gutter><div class=line>1</div><div class=line>2</div>"
        "<td class=code><div class=container><div class=line><code>a</code></div><div class=line></div>"
        "<div class=line></div><div class=line><code>&nbsp;&nbsp;</code><code>b</code></div></div></table></div>",
        "<pre><code class=hljs><table class=hljs-ln><tr><td class=hljs-ln-numbers data-line-number=1><td>a<tr><td><td>"
        "<tr><td><td><tr><td class=hljs-ln-numbers data-line-number=4><td>  b</table></code></pre>",
        "<div class=code><button>Copy</button><pre><span style='user-select: none'>1 </span>a\n\n\n  b</pre></div>",
    ],
)
def test_code_lines_are_kept_without_numbers_and_buttons(html: str) -> None:
    assert convert(html) == "```\na\n\n\n  b\n```"


@pytest.mark.parametrize(
    ("html", "language"),
    [
        ("<pre><code class='language-python3'>x</code></pre>", "python"),
        ("<pre class='lang-js prettyprint'>x</pre>", "js"),
        ("<pre class='brush: java; gutter: true'>x</pre>", "java"),
        ("<pre class='brush:csharp'>x</pre>", "csharp"),
        ("<div class='highlight-python3 notranslate'><div class=highlight><pre>x</pre></div></div>", "python"),
        ("<div class='highlight highlight-source-shell'><pre>x</pre></div>", "shell"),
        (
            "<div class=sourceCode><pre class='sourceCode haskell'><code>x</code></pre></div>",
            "haskell",
        ),
        ("<pre><code class='hljs rust'>x</code></pre>", "rust"),
        ("<pre><code class='bash'>x</code></pre>", "bash"),
        ("<pre class='src src-emacs-lisp'>x</pre>", "emacs-lisp"),
        ("<pre class='lang:ruby decode:true'>x</pre>", "ruby"),
        ("<pre data-lang='C++'>x</pre>", "c++"),
        ("<figure data-language=ts><pre><code>x</code></pre></figure>", "ts"),
        ("<pre data-enlighter-language=php>x</pre>", "php"),
        ("<pre lang=go>x</pre>", "go"),
        ("<pre lang=en>x</pre>", ""),
        ("<pre class='language-plaintext code-block'>x</pre>", ""),
        ("<pre class='language-a`b'>x</pre>", ""),
    ],
)
def test_code_language_is_read_from_all_usual_attributes(html: str, language: str) -> None:
    assert convert(html) == f"```{language}\nx\n```"


def test_prose_in_pre_is_text() -> None:
    line = (
        "This abstract was pasted into a preformatted element, and its author has never pressed the return key in it. "
        * 2
    )
    assert convert(f"<pre>{line}\n\nSecond paragraph.</pre>") == f"{line.strip()}\n\nSecond paragraph."


def test_all_panels_of_tabs_are_shown_with_their_labels() -> None:
    assert (
        convert(
            "<ul role=tablist><li role=tab>npm<li role=tab>yarn</ul><div><div role=tabpanel><pre>npm i</pre></div>"
            "<div role=tabpanel hidden><pre>yarn add</pre></div></div>"
        )
        == "**npm**\n\n```\nnpm i\n```\n\n**yarn**\n\n```\nyarn add\n```"
    )


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<img src=a.png alt='A [chart]'>", "![A \\[chart\\]](assets/page-image-1)"),
        ("<p>a <img src=a.png alt='' > b <img src=p.gif width=1 height=1 alt=x></p>", "a b x"),
        ("<a href=/><img src=i.png alt=Twitter width=24></a>", "[Twitter](https://conference.example/)"),
        ("<img class=emoji alt=🎉 src=e.png><p>x</p>", "x"),
        (
            "<a href=/big.jpg><img src=a.jpg alt=Photo></a>",
            "[![Photo](assets/page-image-1)](https://conference.example/big.jpg)",
        ),
        ("<img src='data:image/gif;base64,R0lG' data-src=/real.jpg alt=Lazy>", "![Lazy](assets/page-image-1)"),
        (
            "<img src='data:image/svg+xml,x' alt=Lazy><noscript><img src=/real.jpg alt=Lazy></noscript>",
            "![Lazy](assets/page-image-1)",
        ),
        ("<picture><source srcset='p.webp 800w'><img src=p.jpg alt=Pic></picture>", "![Pic](assets/page-image-1)"),
        ("<header><img src=logo.png alt=Logo></header><p>x</p>", "x"),
        ("<p>x<img src=https://www.facebook.com/tr?id=1 alt=y></p>", "x"),
        ("<img src='javascript:alert(1)' alt=Text>", "Text"),
        (
            "<table><tr><th>A<th>B<tr><td><img src=a.png alt='a|b'><td>c</table>",
            "| A | B |\n| --- | --- |\n| ![a\\|b](assets/page-image-1) | c |",
        ),
        ("<svg role=img aria-label='Diagram of the log'><path></svg>", "Diagram of the log"),
    ],
)
def test_images_keep_their_alternative_text(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<iframe src='https://www.youtube-nocookie.com/embed/abcdefghijk?start=30' title='My talk'></iframe>",
            "[Video: My talk](https://www.youtube.com/watch?v=abcdefghijk&t=30)",
        ),
        (
            "<iframe data-src='https://player.vimeo.com/video/123456?h=abcdef12'></iframe>",
            "[Video: vimeo.com](https://vimeo.com/123456/abcdef12)",
        ),
        (
            "<iframe src='//media.ccc.de/v/36c3-1-talk/oembed'></iframe>",
            "[Video: media.ccc.de](https://media.ccc.de/v/36c3-1-talk)",
        ),
        (
            "<iframe src='https://tube.example/videos/embed/0b1c-22' title=Tube></iframe>",
            "[Video: Tube](https://tube.example/w/0b1c-22)",
        ),
        (
            "<iframe src='https://w.soundcloud.com/player/?url=https%3A//soundcloud.com/a/b' title=Pod></iframe>",
            "[Audio: Pod](https://soundcloud.com/a/b)",
        ),
        (
            "<iframe src='https://docs.google.com/presentation/d/e/2PACX-1/embed?start=false' title=Slides></iframe>",
            "[Slides](https://docs.google.com/presentation/d/e/2PACX-1/pub)",
        ),
        (
            "<script class=speakerdeck-embed data-id=0123456789abcdef data-title=Deck></script>",
            "[Deck](https://speakerdeck.com/player/0123456789abcdef)",
        ),
        (
            "<lite-youtube videoid=abcdefghijk playlabel=Talk></lite-youtube>",
            "[Video: Talk](https://www.youtube.com/watch?v=abcdefghijk)",
        ),
        ("<iframe src='https://www.googletagmanager.com/ns.html?id=1'></iframe><p>x</p>", "x"),
        ("<iframe src='https://player.example/x' style='display:none'></iframe><p>x</p>", "x"),
        ("<iframe src='https://player.example/x' width=1 height=1></iframe><p>x</p>", "x"),
        (
            "<iframe src='https://www.youtube.com/embed/abcdefghijk' title=A></iframe><p>x</p>"
            "<iframe src='https://www.youtube-nocookie.com/embed/abcdefghijk?rel=0' title=B></iframe>",
            "[Video: A](https://www.youtube.com/watch?v=abcdefghijk)\n\nx",
        ),
        (
            "<video src=/v.mp4 title=A></video><p>x</p><video title=B><source src=/v.mp4></video>",
            "[Video: A](https://conference.example/v.mp4)\n\nx",
        ),
        ("<iframe src='javascript:alert(1)'></iframe><p>x</p>", "x"),
        (
            "<video title=Recording><source src=/v.mp4><track kind=captions label=Deutsch src=/de.vtt>Old.</video>",
            "[Video: Recording](https://conference.example/v.mp4) · [Deutsch](https://conference.example/de.vtt)",
        ),
        ("<audio src=talk.mp3></audio>", "[Audio: talk](https://conference.example/talks/talk.mp3)"),
        (
            "<object data=slides.pdf type=application/pdf><a href=slides.pdf>Slides</a></object>",
            "[slides.pdf](https://conference.example/talks/slides.pdf)",
        ),
    ],
)
def test_players_become_links(html: str, markdown: str) -> None:
    assert convert(html) == markdown


TAGS = [
    "b",
    "i",
    "em",
    "strong",
    "del",
    "code",
    "p",
    "div",
    "h2",
    "h5",
    "ul",
    "li",
    "blockquote",
    "a href=https://a.example/",
    "span",
    "table",
    "tr",
    "td",
    "pre",
    "sup",
    "q",
]
TEXTS = [
    "word",
    " ",
    "a ",
    " b",
    ".",
    "(x)",
    "「は」",
    "é!",
    "\n",
    "\u00a0",
    "1. ",
    "- ",
    "# ",
    "&lt;i>",
    "`",
    "]",
    "[a]:",
    "|",
    "$",
    "\\",
    "https://a.example",
    "<br>",
    "<img src=x.png alt='a]('>",
]
TREES = st.recursive(
    st.sampled_from(TEXTS),
    lambda inner: st.tuples(st.sampled_from(TAGS), st.lists(inner, max_size=4)).map(
        lambda pair: f"<{pair[0]}>{''.join(pair[1])}</{pair[0].split()[0]}>"
    ),
    max_leaves=20,
)


@without_deadline
@given(st.lists(TREES, max_size=4).map("".join))
def test_converted_page_has_no_literal_markup_and_nothing_unsafe(html: str) -> None:
    markdown = convert(html)
    tokens: list[Any] = RENDERER.parse(f"{markdown}\n\n# The end\n")
    pieces = [token for block in tokens for token in (block, *(block.children or []))]
    assert not {"html_block", "html_inline"} & {token.type for token in pieces}
    assert all(str(token.attrs["src"]).startswith("assets/page-image-") for token in pieces if token.type == "image")
    assert all(str(token.attrs["href"]).startswith("https://") for token in pieces if token.type == "link_open")
    assert (tokens[-3].tag, tokens[-3].level, tokens[-2].content) == ("h1", 0, "The end")
    texts = [token.content for token in pieces if token.type == "text"]
    assert not any("*" in text or "~~" in text for text in texts)


@without_deadline
@given(st.lists(TREES, max_size=4).map("".join))
def test_converted_page_keeps_all_words(html: str) -> None:
    rendered = lxml.html.document_fromstring(f"<div>{RENDERER.render(convert(html))}</div>")
    original = lxml.html.document_fromstring(f"<div>{html}</div>")
    words = ["".join(re.findall(r"[a-zé「は」]", "".join(tree.itertext()))) for tree in (original, rendered)]
    assert words[0] == words[1]


def test_language_around_listing_with_line_numbers_is_found() -> None:
    cells = "<td class=linenos><pre>1</pre><td class=code><div><pre>x = 1</pre></div>"
    table = f"<div class=highlight><table class=highlighttable><tr>{cells}</table></div>"
    assert convert(f"<div class='highlight-python notranslate'>{table}</div>") == "```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        (
            "<table><tr><td><b>Part</b><td><b>Price</b><tr><td>Motor<td>$2</table>",
            "| Part | Price |\n| --- | --- |\n| Motor | $2 |",
        ),
        (
            "<table><tr><td><b>Motor</b><td>$2<tr><td>Pump<td>$3</table>",
            "|  |  |\n| --- | --- |\n| **Motor** | $2 |\n| Pump | $3 |",
        ),
        ("<table><tr><td>Left text<td>Right text</table>", "Left text\n\nRight text"),
    ],
)
def test_table_without_head_uses_bold_row_or_becomes_text(html: str, markdown: str) -> None:
    assert convert(html) == markdown


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>You learn:<br>- one<br>- two<br>Come!</p>", "You learn:\n\n- one\n- two\n\nCome!"),
        ("<p>You learn:<br>• one<br>• two</p>", "You learn:\n\n- one\n- two"),
        ("<p>You learn:<br>* one<br>* two</p>", "You learn:\n\n- one\n- two"),
        ("<p>Ten<br>- one<br>is nine</p>", "Ten\\\n\\- one\\\nis nine"),
    ],
)
def test_lines_with_signs_of_items_become_list(html: str, markdown: str) -> None:
    assert convert(html) == markdown
