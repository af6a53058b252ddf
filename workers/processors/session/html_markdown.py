"""Convert HTML to Markdown. Pure. `inline_markdown` writes paragraphs, and this module the blocks.

The converter walks the tree once. It collects the text of a paragraph as runs with a style, until a block begins or
ends. Emphasis and links may therefore contain blocks, lists may be nested wrongly, and text may be outside of
paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import lxml.etree  # type: ignore[import-untyped]  # it ships no types

from jobledger.ledger.net.url_policy import strip_userinfo
from jobledger.workers.processors.session import code_blocks, embedded_media, formulas
from jobledger.workers.processors.session.html_tables import clean_table
from jobledger.workers.processors.session.inline_markdown import Run, Style, write_line, write_paragraphs
from jobledger.workers.processors.session.page_blocks import BLOCKS, FOOTNOTE, HEADINGS
from jobledger.workers.processors.session.safe_markdown import (
    IMAGE_TARGET_PREFIX,
    escape_inline_text,
    escape_link_target,
)

MAX_DATA_URL_CHARACTERS: Final = 4_000_000
_MAX_DEPTH: Final = 100
"""Deeper elements are replaced by their content, because the converter is recursive."""
_DEEP_TAG: Final = "too-deep"
_MAX_IMAGES: Final = 200
_MAX_ALT_CHARACTERS: Final = 500
_MIN_TYPED_ITEMS: Final = 2
_TYPED_ITEM: Final = re.compile(r"^(?:\\[-*+]|[•‣▪·–]) +(?=\S)", re.MULTILINE)
_SUPERSCRIPTS: Final = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_SUBSCRIPTS: Final = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_IGNORED: Final = frozenset({"script", "style", "template", "head", "title", "rp", "noscript"})
_INVISIBLE: Final = re.compile("[\u00ad\u200b\u2060\ufeff]")
_KEEPS_LINES: Final = re.compile(
    r"white-space(?:-collapse)?\s*:\s*(pre\b|pre-line|pre-wrap|break-spaces|preserve)", re.IGNORECASE
)
_KEEPS_LINES_CLASSES: Final = frozenset(
    {
        "whitespace-pre-line",
        "whitespace-pre-wrap",
        "whitespace-pre",
        "pre-line",
        "pre-wrap",
        "prewrap",
        "preline",
        "ws-pre-line",
    }
)
_BOLD: Final = re.compile(r"\*\*[^*]+\*\*")
_BACK_REFERENCE: Final = re.compile(r"[\s↩↑⤴⬆︎\ufe0e^]*")


def convert_html_to_markdown(body: Any, *, url: str, base: str) -> tuple[str, list[str]]:
    """Convert an lxml element to Markdown and modify it.

    Args:
        body: The element.
        url: URL of the page.
        base: Base of relative links, itself relative to `url`.

    Returns:
        The Markdown, and the URLs of its images. The target of the image with index 0 is `assets/page-image-1`.
    """
    for table in reversed(list(body.iter("table"))):
        if next(table.iterancestors("pre"), None) is None:
            clean_table(table)
    flatten_deep_elements(body)
    converter = _Converter(url, base)
    flow = _Flow()
    converter.walk(body, Style(), flow)
    return _join_blocks(flow.finish()), converter.images


@dataclass(slots=True)
class _Block:
    """A block of Markdown. `kind` is the marker of a list, or empty."""

    text: str
    kind: str = ""


@dataclass(slots=True)
class _Flow:
    """Finished blocks, and the runs of the current paragraph.

    An inline flow has only one paragraph. A nested one is within a list or quotation.
    """

    is_inline: bool = False
    is_nested: bool = False
    keeps_lines: bool = False
    blocks: list[_Block] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def end_paragraph(self) -> None:
        if self.is_inline:
            self.runs.append(Run(" "))
        elif self.runs:
            for paragraph in write_paragraphs(self.runs):
                self.blocks += _split_lists(paragraph)
            self.runs = []

    def add_block(self, text: str, kind: str = "") -> None:
        self.end_paragraph()
        if text:
            self.blocks.append(_Block(text, kind))

    def finish(self) -> list[_Block]:
        self.end_paragraph()
        return self.blocks


def _split_lists(paragraph: str) -> list[_Block]:
    """Return the blocks of a paragraph. Two or more lines in a row that begin as list items become a list."""
    if len(_TYPED_ITEM.findall(paragraph)) < _MIN_TYPED_ITEMS:
        return [_Block(paragraph)]
    blocks: list[_Block] = []
    for is_list, group in groupby(paragraph.split("\\\n"), key=lambda line: _TYPED_ITEM.match(line) is not None):
        lines = list(group)
        if is_list and len(lines) >= _MIN_TYPED_ITEMS:
            blocks.append(_Block("\n".join(f"- {_TYPED_ITEM.sub('', line)}" for line in lines), "-"))
        else:
            blocks.append(_Block("\\\n".join(lines)))
    return blocks


def _join_blocks(blocks: Sequence[_Block], separator: str = "\n\n") -> str:
    """Join blocks. Of two lists in a row, the second gets other markers, so that they stay two lists."""
    joined: list[str] = []
    previous_kind = ""
    for block in blocks:
        text, kind = block.text, block.kind
        if kind and kind == previous_kind:
            kind = {"-": "*", ".": ")"}[kind]
            pattern = r"^- " if kind == "*" else r"^(\d+)\. "
            text = re.sub(pattern, "* " if kind == "*" else r"\1) ", text, flags=re.MULTILINE)
        joined.append(text)
        previous_kind = kind
    return separator.join(joined)


class _Converter:
    """Converts elements, with the URLs of one page. `images` are the URLs of its images."""

    def __init__(self, url: str, base: str) -> None:
        self._url, self._base = url, base
        self._explained: set[str] = set()
        self._players: set[str] = set()
        self.images: list[str] = []

    def walk(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add the content of an element to the flow."""
        self._add_text(element.text, style, flow)
        for child in element:
            if isinstance(child.tag, str):
                self._add_element(child, style, flow)
            self._add_text(child.tail, style, flow)

    def _add_text(self, text: str | None, style: Style, flow: _Flow) -> None:
        if not text:
            return
        text = _INVISIBLE.sub("", text)
        lines = re.split(r"\r\n|\r|\n", text) if flow.keeps_lines else [text]
        for index, line in enumerate(lines):
            if index:
                flow.runs.append(Run())
            if line:
                flow.runs.append(Run(line, style))

    def _add_element(self, element: Any, style: Style, flow: _Flow) -> None:
        tag = element.tag
        if tag in _IGNORED:
            return
        if element.get(formulas.ATTRIBUTE):
            self._add_formula(element, style, flow)
        elif handler := _HANDLERS.get(tag):
            handler(self, element, style, flow)
        elif tag in BLOCKS or _is_displayed_as_block(element):
            self._add_container(element, style, flow)
        else:
            self._walk_inline(element, _style_inline(tag, style), flow)

    def _walk_inline(self, element: Any, style: Style, flow: _Flow) -> None:
        keeps_lines, flow.keeps_lines = flow.keeps_lines, flow.keeps_lines or _keeps_lines(element)
        self.walk(element, style, flow)
        flow.keeps_lines = keeps_lines

    def _add_container(self, element: Any, style: Style, flow: _Flow) -> None:
        flow.end_paragraph()
        self._walk_inline(element, style, flow)
        flow.end_paragraph()

    def _write_inline(self, element: Any, style: Style | None = None) -> str:
        """Return the content of an element as one line."""
        flow = _Flow(is_inline=True)
        self.walk(element, style or Style(), flow)
        return write_line(flow.runs)

    def _write_blocks(
        self, element: Any, style: Style, *, is_nested: bool = True, keeps_lines: bool = False
    ) -> list[_Block]:
        flow = _Flow(is_nested=is_nested, keeps_lines=keeps_lines or _keeps_lines(element))
        self.walk(element, style, flow)
        return flow.finish()

    # Inline elements --------------------------------------------------------------------------------------------

    def _add_formula(self, element: Any, style: Style, flow: _Flow) -> None:
        tex = "".join(element.itertext())
        if element.get(formulas.ATTRIBUTE) == "block" and not flow.is_inline:
            flow.add_block(formulas.write_block(tex))
        elif formula := formulas.write_inline(tex, in_cell=flow.is_inline):
            flow.runs.append(Run(style=style, markup=formula))

    def _add_break(self, element: Any, style: Style, flow: _Flow) -> None:
        flow.runs.append(Run(" ") if flow.is_inline else Run())

    def _add_link(self, element: Any, style: Style, flow: _Flow) -> None:
        """Make a link absolute. Links to other than web pages or mailboxes (`#top`) keep only their text."""
        href = (element.get("href") or "#").strip()
        target = self._resolve(href)
        if href.startswith("#") and _BACK_REFERENCE.fullmatch("".join(element.itertext())):
            return
        is_reference = element.get("role") == "doc-noteref" or FOOTNOTE.match(href)
        if is_reference and re.fullmatch(r"\[?\d{1,3}\]?", "".join(element.itertext()).strip()):
            self._add_superscript(element, style, flow)
            return
        if target is None or href.startswith("#") or style.link is not None:
            self._walk_inline(element, style, flow)
        else:
            self._walk_inline(element, replace(style, link=escape_link_target(target)), flow)

    def _resolve(self, href: str, schemes: Iterable[str] = ("http", "https", "mailto")) -> str | None:
        try:
            target = strip_userinfo(urljoin(urljoin(self._url, self._base), href))
            return target if urlsplit(target).scheme in schemes else None
        except ValueError:
            return None

    def _add_code(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a code span. Code with several lines is a block."""
        if next(element.iter("br"), None) is not None or _keeps_lines(element):
            code = code_blocks.extract_code(element)
            if "\n" in code and not flow.is_inline:
                flow.add_block(_write_fence(code, code_blocks.find_code_language(element)))
                return
            element = _with_text(element, code)
        if any(True for _ in element.iter("img")):
            self._walk_inline(element, style, flow)
            return
        text = _INVISIBLE.sub("", "".join(element.itertext()))
        flow.runs.append(Run(text.replace("\u00a0", " "), replace(style, code=True)))

    def _add_superscript(self, element: Any, style: Style, flow: _Flow) -> None:
        text = "".join(element.itertext()).strip()
        if re.fullmatch(r"\[?[0-9+\-−=()n]+\]?", text) and re.search(r"\d|n", text):
            flow.runs.append(Run(text.strip("[]").translate(_SUPERSCRIPTS), style))
        elif re.search(r"\w[+\-*/]\w", text) and not element.findall(".//a"):
            flow.runs.append(Run(f"^({text})", style))
        else:
            self._walk_inline(element, style, flow)

    def _add_subscript(self, element: Any, style: Style, flow: _Flow) -> None:
        text = "".join(element.itertext()).strip()
        if re.fullmatch(r"[0-9+\-−=()]+", text):
            flow.runs.append(Run(text.translate(_SUBSCRIPTS), style))
        else:
            self._walk_inline(element, style, flow)

    def _add_quote(self, element: Any, style: Style, flow: _Flow) -> None:
        flow.runs.append(Run("“", style))
        self._walk_inline(element, style, flow)
        flow.runs.append(Run("”", style))

    def _add_reading(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add the reading of East Asian characters in brackets."""
        if reading := "".join(element.itertext()).strip():
            flow.runs.append(Run(f"({reading})", style))

    def _add_abbreviation(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add an abbreviation. At its first use, its meaning follows in brackets."""
        self._walk_inline(element, style, flow)
        meaning = " ".join((element.get("title") or "").split())
        words = "".join(element.itertext()).strip()
        if meaning and meaning.casefold() != words.casefold() and words not in self._explained:
            self._explained.add(words)
            flow.runs.append(Run(f" ({meaning})", style))

    # Images and players -----------------------------------------------------------------------------------------

    def _add_image(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add an image, or the alternative text of an icon. Decoration is omitted."""
        source = embedded_media.find_image_source(element)
        alt = " ".join(_INVISIBLE.sub("", element.get("alt") or element.get("aria-label") or "").split())[
            :_MAX_ALT_CHARACTERS
        ]
        figure = next(element.iterancestors("figure"), None)
        is_decoration = element.get("role") in ("presentation", "none") or (element.get("alt") == "" and figure is None)
        is_sign = bool(alt) and not re.search(r"\w", alt)
        if embedded_media.is_tracker(source) or is_sign or (is_decoration and not alt) or _is_in_site_header(element):
            return
        target = (
            source if source.startswith("data:image/") else self._resolve(source, ("http", "https")) if source else None
        )
        is_drawing = (target or "").partition("?")[0].lower().endswith(".svg") and style.link is not None
        if embedded_media.is_icon(element) or target is None or is_drawing or len(target) > MAX_DATA_URL_CHARACTERS:
            if alt:
                flow.runs.append(Run(alt, style))
            return
        alt = alt or " ".join((element.get("title") or "").split()) or embedded_media.get_file_name(target)
        if target not in self.images:
            if len(self.images) >= _MAX_IMAGES:
                return
            self.images.append(target)
        label = escape_inline_text(alt) if not target.startswith("data:") or element.get("alt") else ""
        number = self.images.index(target) + 1
        flow.runs.append(Run(style=style, markup=f"![{label}]({IMAGE_TARGET_PREFIX}{number})"))

    def _add_frame(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a link to an embedded page, such as a player. An `object` has other content for old browsers."""
        target = self._resolve(embedded_media.find_frame_source(element), ("http", "https"))
        if element.tag == "embed":  # the parser of old HTML puts what follows inside
            flow.end_paragraph()
        is_image = re.search(r"\.(png|jpe?g|gif|webp|svg)$|^image/", element.get("type") or urlsplit(target or "").path)
        if (
            target is None
            or target == self._url
            or is_image
            or embedded_media.is_invisible_frame(element)
            or embedded_media.is_tracker(target)
        ):
            if element.tag == "object":
                self._walk_inline(element, style, flow)
            return
        title = element.get("title") or element.get("aria-label") or element.get("name") or ""
        self._add_player(embedded_media.describe_player(target, title), flow)

    def _add_media(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a link to a `video` or `audio` file and its subtitles."""
        sources = [element, *element.iter("source")]
        links = [
            self._resolve(source, ("http", "https"))
            for part in sources
            if (source := (part.get("src") or part.get("data-src") or "").strip())
        ]
        usable = [link for link in links if link]
        if not usable or usable[0] in self._players:
            return
        kind = element.tag.capitalize()
        title = element.get("title") or element.get("aria-label") or embedded_media.get_file_name(usable[0])
        self._add_player(embedded_media.Player(kind, title, usable[0]), flow, end=False)
        for track in element.iter("track"):
            link = self._resolve(track.get("src") or "", ("http", "https"))
            label = track.get("label") or track.get("srclang") or track.get("kind") or ""
            if (
                link
                and track.get("src")
                and (track.get("kind") or "subtitles").lower() in ("subtitles", "captions", "descriptions")
                and label
            ):
                flow.runs.append(Run(" · "))
                flow.runs.append(Run(label, Style(link=escape_link_target(link))))
        flow.end_paragraph()

    def _add_player(self, player: embedded_media.Player, flow: _Flow, *, end: bool = True) -> None:
        if player.url in self._players:  # also the one for readers without JavaScript
            return
        self._players.add(player.url)
        flow.end_paragraph()
        label = f"{player.kind}: {player.title}" if player.kind else player.title
        flow.runs.append(
            Run(" ".join(label.split())[:_MAX_ALT_CHARACTERS] or player.url, Style(link=escape_link_target(player.url)))
        )
        if end:
            flow.end_paragraph()

    # Blocks -----------------------------------------------------------------------------------------------------

    def _add_heading(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a heading, or bold text within a list or quotation. A heading with only an image becomes the image."""
        if flow.is_inline:
            self._add_container(element, style, flow)
            return
        line = self._write_inline(element, Style(link=style.link))
        if flow.is_nested and line:
            flow.end_paragraph()
            self._walk_inline(element, replace(style, bold=True), flow)
            flow.end_paragraph()
        elif line:
            hashes = "" if _is_only_images(line) else "#" * int(element.tag[1]) + " "
            flow.add_block(hashes + re.sub(r"(#+)$", r"\\\1", line))

    def _add_preformatted(self, element: Any, style: Style, flow: _Flow) -> None:
        if code_blocks.is_prose(element) and not flow.is_inline:
            flow.end_paragraph()
            flow.blocks += self._write_blocks(element, style, is_nested=flow.is_nested, keeps_lines=True)
            return
        code = code_blocks.extract_code(element)
        if flow.is_inline:
            flow.runs.append(Run(" ".join(code.split()), replace(style, code=True)))
        elif code:
            flow.add_block(_write_fence(code, code_blocks.find_code_language(element)))

    def _add_list(self, element: Any, style: Style, flow: _Flow) -> None:
        if flow.is_inline:
            self._add_list_in_line(element, style, flow)
            return
        items = [(label, _join_item(blocks)) for label, blocks in self._read_items(element, style)]
        items = [(label, text) for label, text in items if text]
        is_numbered = (
            bool(items)
            and all(label.isdigit() for label, _ in items)
            and _is_ascending([int(label) for label, _ in items])
        )
        lines = []
        for label, text in items:
            if label and not is_numbered:
                text = f"{label}\\. {text}" if label.isdigit() else f"{label}. {text}"
            bullet = f"{label}. " if is_numbered else "- "
            first, *rest = text.split("\n")
            lines += [bullet + first, *(" " * len(bullet) + line if line else "" for line in rest)]
        flow.add_block("\n".join(lines), "." if is_numbered else "-")

    def _add_list_in_line(self, element: Any, style: Style, flow: _Flow) -> None:
        flow.end_paragraph()
        for index, item in enumerate(_list_parts(element)):
            if index:
                flow.runs.append(Run("; ", style))
            if isinstance(item, str):
                self._add_text(item, style, flow)
            else:
                self._walk_inline(item, style, flow)
        flow.end_paragraph()

    def _read_items(self, element: Any, style: Style) -> list[tuple[str, list[_Block]]]:
        """Return the items with their labels. A list or text directly in the list belongs to the item before."""
        items: list[tuple[str, list[_Block]]] = []
        labels = _make_labels(element)
        for child in _list_parts(element):
            if isinstance(child, str) or child.tag != "li":
                flow = _Flow(is_nested=True)
                if isinstance(child, str):
                    self._add_text(child, style, flow)
                else:
                    self._add_element(child, style, flow)
                if not (blocks := flow.finish()):
                    continue
                is_list = not isinstance(child, str) and child.tag in ("ul", "ol", "menu", "dl")
                if items and is_list:
                    items[-1][1].extend(blocks)
                else:
                    items.append(("", blocks))
            else:
                items.append((labels.get(child, ""), self._write_blocks(child, style)))
        return items

    def _add_item(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a list item outside of a list, together with those that follow."""
        if flow.is_inline:
            self._add_container(element, style, flow)
            return
        text = _join_item(self._write_blocks(element, style))
        if not text:
            return
        first, *rest = text.split("\n")
        item = "\n".join([f"- {first}", *(f"  {line}" if line else "" for line in rest)])
        flow.end_paragraph()
        if (
            flow.blocks
            and flow.blocks[-1].kind == "-"
            and element.getprevious() is not None
            and element.getprevious().tag == "li"
        ):
            flow.blocks[-1].text += f"\n{item}"
        else:
            flow.add_block(item, "-")

    def _add_term(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add a term as a paragraph, because CommonMark has no definition lists."""
        flow.end_paragraph()
        has_markup = any(True for _ in element.iter("code", "b", "strong", "img"))
        self._walk_inline(element, style if has_markup or flow.is_inline else replace(style, bold=True), flow)
        flow.end_paragraph()

    def _add_quotation(self, element: Any, style: Style, flow: _Flow) -> None:
        if flow.is_inline:
            self._add_container(element, style, flow)
            return
        text = _join_blocks(self._write_blocks(element, style))
        flow.add_block("\n".join(f"> {line}" if line else ">" for line in text.split("\n")) if text else "")

    def _add_table(self, element: Any, style: Style, flow: _Flow) -> None:
        if flow.is_inline:
            self._add_container(element, style, flow)
            return
        flow.end_paragraph()
        for caption in element.iterchildren("caption"):
            self._add_container(caption, style, flow)
        rows = [row for row in element.iter("tr") if next(row.iterancestors("table")) is element]
        cells = [[self._write_cell(cell, style) for cell in row if cell.tag in ("td", "th")] for row in rows]
        filled = [(row, line) for row, line in zip(rows, cells, strict=True) if any(line)]
        if not filled:
            return
        width = max(len(line) for _, line in filled)
        first_row = filled[0][0]
        has_header = first_row.getparent().tag == "thead" or all(
            cell.tag == "th" for cell in first_row if cell.tag in ("td", "th")
        )
        lines = [line + [""] * (width - len(line)) for _, line in filled]
        if not has_header and len(lines) > 1 and all(map(_BOLD.fullmatch, filter(None, lines[0]))):
            lines[0] = [cell.strip("*") for cell in lines[0]]
        elif not has_header:
            lines.insert(0, [""] * width)
        lines.insert(1, ["---"] * width)
        flow.add_block("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def _write_cell(self, cell: Any, style: Style) -> str:
        """Return the text on one line with escaped bars. GFM 4.10 requires the escape even in code."""
        return re.sub(r"(?<!\\)\|", r"\\|", self._write_inline(cell, style))

    def _add_summary(self, element: Any, style: Style, flow: _Flow) -> None:
        """Add the visible line of `details` in bold."""
        flow.end_paragraph()
        has_heading = any(True for _ in element.iter(*HEADINGS))
        self._walk_inline(element, style if has_heading or flow.is_inline else replace(style, bold=True), flow)
        flow.end_paragraph()

    def _ignore(self, element: Any, style: Style, flow: _Flow) -> None:
        flow.end_paragraph()


_Handler = Callable[[_Converter, Any, Style, _Flow], None]
_HANDLERS: Final[dict[str, _Handler]] = {
    **dict.fromkeys(HEADINGS, _Converter._add_heading),
    **dict.fromkeys(("ul", "ol", "menu", "dir"), _Converter._add_list),
    **dict.fromkeys(("iframe", "embed", "object", "frame"), _Converter._add_frame),
    **dict.fromkeys(("video", "audio"), _Converter._add_media),
    **dict.fromkeys(("code", "samp", "tt", "kbd"), _Converter._add_code),
    **dict.fromkeys(("pre", "listing", "xmp", "plaintext"), _Converter._add_preformatted),
    **dict.fromkeys(("abbr", "acronym"), _Converter._add_abbreviation),
    "a": _Converter._add_link,
    "blockquote": _Converter._add_quotation,
    "br": _Converter._add_break,
    "dt": _Converter._add_term,
    "hr": _Converter._ignore,
    "img": _Converter._add_image,
    "li": _Converter._add_item,
    "q": _Converter._add_quote,
    "rt": _Converter._add_reading,
    "sub": _Converter._add_subscript,
    "summary": _Converter._add_summary,
    "sup": _Converter._add_superscript,
    "table": _Converter._add_table,
}


def _style_inline(tag: str, style: Style) -> Style:
    if tag in ("b", "strong"):
        return replace(style, bold=True)
    if tag in ("i", "em", "var", "cite", "dfn"):
        return replace(style, italic=True)
    return replace(style, deleted=True) if tag in ("del", "s", "strike") else style


def _is_displayed_as_block(element: Any) -> bool:
    style = element.get("style") or ""
    return bool(re.search(r"display\s*:\s*(block|flex|grid|list-item|table)\b", style, re.IGNORECASE))


def _is_in_site_header(element: Any) -> bool:
    """Return whether the element is in the header or footer of the whole page."""
    parts = [above.tag for above in element.iterancestors("header", "footer", "nav", "main", "article")]
    return bool(parts) and parts[0] in ("header", "footer", "nav") and not {"main", "article"} & set(parts)


def _keeps_lines(element: Any) -> bool:
    classes = set((element.get("class") or "").lower().split())
    return bool(_KEEPS_LINES.search(element.get("style") or "") or classes & _KEEPS_LINES_CLASSES)


def _with_text(element: Any, text: str) -> Any:
    copy = element.makeelement(element.tag)
    copy.text = text
    return copy


def _is_only_images(line: str) -> bool:
    return not re.sub(r"!\[(?:[^\[\]\\]|\\.)*\]\([^()\s]*\)", "", line).strip("[]() ")


def _write_fence(code: str, language: str) -> str:
    """Return the code in a fence with more backticks than the code contains."""
    longest = max((len(ticks) for ticks in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _join_item(blocks: Sequence[_Block]) -> str:
    """Return the text of a list item. A nested list directly follows a paragraph."""
    parts: list[str] = []
    for index, block in enumerate(blocks):
        if index:
            parts.append(
                "\n"
                if block.kind
                and not blocks[index - 1].kind
                and not blocks[index - 1].text.startswith(("```", "|", "$$"))
                else "\n\n"
            )
        parts.append(
            _join_blocks(blocks[index - 1 : index + 1], "\0").partition("\0")[2] if index and block.kind else block.text
        )
    return "".join(parts)


def _list_parts(element: Any) -> Iterable[Any]:
    """Yield the items of a list, also those within `div` elements, and text between them."""
    if (element.text or "").strip():
        yield element.text
    for child in element:
        if isinstance(child.tag, str):
            is_wrapper = child.tag in ("div", "span", "section", "a") and any(part.tag == "li" for part in child)
            if is_wrapper:
                yield from _list_parts(child)
            else:
                yield child
        if (child.tail or "").strip():
            yield child.tail


def _make_labels(element: Any) -> dict[Any, str]:
    """Return the numbers or letters of the items of an ordered list (HTML standard, 4.4.5 and 4.4.8)."""
    if element.tag != "ol":
        return {}
    items = [part for part in _list_parts(element) if not isinstance(part, str) and part.tag == "li"]
    is_reversed = element.get("reversed") is not None
    number = _read_integer(element.get("start"), len(items) if is_reversed else 1)
    labels: dict[Any, str] = {}
    for item in items:
        number = _read_integer(item.get("value"), number)
        labels[item] = _format_number(number, (item.get("type") or element.get("type") or "1").strip())
        number += -1 if is_reversed else 1
    return labels


def _read_integer(text: str | None, default: int) -> int:
    return int(text) if text and re.fullmatch(r"\s*-?[0-9]{1,8}\s*", text) else default


def _format_number(number: int, kind: str) -> str:
    if kind in ("a", "A") and 0 < number <= 26:
        return chr(ord(kind) + number - 1)
    if kind in ("i", "I") and 0 < number < 100:
        tens, ones = divmod(number, 10)
        roman = ("", "x", "xx", "xxx", "xl", "l", "lx", "lxx", "lxxx", "xc")[tens]
        roman += ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")[ones]
        return roman if kind == "i" else roman.upper()
    return str(number)


def _is_ascending(numbers: Sequence[int]) -> bool:
    """Return whether CommonMark would show the numbers of a list as they are."""
    return numbers[0] >= 0 and list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def flatten_deep_elements(body: Any) -> None:
    """Replace elements that are nested too deeply by their content. Takes linear time, unlike `drop_tag` for each."""
    depth = {body: 0}
    for element in body.iterdescendants():
        depth[element] = depth[element.getparent()] + 1
        if depth[element] > _MAX_DEPTH:
            element.tag = _DEEP_TAG
    lxml.etree.strip_tags(body, _DEEP_TAG)
