"""session: HTML becomes Markdown. Pure. What markdownify does not do well is prepared in the tree, or overridden."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import lxml.html  # type: ignore[import-untyped]  # it ships no types
from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag
from markdownify import MarkdownConverter

from jobledger.ledger.net.url_policy import strip_userinfo
from jobledger.workers.processors.session.boilerplate import BLOCKS, HEADINGS
from jobledger.workers.processors.session.safe_markdown import escape_inline_text, escape_link_target

_MAX_DEPTH: Final = 100
"""Deeper, elements lose their tags and leave their text: markdownify goes down by recursion."""
_MAX_COLUMNS: Final = 50
_MAX_CELLS: Final = 20_000
_ENDS_LINE: Final = BLOCKS | {"br"}
_RAISED: Final = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED: Final = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_NOT_IN_CELLS: Final = HEADINGS | {"table", "pre", "blockquote", "hr"}
_CODE_LANGUAGE: Final = re.compile(r"(?:^|\s)(?:language|lang|highlight(?:-source)?|brush:)-?\s*([a-z][\w+#]{0,19})")
_NO_LANGUAGE: Final = frozenset({"default", "none", "text", "plain", "plaintext", "notranslate", "highlight"})


def html_to_markdown(body: Any, *, url: str, base: str) -> str:
    """The text of an lxml element, found at `url`, whose relative links are relative to `base`. Changes the element."""
    for link in list(body.iter("a")):
        _clean_link(link, url, base)
    for code in list(body.iter("pre", "code", "samp", "tt")):
        _break_lines(code)
    for table in reversed(list(body.iter("table"))):
        _clean_table(table)
    for number, item in _numbered(body):
        item.set("value", str(number))
    for deep in reversed(list(_too_deep(body))):
        deep.drop_tag()
    return str(_Converter().convert_soup(BeautifulSoup(lxml.html.tostring(body, encoding="unicode"), "lxml")))


def _clean_link(link: Any, url: str, base: str) -> None:
    """Make it absolute; what leads to no web page or mailbox (`javascript:`, `#top`) keeps only its text."""
    target = _absolute((link.get("href") or "#").strip(), url, base)
    if target is None:
        link.tag = "span"
    else:
        link.set("href", escape_link_target(target))


def _absolute(href: str, url: str, base: str) -> str | None:
    try:
        target = strip_userinfo(urljoin(urljoin(url, base), href))
        usable = urlsplit(target).scheme in ("http", "https", "mailto") and not href.startswith("#")
    except ValueError:
        return None
    return target if usable else None


def _break_lines(code: Any) -> None:
    """Code of several lines is a block, and its lines end with line ends."""
    for line_end in list(code.iter("br")):
        code.tag = "pre"
        line_end.tail = "\n" + (line_end.tail or "").removeprefix("\n")
        line_end.drop_tag()


def _clean_table(table: Any) -> None:
    """Make every row as long as the longest, cells that span others followed by empty ones. Layout becomes text."""
    rows = [row for row in table.iter("tr") if next(row.iterancestors("table")) is table]
    cells = [[cell for cell in row if cell.tag in ("td", "th")] for row in rows]
    for cell in [cell for row in cells for cell in row if _numbers_lines(cell)]:
        cell.drop_tree()
    layout = any(element.tag in _NOT_IN_CELLS for row in cells for element in _inside(row))
    columns = max((len(row) for row in cells), default=0)
    if layout or columns < 2 or len(rows) * columns > _MAX_CELLS:
        parts = list(table.iter("caption", "thead", "tbody", "tfoot", "tr", "td", "th"))
        for element in [table, *(part for part in parts if next(part.iterancestors("table"), None) is table)]:
            element.tag = "div"
        return
    widest, spread = 0, 0
    below: dict[int, int] = {}
    for row, own in zip(rows, cells, strict=True):
        column = 0
        for cell in own:
            while below.get(column, 0) > 0:
                below[column] -= 1
                cell.addprevious(cell.makeelement("td"))
                column += 1
            wide, high = _span(cell, "colspan"), _span(cell, "rowspan")
            if spread + wide * high > _MAX_CELLS:
                wide = high = 1
            spread += wide * high
            for extra in range(wide):
                below[column + extra] = high - 1
            for _ in range(wide - 1):
                row.insert(row.index(cell) + 1, cell.makeelement("td"))
            column += wide
        widest = max(widest, column)
    if len(rows) * widest > _MAX_CELLS:
        return
    for row in rows:
        for _ in range(min(widest, _MAX_COLUMNS) - sum(cell.tag in ("td", "th") for cell in row)):
            row.append(row.makeelement("td"))


def _numbers_lines(cell: Any) -> bool:
    """Whether it stands beside a listing and numbers its lines."""
    return any(True for _ in cell.iter("pre")) and bool(re.fullmatch(r"[\s\d]+", "".join(cell.itertext())))


def _inside(cells: list[Any]) -> Iterator[Any]:
    return (element for cell in cells for element in cell.iterdescendants())


def _span(cell: Any, which: str) -> int:
    said = cell.attrib.pop(which, "1").strip()
    return max(1, min(_MAX_COLUMNS, int(said))) if re.fullmatch(r"[0-9]{1,4}", said) else 1


def _numbered(body: Any) -> Iterator[tuple[int, Any]]:
    for ordered in body.iter("ol"):
        start = (ordered.get("start") or "1").strip()
        number = int(start) if re.fullmatch(r"[0-9]{1,8}", start) else 1
        for item in ordered.iterchildren("li"):
            yield number, item
            number += 1


def _too_deep(body: Any) -> Iterator[Any]:
    depth = {body: 0}
    for element in body.iterdescendants():
        depth[element] = depth[element.getparent()] + 1
        if depth[element] > _MAX_DEPTH:
            yield element


class _Converter(MarkdownConverter):
    class Options:
        autolinks = False
        bullets = "-"
        heading_style = "atx"
        newline_style = "backslash"
        wrap = True
        wrap_width = None

    def escape(self, text: str, parent_tags: set[str]) -> str:
        return escape_inline_text(text)

    def process_text(self, el: NavigableString, parent_tags: set[str] | None = None) -> str:
        text = str(super().process_text(el, parent_tags=parent_tags))  # type: ignore[misc]  # its stub lacks it
        return _as_line_begin(text) if "_noformat" not in (parent_tags or ()) and _begins_a_line(el) else text

    def convert_a(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the link on one line, without its title: a reader sees where it leads."""
        del el["title"]
        return str(super().convert_a(el, " ".join(_edged(text)), parent_tags))  # type: ignore[misc]  # its stub lacks it

    def convert_img(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return nothing: images of the page are not taken along."""
        return ""

    def convert_br(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return a break where something follows in the same paragraph."""
        follows = next((near for near in el.next_siblings if isinstance(near, Tag) or str(near).strip()), None)
        ends = follows is None or getattr(follows, "name", None) in BLOCKS | {"br"}
        return text if ends else str(super().convert_br(el, text, parent_tags))  # type: ignore[misc]  # its stub lacks it

    def convert_hr(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return nothing: between the parts of our document stand headings."""
        return ""

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return it fenced, by more backticks than stand in it."""
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=2))
        lines = textwrap.dedent(re.sub(r"^(\s*\n)+", "", text).rstrip())
        return f"\n\n{fence}{_language(el)}\n{lines}\n{fence}\n\n" if lines else ""

    def convert_sup(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text.translate(_RAISED) if re.fullmatch(r"\s*\d+\s*", text) else text

    def convert_sub(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text.translate(_LOWERED) if re.fullmatch(r"\s*\d+\s*", text) else text

    def convert_video(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text

    def convert_li(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        text = text.strip()
        if not text:
            return "\n"
        bullet = f"{el['value']}. " if el.get("value") and el.parent and el.parent.name == "ol" else "- "
        lines = text.split("\n")
        rest = [" " * len(bullet) + line if line else "" for line in lines[1:]]
        return "\n".join([bullet + lines[0], *rest]) + "\n"

    def convert_dt(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the term as a paragraph: CommonMark has no lists of definitions."""
        words = " ".join(text.split())
        if "_inline" in parent_tags or not words:
            return f" {words} "
        return f"\n\n{words}\n\n" if "**" in words or "`" in words else f"\n\n**{words}**\n\n"

    def convert_dd(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return what is said of the term as paragraphs of their own."""
        return f" {text.strip()} " if "_inline" in parent_tags else f"\n\n{text.strip()}\n\n"

    def convert_td(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f" {_in_cell(text)} |"

    def convert_th(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return f" {_in_cell(text)} |"


def _edged(text: str) -> Iterator[str]:
    """The words, with the space that was before and after them."""
    yield from ([""] if text[:1].isspace() else []) + text.split() + ([""] if text[-1:].isspace() else [])


def _in_cell(text: str) -> str:
    """On one line, and without a bar that would end the cell: GFM 4.10 wants it escaped even in code."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _begins_a_line(node: Any) -> bool:
    while node.previous_sibling is None and node.parent is not None and node.parent.name not in BLOCKS:
        node = node.parent
    return node.previous_sibling is None or getattr(node.previous_sibling, "name", None) in _ENDS_LINE


def _as_line_begin(text: str) -> str:
    """What would make a heading, list or rule of the line is escaped."""
    return re.sub(
        r"^(\s*)(?:(\d{1,9})(?=[.)](?:\s|$))|(?=(?:#{1,6}|[+-])(?:\s|$)|[-=]{2,}))", _escaped_begin, text, count=1
    )


def _escaped_begin(found: re.Match[str]) -> str:
    return f"{found.group(1)}{found.group(2) or ''}\\"


def _language(element: Any) -> str:
    """What the block of code says of itself, or the elements just around and inside it."""
    around = [element, element.find("code"), element.parent, element.parent.parent if element.parent else None]
    for said in (" ".join(near.get("class") or ()) for near in around if near is not None):
        if (found := _CODE_LANGUAGE.search(said.lower())) and found.group(1) not in _NO_LANGUAGE:
            return found.group(1).rstrip("0123456789")
    return ""
