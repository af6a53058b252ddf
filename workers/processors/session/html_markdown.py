"""Convert HTML to Markdown. Pure. The tree is prepared, and methods overridden, where markdownify is inaccurate."""

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
"""Deeper elements are replaced by their text, because markdownify is recursive."""
_MAX_COLUMNS: Final = 50
_MAX_CELLS: Final = 20_000
_LINE_BREAKS: Final = BLOCKS | {"br"}
_SUPERSCRIPTS: Final = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUBSCRIPTS: Final = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_NOT_IN_CELLS: Final = HEADINGS | {"table", "pre", "blockquote", "hr"}
_CODE_LANGUAGE: Final = re.compile(r"(?:^|\s)(?:language|lang|highlight(?:-source)?|brush:)-?\s*([a-z][\w+#]{0,19})")
_NO_LANGUAGE: Final = frozenset({"default", "none", "text", "plain", "plaintext", "notranslate", "highlight"})


def convert_html_to_markdown(body: Any, *, url: str, base: str) -> str:
    """Convert an lxml element to Markdown and modify it.

    Args:
        body: The element.
        url: URL of the page.
        base: Base of relative links, itself relative to `url`.
    """
    for link in list(body.iter("a")):
        _clean_link(link, url, base)
    for code in list(body.iter("pre", "code", "samp", "tt")):
        _break_lines(code)
    for table in reversed(list(body.iter("table"))):
        _clean_table(table)
    for number, item in _number_list_items(body):
        item.set("value", str(number))
    for element in reversed(list(_find_deep_elements(body))):
        element.drop_tag()
    return str(_Converter().convert_soup(BeautifulSoup(lxml.html.tostring(body, encoding="unicode"), "lxml")))


def _clean_link(link: Any, url: str, base: str) -> None:
    """Make a link absolute. Links to other than web pages or mailboxes (`#top`) keep only their text."""
    target = _resolve_link((link.get("href") or "#").strip(), url, base)
    if target is None:
        link.tag = "span"
    else:
        link.set("href", escape_link_target(target))


def _resolve_link(href: str, url: str, base: str) -> str | None:
    try:
        target = strip_userinfo(urljoin(urljoin(url, base), href))
        usable = urlsplit(target).scheme in ("http", "https", "mailto") and not href.startswith("#")
    except ValueError:
        return None
    return target if usable else None


def _break_lines(code: Any) -> None:
    """Make code with several lines a block, and replace its `br` elements by newlines."""
    for line_end in list(code.iter("br")):
        code.tag = "pre"
        line_end.tail = "\n" + (line_end.tail or "").removeprefix("\n")
        line_end.drop_tag()


def _clean_table(table: Any) -> None:
    """Give all rows the same length, with empty cells after spanning ones. A layout table becomes text."""
    rows = [row for row in table.iter("tr") if next(row.iterancestors("table")) is table]
    cells = [[cell for cell in row if cell.tag in ("td", "th")] for row in rows]
    for cell in [cell for row in cells for cell in row if _has_line_numbers(cell)]:
        cell.drop_tree()
    is_layout = any(part.tag in _NOT_IN_CELLS for row in cells for cell in row for part in cell.iterdescendants())
    columns = max((len(row) for row in cells), default=0)
    if is_layout or columns < 2 or len(rows) * columns > _MAX_CELLS:
        parts = list(table.iter("caption", "thead", "tbody", "tfoot", "tr", "td", "th"))
        for element in [table, *(part for part in parts if next(part.iterancestors("table"), None) is table)]:
            element.tag = "div"
        return
    widest, cell_count = 0, 0
    spanned: dict[int, int] = {}
    for row, row_cells in zip(rows, cells, strict=True):
        column = 0
        for cell in row_cells:
            while spanned.get(column, 0) > 0:
                spanned[column] -= 1
                cell.addprevious(cell.makeelement("td"))
                column += 1
            width, height = _pop_span(cell, "colspan"), _pop_span(cell, "rowspan")
            if cell_count + width * height > _MAX_CELLS:
                width = height = 1
            cell_count += width * height
            for offset in range(width):
                spanned[column + offset] = height - 1
            for _ in range(width - 1):
                row.insert(row.index(cell) + 1, cell.makeelement("td"))
            column += width
        widest = max(widest, column)
    if len(rows) * widest > _MAX_CELLS:
        return
    for row in rows:
        for _ in range(min(widest, _MAX_COLUMNS) - sum(cell.tag in ("td", "th") for cell in row)):
            row.append(row.makeelement("td"))


def _has_line_numbers(cell: Any) -> bool:
    """Return whether the cell contains the line numbers of a listing."""
    return any(True for _ in cell.iter("pre")) and bool(re.fullmatch(r"[\s\d]+", "".join(cell.itertext())))


def _pop_span(cell: Any, attribute: str) -> int:
    value = cell.attrib.pop(attribute, "1").strip()
    return max(1, min(_MAX_COLUMNS, int(value))) if re.fullmatch(r"[0-9]{1,4}", value) else 1


def _number_list_items(body: Any) -> Iterator[tuple[int, Any]]:
    for ordered in body.iter("ol"):
        start = (ordered.get("start") or "1").strip()
        number = int(start) if re.fullmatch(r"[0-9]{1,8}", start) else 1
        for item in ordered.iterchildren("li"):
            yield number, item
            number += 1


def _find_deep_elements(body: Any) -> Iterator[Any]:
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
        strip = ("img", "hr", "video")
        """Elements without Markdown. Images of the page are not included, and headings separate its parts."""
        wrap = True
        wrap_width = None

    def escape(self, text: str, parent_tags: set[str]) -> str:
        return escape_inline_text(text)

    def process_text(self, el: NavigableString, parent_tags: set[str] | None = None) -> str:
        text = str(super().process_text(el, parent_tags=parent_tags))  # type: ignore[misc]  # its stub lacks it
        return _escape_line_start(text) if "_noformat" not in (parent_tags or ()) and _is_at_line_start(el) else text

    def convert_a(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the link on one line, without its title."""
        del el["title"]
        return str(super().convert_a(el, re.sub(r"\s+", " ", text), parent_tags))  # type: ignore[misc]  # its stub lacks it

    def convert_br(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return a line break if something follows in the same paragraph."""
        following = next((node for node in el.next_siblings if isinstance(node, Tag) or str(node).strip()), None)
        is_last = following is None or getattr(following, "name", None) in BLOCKS | {"br"}
        return text if is_last else str(super().convert_br(el, text, parent_tags))  # type: ignore[misc]  # its stub lacks it

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the code in a fence with more backticks than the code contains."""
        fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=2))
        lines = textwrap.dedent(re.sub(r"^(\s*\n)+", "", text).rstrip())
        return f"\n\n{fence}{_find_code_language(el)}\n{lines}\n{fence}\n\n" if lines else ""

    def convert_sup(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text.translate(_SUPERSCRIPTS) if re.fullmatch(r"\s*\d+\s*", text) else text

    def convert_sub(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        return text.translate(_SUBSCRIPTS) if re.fullmatch(r"\s*\d+\s*", text) else text

    def convert_li(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        text = text.strip()
        if not text:
            return "\n"
        bullet = f"{el['value']}. " if el.get("value") and el.parent and el.parent.name == "ol" else "- "
        lines = text.split("\n")
        rest = [" " * len(bullet) + line if line else "" for line in lines[1:]]
        return "\n".join([bullet + lines[0], *rest]) + "\n"

    def convert_dt(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the term as a paragraph, because CommonMark has no definition lists."""
        words = " ".join(text.split())
        if "_inline" in parent_tags or not words:
            return f" {words} "
        return f"\n\n{words}\n\n" if "**" in words or "`" in words else f"\n\n**{words}**\n\n"

    def convert_dd(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the definition as separate paragraphs."""
        return f" {text.strip()} " if "_inline" in parent_tags else f"\n\n{text.strip()}\n\n"

    def convert_td(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        """Return the text on one line with escaped bars. GFM 4.10 requires the escape even in code."""
        line = re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))
        return f" {line} |"

    convert_th = convert_td


def _is_at_line_start(node: Any) -> bool:
    while node.previous_sibling is None and node.parent is not None and node.parent.name not in BLOCKS:
        node = node.parent
    return node.previous_sibling is None or getattr(node.previous_sibling, "name", None) in _LINE_BREAKS


def _escape_line_start(text: str) -> str:
    """Escape characters that would make the line a heading, list item or rule."""
    return re.sub(r"^(\s*)(\d{1,9}(?=[.)](?:\s|$))|(?=(?:#{1,6}|[+-])(?:\s|$)|[-=]{2,}))", r"\1\2\\", text, count=1)


def _find_code_language(element: Any) -> str:
    """Return the language declared by a code block or by the elements directly around or inside it."""
    candidates = [element, element.find("code"), element.parent, element.parent.parent if element.parent else None]
    for classes in (" ".join(candidate.get("class") or ()) for candidate in candidates if candidate is not None):
        if (match := _CODE_LANGUAGE.search(classes.lower())) and match.group(1) not in _NO_LANGUAGE:
            return match.group(1).rstrip("0123456789")
    return ""
