"""session: a talk's web page becomes Markdown: its own text, without the site around it. Pure, given the bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from configparser import ConfigParser
from copy import deepcopy
from typing import Any
from urllib.parse import urljoin, urlsplit

import lxml.etree  # type: ignore[import-untyped]  # it ships no types
import lxml.html  # type: ignore[import-untyped]  # nor does this part of it
import trafilatura
from pydantic import BaseModel, ConfigDict
from trafilatura.settings import DEFAULT_CONFIG

from workers.processor import ProcessorError
from workers.processors.session.safe_markdown import as_target, as_text, harmless

MAX_CHARACTERS = 200_000
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
_UNSEEN = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object", "select", "button"}
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "footer", "form", "h1", "h2", "h3"),
    *(
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "table",
        "td",
        "th",
        "tr",
        "ul",
    ),
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


def refuse_other_types(media_type: str) -> None:
    """Refuse what says of itself that it is no web page.

    Raises:
        ProcessorError: NOT_HTML.
    """
    if media_type and media_type not in _HTML_TYPES:
        raise ProcessorError("NOT_HTML", f"The page is not HTML but {media_type}.", details={"media_type": media_type})


def read_page(body: bytes, *, content_type: str, url: str, known_title: str) -> PageText:
    """Read the HTML `body` found at `url`; a heading that only repeats `known_title` is left out.

    Raises:
        ProcessorError: NOT_HTML, or EMPTY_PAGE when there is no text in it.
    """
    if not content_type and not _LOOKS_LIKE_HTML.search(body[:4096]):
        raise ProcessorError("NOT_HTML", "The page is not HTML.", details={"url": url})
    tree = _tree(decoded(body, content_type))
    if tree is None:
        raise _empty(url)
    title = _title(tree)
    _clean_links(tree, url)
    warnings: list[str] = []
    text = harmless(_cut(_main_text(tree), warnings))
    if not text.strip():
        text = "\n\n".join(as_text(line) for line in _cut("\n".join(_visible_lines(tree)), warnings).splitlines())
        warnings.append("The main text of the page could not be told from the rest: all of its visible text is used.")
    text = _below_title(text, known_title)
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


def _cut(text: str, warnings: list[str]) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    warnings.append(f"The page is very long; only its first {MAX_CHARACTERS:,} characters are used.")
    return text[:MAX_CHARACTERS].rpartition("\n")[0] or text[:MAX_CHARACTERS]


def decoded(body: bytes, content_type: str) -> str:
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


def _extraction_settings() -> ConfigParser:
    """Below 250 characters trafilatura gives up the structure and dumps the text; talks are often that short."""
    settings = deepcopy(DEFAULT_CONFIG)
    settings.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")
    return settings


_SETTINGS = _extraction_settings()


def _main_text(tree: Any) -> str:
    """The page's own text as Markdown.

    On pages without `<main>`, `<article>` or the like trafilatura collects paragraphs and lists but no headings. There
    it is shown the body as one article, and that is used when no word got lost by it.
    """
    text = _extract(tree)
    if re.search(r"^#+ ", text, re.MULTILINE) or not tree.xpath(
        "//body//*[self::h1 or self::h2 or self::h3 or self::h4]"
    ):
        return text
    structured = _extract(_as_one_article(tree))
    return structured if _words(text) <= _words(structured) else text


def _as_one_article(tree: Any) -> Any:
    tree = deepcopy(tree)
    body = tree.find("body")
    for block in body.iter("div"):
        if not any(child.tag in _BLOCKS for child in block.iterdescendants()):
            block.tag = "p"  # words directly in a <div> would be overlooked
    article = body.makeelement("article")
    article.extend([child for child in body if child.tag not in ("nav", "header", "footer", "aside")])
    article.text, body.text = body.text, None
    body.insert(0, article)
    return tree


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _extract(tree: Any) -> str:
    text = trafilatura.extract(
        deepcopy(tree),
        output_format="markdown",
        favor_recall=True,
        include_comments=False,
        include_formatting=True,
        include_links=True,
        include_tables=True,
        config=_SETTINGS,
    )
    return text or ""


def _clean_links(tree: Any, url: str) -> None:
    """Make every link absolute; what leads to no web page or mailbox (`javascript:`, `#top`) keeps only its text."""
    base = next(iter(tree.xpath("//base/@href")), "")
    for link in tree.xpath("//a[@href]"):
        target = _absolute(link.get("href").strip(), url, base)
        if target is None:
            link.tag = "span"
        else:
            link.set("href", as_target(target))


def _absolute(href: str, url: str, base: str) -> str | None:
    try:
        target = urljoin(urljoin(url, base), href)
        usable = urlsplit(target).scheme in ("http", "https", "mailto") and not href.startswith("#")
    except ValueError:
        return None
    return target if usable else None


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


def _visible_lines(tree: Any) -> list[str]:
    """All text a reader would see, one block a line."""
    pieces = "".join(_visible_pieces(tree))
    return [words for line in pieces.split("\n") if (words := " ".join(line.split()))]


def _visible_pieces(root: Any) -> Iterator[str]:
    waiting: list[Any] = [root]
    while waiting:
        current = waiting.pop()
        if isinstance(current, str):
            yield current
            continue
        edge = "\n" if current.tag in _BLOCKS else ""
        inside = [] if current.tag in _UNSEEN or not isinstance(current.tag, str) else _content(current)
        waiting.extend(reversed([edge, *inside, edge]))


def _content(element: Any) -> list[Any]:
    parts: list[Any] = [" ".join((element.text or "").split("\n"))]
    for child in element:
        parts += [child, " ".join((child.tail or "").split("\n"))]
    return parts


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
