"""session: a talk's web page becomes Markdown: its own text, without the site around it. Pure, given the bytes."""

from __future__ import annotations

import re
from typing import Any

import lxml.etree  # type: ignore[import-untyped]  # it ships no types
import lxml.html  # type: ignore[import-untyped]  # nor does this part of it
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.boilerplate import remove_boilerplate, remove_non_text_elements
from jobledger.workers.processors.session.html_markdown import html_to_markdown
from jobledger.workers.processors.session.safe_markdown import sanitize_markdown

MAX_CHARACTERS = 200_000
MAX_ELEMENTS = 30_000
MAX_READ_CHARACTERS = 2_000_000
MAX_TAGS = 250_000
"""More are not even parsed: a tree of the millions that fit into a page's bytes takes a gigabyte."""
MAX_INTRO = 400

_HTML_TYPES = {"text/html", "application/xhtml+xml"}
_LOOKS_LIKE_HTML = re.compile(rb"<(!doctype html|html|head|body|title|h1|div|p)\b", re.IGNORECASE)
_META_CHARSET = re.compile(rb"""<meta[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_HEADER_CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_TEXT_CODECS = re.compile(r"(utf|iso-8859|windows|cp|koi8|gb|big5|euc|shift|x-sjis|mac|tis|us-ascii|ascii|latin|ks_c)")
# https://encoding.spec.whatwg.org/#names-and-labels: what browsers read where these are declared.
_READ_AS = {
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin1", "latin-1", "us-ascii", "ascii"), "windows-1252"),
    **dict.fromkeys(("gb2312", "gbk"), "gb18030"),
    **dict.fromkeys(("shift_jis", "shift-jis", "x-sjis"), "cp932"),
    **dict.fromkeys(("euc-kr", "ks_c_5601-1987"), "cp949"),
    "iso-8859-9": "windows-1254",
}


class PageText(BaseModel):
    """What the page says. `markdown` is safe to stand in another document; its headings begin at level 2."""

    model_config = ConfigDict(frozen=True)

    url: str
    title: str | None
    language: str | None
    intro: str | None
    keywords: list[str]
    markdown: str
    warnings: list[str] = []


def require_html_type(media_type: str) -> None:
    """Refuse what says of itself that it is no web page.

    Raises:
        ProcessorError: NOT_HTML.
    """
    if media_type and media_type not in _HTML_TYPES:
        raise ProcessorError("NOT_HTML", f"The page is not HTML but {media_type}.", details={"media_type": media_type})


def read_page(body: bytes, *, content_type: str, url: str, session_title: str) -> PageText:
    """Read the HTML `body` found at `url`; a heading that only repeats `session_title` is left out.

    Raises:
        ProcessorError: NOT_HTML, or EMPTY_PAGE when there is no text in it.
    """
    if not content_type and not _LOOKS_LIKE_HTML.search(body[:4096]):
        raise ProcessorError("NOT_HTML", "The page is not HTML.", details={"url": url})
    tree = _tree(decode_html(body, content_type))
    if tree is None:
        raise _empty(url)
    warnings: list[str] = []
    remove_non_text_elements(tree)
    if _shorten(tree.find("body"), MAX_ELEMENTS, MAX_READ_CHARACTERS):
        warnings.append("The page is very long; only its beginning is read.")
    title = _title(tree)
    if not remove_boilerplate(tree):
        warnings.append("The main text of the page could not be told from the rest: all of its visible text is used.")
    cut = _shorten(tree.find("body"), MAX_ELEMENTS, MAX_CHARACTERS)
    text = html_to_markdown(tree.find("body"), url=url, base=next(iter(tree.xpath("//base/@href")), ""))
    if cut or len(text) > MAX_CHARACTERS:
        warnings.append(f"The page is very long; only its first {MAX_CHARACTERS:,} characters are used.")
        text = re.sub(r"\s\S{0,1000}\Z", "", text[:MAX_CHARACTERS])
    text = _below_title(sanitize_markdown(text), session_title)
    if not text.strip():
        raise _empty(url)
    return PageText(
        url=url,
        title=title,
        language=_language(tree),
        intro=_meta(tree, "description", "og:description"),
        keywords=[word.strip() for word in (_meta(tree, "keywords") or "").split(",") if word.strip()][:20],
        markdown=text,
        warnings=warnings,
    )


def _shorten(body: Any, elements: int, characters: int) -> bool:
    """Remove in place what stands after so many elements or so much text; say whether there was any."""
    cut: list[Any] = []
    number = 0
    for event, element in lxml.etree.iterwalk(body, events=("start", "end")):
        if event == "start":
            number += 1
            if number > elements or characters <= 0:
                cut.append(element)
        said = (element.text if event == "start" else element.tail) or ""
        if len(said) > max(0, characters):
            setattr(element, "text" if event == "start" else "tail", said[: max(0, characters)])
        characters -= len(said.strip())
    for element in cut:
        if element.getparent() is not None:
            element.getparent().remove(element)
    return bool(cut) or characters < 0


def decode_html(body: bytes, content_type: str) -> str:
    """The text in `body`: by its byte order mark, else what the server said, else the page itself, else UTF-8."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return body[len(mark) :].decode(encoding, "replace")
    declared = _HEADER_CHARSET.search(content_type)
    if declared and (text := _try(body, declared.group(1))) is not None:
        return text
    inside = _META_CHARSET.search(body[:4096])
    if inside:
        label = inside.group(1).decode("ascii", "replace").lower()
        # A page that could be read this far is not UTF-16, whatever it says (HTML standard, 13.2.3.3).
        if (text := _try(body, "utf-8" if label.startswith("utf-16") else label)) is not None:
            return text
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("windows-1252", "replace")


def _try(body: bytes, label: str) -> str | None:
    label = label.lower()
    if not _TEXT_CODECS.match(label):
        return None
    try:
        return body.decode(_READ_AS.get(label, label), "replace")
    except (LookupError, UnicodeError):
        return None


def _tree(text: str) -> Any:
    """The page without what only a browser without scripts would show (`Please enable JavaScript`)."""
    if text.count("<") > MAX_TAGS:
        text = "<".join(text.split("<", MAX_TAGS)[:MAX_TAGS])
    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        # As bytes, because lxml refuses a text that begins with an XML declaration, as XHTML does.
        tree = lxml.html.document_fromstring(text.replace("\x00", "").encode("utf-8", "replace"), parser=parser)
    except lxml.etree.ParserError:
        return None
    for hidden in tree.xpath("//noscript"):
        hidden.drop_tree()
    return tree if tree.find("body") is not None else None


def _empty(url: str) -> ProcessorError:
    return ProcessorError("EMPTY_PAGE", f"There is no text on the page {url}.", details={"url": url})


def _title(tree: Any) -> str | None:
    found = _meta(tree, "og:title")
    for path in ("//h1", "//title"):
        for element in tree.xpath(path):
            found = found or " ".join("".join(element.itertext()).split())
    return found[:500] if found else None


def _meta(tree: Any, *names: str) -> str | None:
    for name in names:
        for content in tree.xpath("//meta[@name=$name or @property=$name or @http-equiv=$name]/@content", name=name):
            if words := " ".join(str(content).split()):
                return words if len(words) <= MAX_INTRO else words[:MAX_INTRO].rsplit(" ", 1)[0] + " …"
    return None


def _language(tree: Any) -> str | None:
    said = next(iter(tree.xpath("//html/@lang | //html/@xml:lang")), "") or _meta(tree, "content-language") or ""
    return said.strip().replace("_", "-") if re.fullmatch(r"\s*[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*\s*", said) else None


def _folded(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _below_title(text: str, title: str) -> str:
    """Move the headings so that the highest is of level 2, and drop those that repeat the title above them."""
    lines = text.split("\n")
    found: dict[int, tuple[int, str]] = {}
    fence = ""
    for number, line in enumerate(lines):
        opening = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if opening and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opening.group(1)
        elif not fence and (heading := re.match(r"(#{1,6})\s+(.*)", line)):
            found[number] = (len(heading.group(1)), heading.group(2))
    for number, (_, words) in list(found.items()):
        if _folded(words) == _folded(title):
            lines[number] = ""
            del found[number]
    shift = 2 - min((level for level, _ in found.values()), default=2)
    for number, (level, words) in found.items():
        lines[number] = f"{'#' * min(6, level + shift)} {words}"
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
