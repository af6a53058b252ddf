# ruff: noqa: E501 - the lines of HTML are easier to compare unbroken
"""The text of a talk is kept on pages of the usual conference systems, and what surrounds it is removed.

Each layout has the structure and class names of a real system. Elements with `data-talk` are the talk's text. Those with
`data-any` do not count, such as date and room. Everything else is boilerplate.
"""

from __future__ import annotations

import lxml.html  # type: ignore[import-untyped]  # it ships no types
import pytest

from benchmarks.extraction.extractors import render_text
from benchmarks.extraction.scores import Score, count_tokens, score_text
from jobledger.workers.processors.session.boilerplate import remove_boilerplate
from jobledger.workers.processors.session.page import PageText, read_page

TITLE = "Ledgers that never forget"
SPEAKER = "Maren Okafor"
ABSTRACT = (
    "Event sourcing has a reputation for turning small programs into large ones. This talk argues that the idea itself is "
    "small: write down what happened, never change it, and compute everything else."
)
MORE = (
    "We take one modest system, a queue that renders conference recordings, and rebuild it around a ledger. Along the way "
    "we show which problems disappear, and which ones merely move house."
)
BIOGRAPHY = "Maren keeps the booking system of a ferry company afloat, and spent nine years in an audit office."
MENU = "".join(
    f'<li><a href="/{word}">{word}</a></li>' for word in ("Schedule", "Venue", "Tickets", "Sponsors", "News")
)
FOOTER = (
    '<footer><p>© ExampleConf association</p><a href="/imprint">Imprint</a> <a href="/privacy">Privacy</a></footer>'
)

LAYOUTS = {
    "pretalx": f"""<header><nav><ul>{MENU}</ul></nav></header><main id="main-container"><article>
<h3 class="talk-title" data-any>{TITLE} <small>2025-09-01, 10:00, Hall A</small></h3><div class="talk-content">
<section class="abstract" data-talk><p>{ABSTRACT}</p></section><hr>
<section class="description" data-talk><p>{MORE}</p><ul><li>History</li><li>Replays</li></ul></section></div>
<div class="pretalx-session"><div class="pretalx-session-info"><div class="title" data-talk>
<a href="/speaker/1">{SPEAKER}</a></div><div class="abstract" data-talk><p>{BIOGRAPHY}</p></div></div></div>
</article></main>{FOOTER}""",
    "frab": f"""<div id="wrapper"><div id="header"><a href="/">ExampleConf</a></div><div id="menu"><ul>{MENU}</ul></div>
<div id="main-content"><h1 class="title" data-any>lecture: {TITLE}</h1><div class="column left" id="basic">
<p class="abstract" data-talk>{ABSTRACT}</p><p class="description" data-talk>{MORE}</p></div>
<div class="column" id="sidebar"><p data-any><b>Day:</b> 2025-09-01<br><b>Room:</b> Hall A</p><h3>Speakers</h3>
<table class="list"><tr><td data-talk><a href="/speakers/1">{SPEAKER}</a></td></tr></table></div></div></div>""",
    "indico": f"""<div class="page-header"><ul>{MENU}</ul></div><div class="conf_leftMenu"><ul>{MENU}</ul></div>
<div class="confBodyBox"><div class="contribution-display"><h1 data-any>{TITLE}</h1>
<div class="infogrid" data-any>1 Sept 2025, 10:00 Hall A</div><section><h2>Speaker</h2><div data-talk>{SPEAKER}</div></section>
<section><h2>Description</h2><div class="editor-output" data-talk><p>{ABSTRACT}</p><p>{MORE}</p></div></section></div></div>
<div class="footer">Powered by a conference system</div>""",
    "sched": f"""<div class="sched-nav"><ul>{MENU}</ul></div><div id="sched-content-inner"><div class="sched-container">
<span class="event"><a class="name" data-any>{TITLE}</a></span><div class="sched-event-details" data-any>Monday 10:00 Hall A</div>
<div class="tip-description" data-talk>{ABSTRACT}<br><br>{MORE}</div><div class="tip-roles"><h3>Speakers</h3>
<div class="sched-person"><h2 data-talk><a href="/speaker/1">{SPEAKER}</a></h2>
<div class="sched-event-details-role-bio" data-talk>{BIOGRAPHY}</div></div></div></div></div>
<div class="sched-sidebar"><h3>Popular</h3><ul><li><a href="/1">Another talk about queues</a></li>
<li><a href="/2">A third talk about logs</a></li></ul></div>""",
    "sessionize": f"""<div class="c-nav"><ul>{MENU}</ul></div><section class="sz-modal"><div class="sz-session sz-session--full">
<h3 class="sz-session__title" data-any>{TITLE}</h3><div class="sz-session__room" data-any>Hall A</div>
<p class="sz-session__description" data-talk>{ABSTRACT}</p><p class="sz-session__description" data-talk>{MORE}</p>
<div class="sz-speaker sz-speaker--full"><h3 class="sz-speaker__name" data-talk>{SPEAKER}</h3>
<p class="sz-speaker__bio" data-talk>{BIOGRAPHY}</p></div></div></section>{FOOTER}""",
    "docusaurus": f"""<div id="__docusaurus"><nav class="navbar"><ul>{MENU}</ul></nav>
<div id="__docusaurus_skipToContent_fallback" class="main-wrapper"><main><article><h1 data-any>{TITLE}</h1>
<div data-talk><p>{ABSTRACT}</p><p>{MORE}</p></div></article></main></div>{FOOTER}</div>""",
    "sphinx": f"""<div class="related" role="navigation"><ul>{MENU}</ul></div><div class="document"><div class="body" role="main">
<section id="talk"><h1 data-any>{TITLE}<a class="headerlink" href="#talk">¶</a></h1><p data-talk>{ABSTRACT}</p>
<section id="related-work" data-talk><h2>Related work<a class="headerlink" href="#related-work">¶</a></h2><p>{MORE}</p>
<div class="highlight-python3"><pre>ledger.append(event)</pre></div></section></section></div></div>
<div class="sphinxsidebar" role="navigation"><h3>Table of Contents</h3><ul><li><a href="#talk">Ledgers</a></li>
<li><a href="#related-work">Related work</a></li><li><a href="#more">More</a></li></ul></div>""",
    "wordpress": f"""<div id="masthead"><ul class="menu">{MENU}</ul></div><div id="content"><article class="post">
<header class="entry-header"><h1 class="entry-title" data-any>{TITLE}</h1></header><div class="entry-content">
<div data-talk><p>{ABSTRACT}</p><p>{MORE}</p></div><div class="wpcs-speaker"><h4 data-talk>{SPEAKER}</h4>
<p data-talk>{BIOGRAPHY}</p></div><div class="sharedaddy"><h3>Share this:</h3><ul><li><a href="https://x.example">X</a></li>
<li><a href="https://f.example">F</a></li><li><a href="https://l.example">L</a></li></ul></div></div></article>
<aside class="widget-area"><h2>Recent posts</h2><ul><li><a href="/p1">Call for papers is open</a></li></ul></aside></div>{FOOTER}""",
    "unmarked": f"""<div class="row"><div class="c3"><ul>{MENU}</ul></div><div class="c9"><div class="t" data-any>{TITLE}</div>
<div data-talk>{ABSTRACT}<br><br>{MORE}</div></div></div><div class="row"><div class="c12">© ExampleConf</div></div>""",
    "footer of an article": f"""<main><h1 data-talk>{SPEAKER}</h1> <article class="card"><header data-any>{TITLE}</header>
<footer data-talk><p>{BIOGRAPHY}</p><p>{ABSTRACT}</p><p>{MORE}</p></footer></article>
<footer><p><a href='/'>ExampleConf</a> is a trademark of <a href='/f'>a foundation</a>.</p></footer></main>""",
    "sections named ads": "<main>"
    + f'<section class="part part--ads" data-talk><p>{ABSTRACT}</p><p>{MORE}</p></section>' * 3
    + "</main>"
    + FOOTER,
    "table": f"""<table><tr><td><a href="/a">Home</a><br><a href="/b">Programme</a><br><a href="/c">Travel</a></td>
<td><b data-any>{TITLE}</b><p data-talk>{ABSTRACT}</p><p data-talk>{MORE}</p>
<table data-talk><tr><th>Version</th><th>Year</th></tr><tr><td>1.0</td><td>2023</td></tr></table></td></tr></table>""",
}


def read(body: str, **changes: str) -> PageText:
    html = f"<!doctype html><html lang=en><head><title>{TITLE} | ExampleConf</title></head><body>{body}</body></html>"
    return read_page(
        html.encode(),
        content_type="text/html; charset=utf-8",
        url="https://conference.example/talks/1",
        session_title=changes.get("title", TITLE),
        speakers=[SPEAKER],
    )


def score(body: str, text: str) -> Score:
    tree = lxml.html.fromstring(f"<html><body>{body}</body></html>")
    words = {
        mark: count_tokens(" ".join(" ".join(element.itertext()) for element in tree.xpath(f"//*[@{mark}]")))
        for mark in ("data-talk", "data-any")
    }
    return score_text(text, words["data-talk"], words["data-any"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_keeps_all_of_the_talk_and_hardly_more(name: str) -> None:
    page = read(LAYOUTS[name])
    result = score(LAYOUTS[name], render_text(page.markdown))
    assert (result.missing, result.precision > 0.95) == (0, True), page.markdown
    assert page.warnings == []


def test_biography_is_kept_only_next_to_the_name() -> None:
    body = f"""<main><h1>{TITLE}</h1><p>{ABSTRACT}</p><p>{MORE}</p></main>
<div class="promo"><h3>Host</h3><p>Jon presents the evening show and likes long walks along the coast.</p></div>
<div class="who"><h3>{SPEAKER}</h3><p>{BIOGRAPHY}</p></div>"""
    assert BIOGRAPHY in read(body).markdown
    assert "evening show" not in read(body).markdown


@pytest.mark.parametrize("name", ["related-work", "sharing-state", "screen-readers", "toc0", "cookies", "nav", "ads"])
def test_section_whose_heading_is_named_like_boilerplate_is_kept(name: str) -> None:
    heading = name.replace("-", " ").capitalize()
    body = f"<p>{ABSTRACT}</p><div id={name}><h2 id={name}>{heading}</h2><ul><li>One</li><li>Two</li></ul></div><p>{MORE}</p>"
    assert f"## {heading}\n\n- One\n- Two" in read(f"<main>{body}</main>{FOOTER}").markdown


def test_table_of_contents_is_removed() -> None:
    links = "".join(f"<li><a href='#s{number}'>Section {number}</a></li>" for number in range(4))
    body = (
        f"<main><h1>{TITLE}</h1><p>Contents</p><ul>{links}</ul><p>{ABSTRACT}</p><h2>Section 1</h2><p>{MORE}</p></main>"
    )
    assert "Section 2" not in read(body).markdown
    assert "Contents" not in read(body).markdown


def test_links_to_files_are_kept_in_a_list_of_links() -> None:
    files = '<li><a href="/a/slides.pdf">Slides</a></li><li><a href="/a/talk.webm?dl=1">Recording</a></li>'
    others = '<li><a href="/t/1">A talk about queues</a></li><li><a href="/t/2">A talk about logs</a></li>'
    body = f"<main><h1>{TITLE}</h1><p>{ABSTRACT}</p><h3>Files</h3><ul>{files}</ul><p>{MORE}</p><h3>Other</h3><ul>{others}</ul>"
    markdown = read(f"{body}</main>").markdown
    assert "[Slides](https://conference.example/a/slides.pdf)" in markdown
    assert "queues" not in markdown


def test_images_between_paragraphs_are_kept_and_others_removed() -> None:
    body = f"""<div class=banner><img src=/logo.png alt="Logo of the conference"></div><main><p>{ABSTRACT}</p>
<figure><img src=/plan.png alt="Plan of the ledger"></figure><p>{MORE}</p></main><div><img src=/sponsor.png alt="Sponsor"></div>"""
    markdown = read(body).markdown
    assert "Plan of the ledger" in markdown
    assert "Logo" not in markdown
    assert "Sponsor" not in markdown


def test_cell_of_kept_row_keeps_its_column() -> None:
    body = f"""<main><p>{ABSTRACT}</p><table><tr><th>Year</th><th>Version</th></tr><tr><td></td><td>2.0</td></tr></table>
<p>{MORE}</p></main>"""
    assert "|  | 2.0 |" in read(body).markdown


def test_caption_that_trafilatura_omits_is_removed_and_its_picture_kept() -> None:
    caption = "Members of the association at the harbour in the evening."
    figure = f'<figure><img src=/plan.png alt="Plan of the ledger"><figcaption>{caption}</figcaption></figure>'
    markdown = read(f"<main><p>{ABSTRACT}</p>{figure}<p>{MORE}</p></main>").markdown
    assert "Plan of the ledger" in markdown
    assert caption not in markdown
    without_text = figure.replace(' alt="Plan of the ledger"', "")
    assert f"![{caption}]" in read(f"<main><p>{ABSTRACT}</p>{without_text}<p>{MORE}</p></main>").markdown
    with_part = figure.replace("Plan of the ledger", "The harbour in the evening")
    assert f"![{caption}]" in read(f"<main><p>{ABSTRACT}</p>{with_part}<p>{MORE}</p></main>").markdown


def test_short_paragraph_beside_a_row_of_links_is_kept() -> None:
    text = "Price: $5 and $6; path C:\\temp; <kbd>Ctrl</kbd>+<kbd>C</kbd>; H<sub>2</sub>O, x<sup>2</sup>"
    links = "<p><a href=/a>First</a> <a href=/b>Second</a></p>"
    body = f"<main><p>{ABSTRACT}</p><p>{text}</p>{links}<p>{MORE}</p></main>"
    assert "Price: $5 and $6" in read(body).markdown


FEATURED = "https://conference.example/stage.png"


@pytest.mark.parametrize(
    "top",
    [
        "<article><header><div class=post-thumbnail><img class='size-large wp-post-image' src=/stage.png></div>",
        "<div class=a><div class=b><div><div><img class=wp-post-image src=/stage.png alt=''></div></div></div></div><article>",
        "<article><div class=og><img src=/stage.png?width=800 alt=''></div>",
    ],
    ids=["in header", "outside of article", "og:image"],
)
def test_featured_image_of_the_talk_is_kept(top: str) -> None:
    teaser = (
        "<aside class=related><a href=/x><img class=wp-post-image src=/other.png alt=Other>Another talk</a></aside>"
    )
    html = f"""<html lang="en"><head><title>{TITLE}</title>{"<meta property=og:image content=/stage.png>" if "og" in top else ""}
</head><body><header><ul>{MENU}</ul></header><main>{top}<h1>{TITLE}</h1><p>{ABSTRACT}</p><p>{MORE}</p>{teaser}</main></body></html>"""
    page = read_page(
        html.encode(), content_type="text/html", url="https://conference.example/talk", session_title=TITLE
    )
    assert [url.partition("?")[0] for url in page.image_urls] == [FEATURED]
    assert f"![{TITLE}](assets/page-image-1)" in page.markdown


@pytest.mark.parametrize(
    "image",
    [
        "<img src=/banner.png alt=Banner>",
        "<a href=/other><img class=wp-post-image src=/stage.png></a>",
        "<aside class=sponsors><img class=wp-post-image src=/stage.png></aside>",
    ],
    ids=["not featured", "link to another talk", "aside"],
)
def test_other_image_above_the_talk_is_not_kept(image: str) -> None:
    page = read(
        f"<main><div><div><div>{image}</div></div></div><article><p>{ABSTRACT}</p><p>{MORE}</p></article></main>"
    )
    assert page.image_urls == []


def test_card_that_is_one_link_is_removed() -> None:
    card = "<a href='/t/2'><h3>Another talk</h3><p>A team explains how its queue lost no jobs in ten years.</p></a>"
    markdown = read(f"<main><article><h1>{TITLE}</h1><p>{ABSTRACT}</p><p>{MORE}</p>{card}</article></main>").markdown
    assert MORE in markdown
    assert "lost no jobs" not in markdown


def test_biography_in_a_link_is_kept() -> None:
    card = f"<section><a href='/s/1'><h3>{SPEAKER}</h3><p>{BIOGRAPHY}</p></a></section>"
    assert BIOGRAPHY in read(f"<main><h1>{TITLE}</h1><p>{ABSTRACT}</p><p>{MORE}</p></main>{card}").markdown


def test_warning_says_how_much_prose_was_omitted() -> None:
    other = "A reporter of the local paper visited the hall and wrote about the many people who waited for the doors to open. "
    body = f"<main><p>{ABSTRACT}</p><p>{MORE}</p></main>" + f"<div><div><p>{other * 2}</p></div></div>" * 4
    page = read(body)
    assert "reporter" not in page.markdown
    assert any("of the page's prose was not used" in warning for warning in page.warnings)


def test_names_of_boilerplate_do_not_remove_sentences() -> None:
    tree = lxml.html.document_fromstring(
        f"<html><body><div class='social related cookie-banner'><p>{ABSTRACT}</p><p>{MORE}</p></div></body></html>"
    )
    assert remove_boilerplate(tree).is_identified
    assert MORE in tree.text_content()


def test_second_body_is_part_of_the_page() -> None:
    body = f"<p>Menu</p></body></html><body><main><h1>{TITLE}</h1><p>{ABSTRACT}</p><p>{MORE}</p></main>"
    assert MORE in read(body).markdown


def test_lines_and_cells_without_words_are_kept() -> None:
    code = "<pre><div>if (x) {</div><div>y();</div><div>}</div></pre>"
    table = "<table><tr><th>System</th><th>Free</th></tr><tr><td>Ours</td><td>✓</td></tr><tr><td>Other</td><td>–</td></tr></table>"
    markdown = read(f"<main><p>{ABSTRACT}</p>{code}{table}<p>{MORE}</p></main>").markdown
    assert "if (x) {\ny();\n}" in markdown
    assert "| Ours | ✓ |\n| Other | – |" in markdown


def test_texts_around_removed_elements_stay_apart() -> None:
    body = f"<main><div>{ABSTRACT}<hr>{MORE}<nav><a href=/>Home</a></nav>The third part is short.</div></main>"
    assert read(body).markdown == f"{ABSTRACT}\n\n{MORE}\n\nThe third part is short."


def test_paragraph_that_is_only_a_link_to_a_file_is_kept() -> None:
    link = "<p><a href=/talk.pdf>Download the presentation slides of this talk (PDF, 2.3 MB)</a></p>"
    assert (
        "(https://conference.example/talk.pdf)" in read(f"<main><p>{ABSTRACT}</p>{link}<p>{MORE}</p></main>").markdown
    )


@pytest.mark.parametrize("sheet", ["dl", "table", "p"])
def test_label_outside_of_the_text_that_equals_a_cell_is_removed(sheet: str) -> None:
    rows = {
        "dl": "<dl><dt>Day</dt><dd>Sunday, 1 March 2026</dd><dt>Time</dt><dd>10:00 to 10:30</dd></dl>",
        "table": "<table><tr><td>Day</td><td>Sunday, 1 March 2026</td></tr><tr><td>Time</td><td>10:00 to 10:30</td></tr></table>",
        "p": "<p>Day</p><p>Sunday, 1 March 2026</p><p>Time</p><p>10:00 to 10:30</p>",
    }
    table = "<table><tr><th>Blind spot</th><th>Remedy for it</th></tr><tr><td>Time</td><td>a timer for the due time</td></tr></table>"
    text = read(
        f"<main><article><h1>{TITLE}</h1><p>{ABSTRACT}</p>{table}<p>{MORE}</p></article><aside>{rows[sheet]}</aside></main>"
    ).markdown
    assert text.count("Time") == 1
    assert "| Time | a timer" in text


MATERIAL = [
    "https://www.youtube.com/watch?v=abcdefghijk",
    "https://www.youtube.com/watch?list=PL1&v=abcdefghijk",
    "//youtu.be/abcdefghijk",
    "https://vimeo.com/123456789",
    "https://media.ccc.de/v/37c3-1-a-talk",
    "https://tube.example/w/4XzBkVYhcPJVkZdnAqP5rD",
    "https://speakerdeck.com/okafor/ledgers-that-never-forget",
    "https://www.slideshare.net/slideshow/ledgers/123",
    "https://docs.google.com/presentation/d/abcdefghij/edit",
]
OTHER_PAGES = [
    "https://www.youtube.com/@exampleconf",
    "https://www.youtube.com/playlist?list=PL1",
    "https://vimeo.com/exampleconf",
    "https://media.ccc.de/c/37c3",
    "https://evil.example/?https://youtu.be/abcdefghijk",
]


@pytest.mark.parametrize("url", MATERIAL)
def test_paragraph_that_is_only_a_link_to_the_recording_or_the_deck_is_kept(url: str) -> None:
    link = f"<p><a href='{url}'>Watch the recording of this talk, or read its slides, on the site</a></p>"
    assert "Watch the recording" in read(f"<main><p>{ABSTRACT}</p>{link}<p>{MORE}</p></main>").markdown


@pytest.mark.parametrize("url", OTHER_PAGES)
def test_paragraph_that_is_only_a_link_to_another_page_is_removed(url: str) -> None:
    link = f"<p><a href='{url}'>Watch the recordings of all talks of the conference on the site</a></p>"
    assert "Watch the recordings" not in read(f"<main><p>{ABSTRACT}</p>{link}<p>{MORE}</p></main>").markdown


def test_list_of_recordings_of_other_talks_is_removed() -> None:
    others = "".join(
        f"<li><a href='https://youtu.be/abcdefghij{number}'>Another talk about queues and logs, number {number}</a></li>"
        for number in range(5)
    )
    body = (
        f"<main><article><p>{ABSTRACT}</p><p>{MORE}</p></article></main><aside class=related><ul>{others}</ul></aside>"
    )
    assert "Another talk" not in read(body).markdown
