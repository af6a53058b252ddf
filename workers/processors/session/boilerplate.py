"""Remove navigation and other boilerplate from a page. Pure.

trafilatura reliably finds the words of the main text, but its output loses table cells, blank lines in code and whole
sentences. This module therefore uses only its words. An element that contains some of them stays unchanged, and so does
everything between such elements, unless it looks like a menu.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Final

import lxml.etree  # type: ignore[import-untyped]  # it ships no types
import trafilatura
from trafilatura.settings import DEFAULT_CONFIG

HEADINGS: Final = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
BLOCKS: Final = HEADINGS | frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol", "p", "pre"),
        *("section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"),
    )
)
_NO_TEXT: Final = frozenset(
    (
        *("script", "style", "template", "svg", "math", "iframe", "object", "embed", "canvas"),
        *("select", "button", "input", "textarea"),
    )
)
_BOILERPLATE_TAGS: Final = frozenset({"nav", "footer"})
_BOILERPLATE_ROLES: Final = frozenset(
    {"navigation", "banner", "contentinfo", "search", "complementary", "dialog", "menu"}
)
_BOILERPLATE_NAMES: Final = re.compile(
    r"(?<![a-z])(nav|navbar|navigation|menu|breadcrumbs?|pager|pagination|side-?bar|cookies?|consent|shar(e|ing)"
    r"|social|newsletter|related|comments?|banner|adverts?|ads|skip|toc|top-?bar|foot(er)?|masthead)(?![a-z])"
)
_FOR_SCREEN_READERS: Final = re.compile(r"skip-?(link|to|nav)|screen-?reader|sr-only|visually-?hidden")
_ANCHOR_SIGN: Final = re.compile(r"[\s¶#§∞🔗]*")
_MENU_MIN_LINKS: Final = 3
_MENU_LINK_SHARE: Final = 0.6
_MINOR_SHARE: Final = 0.3
_MATCH_SHARE: Final = 0.8
_MAIN_SHARE: Final = 0.85
_LONG_TEXT_CHARACTERS: Final = 80
_SETTINGS: Final = deepcopy(DEFAULT_CONFIG)
_SETTINGS.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")  # by default, texts below 250 characters lose their structure
_LIST_PARTS: Final = frozenset({"tbody", "tr", "li", "dd", "dt"})


def remove_non_text_elements(tree: Any) -> None:
    """Remove scripts, form controls, hidden elements and anchor links of headings from the tree."""
    lxml.etree.strip_elements(tree, *_NO_TEXT, with_tail=False)
    for element in list(tree.iter()):
        is_hidden = element.get("hidden") is not None or element.get("aria-hidden") == "true"
        if is_hidden or _FOR_SCREEN_READERS.search(_get_names(element)):
            _remove(element)
    for link in list(tree.iter("a")):
        if (link.get("href") or "#").startswith("#") and not len(link) and _ANCHOR_SIGN.fullmatch(link.text or ""):
            _remove(link)


def remove_boilerplate(tree: Any) -> bool:
    """Remove boilerplate from the tree.

    Returns:
        Whether the main text was identified. If not, the tree is unchanged.
    """
    body = tree.find("body")
    extracted = _ExtractedText(tree)
    texts = [(block, text) for block, text in _list_block_texts(body) if re.search(r"\w", text)]
    link_counts = _count_links(body)
    kept = {
        block: len(text)
        for block, text in texts
        if extracted.contains(text) and not _is_menu(link_counts[block], len(text))
    }
    if not kept:
        return False
    blocks = [block for block, _ in texts]
    main = _find_main_element(body, kept)
    if main is body:
        indexes = [index for index, block in enumerate(blocks) if block in kept]
        main_blocks = set(blocks[indexes[0] : indexes[-1] + 1])
    else:
        elements = set(main.iter())
        main_blocks = {block for block in blocks if block in elements or kept.get(block, 0) >= _LONG_TEXT_CHARACTERS}
    first = min(index for index, block in enumerate(blocks) if block in main_blocks)
    main_blocks |= set(_list_headings_above(blocks, first))
    counts = _count_text(body, texts, kept, main_blocks, link_counts)
    total = counts[body]["kept"]
    for element in _find_outermost(
        body, lambda element: _is_boilerplate(element, counts[element], total, by_links=main is body)
    ):
        _remove(element)
    return True


class _ExtractedText:
    """The lines and word triples of the main text that trafilatura finds."""

    def __init__(self, tree: Any) -> None:
        text = _extract_text(tree)
        self._lines = {tuple(_split_words(part)) for line in text.splitlines() for part in (line, *line.split("|"))}
        words = _split_words(text)
        self._triples = set(zip(words, words[1:], words[2:], strict=False))

    def contains(self, text: str) -> bool:
        words = _split_words(text)
        triples = list(zip(words, words[1:], words[2:], strict=False))
        if not triples:  # one or two words may match by chance, so the whole line must match
            return tuple(words) in self._lines
        return sum(triple in self._triples for triple in triples) >= _MATCH_SHARE * len(triples)


def _extract_text(tree: Any) -> str:
    tree = deepcopy(tree)
    for cell in tree.iter("td", "th"):  # trafilatura would create that many cells without a limit
        cell.attrib.pop("colspan", None)
        cell.attrib.pop("rowspan", None)
    text = trafilatura.extract(tree, favor_recall=True, include_comments=False, config=_SETTINGS)
    return text or ""


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _list_block_texts(body: Any) -> list[tuple[Any, str]]:
    """Return every block with its text, without the text of nested blocks, in document order."""
    texts: dict[Any, list[str]] = {}
    block_of: dict[Any, Any] = {}
    for element in body.iter():
        parent = block_of.get(element.getparent(), body)
        block = element if element.tag in BLOCKS else parent
        block_of[element] = block
        texts.setdefault(block, []).append(element.text or "")
        if element is not body:
            texts.setdefault(parent, []).append(f" {element.tail or ''}")
    return [(block, "".join(pieces)) for block, pieces in texts.items()]


def _find_main_element(body: Any, kept: dict[Any, int]) -> Any:
    """Return the innermost element that contains nearly all of the main text."""
    counts = _sum_up_tree({element: Counter(kept=kept.get(element, 0)) for element in body.iter()}, body)
    main = body
    while inner := [child for child in main if counts[child]["kept"] >= _MAIN_SHARE * counts[body]["kept"]]:
        main = inner[0]
    return main if main.tag not in _LIST_PARTS else next(main.iterancestors("table", "ul", "ol", "dl"), main)


def _list_headings_above(blocks: list[Any], first: int) -> list[Any]:
    """Return the blocks from the last `h1` above that is not a link, or else the headings directly above."""
    for index in range(first, -1, -1):
        if blocks[index].tag == "h1" and not _is_link(blocks[index]):
            return blocks[index:first]
    begin = first
    while begin and blocks[begin - 1].tag in HEADINGS and not _is_link(blocks[begin - 1]):
        begin -= 1
    return blocks[begin:first]


def _is_link(heading: Any) -> bool:
    linked = "".join(text for link in heading.iter("a") for text in link.itertext())
    return bool(linked.strip()) and _split_words(linked) == _split_words("".join(heading.itertext()))


def _count_links(body: Any) -> dict[Any, Counter[str]]:
    """Return the number of links in each element and the length of their text."""
    linked: dict[Any, Counter[str]] = {element: Counter() for element in body.iter()}
    for link in body.iter("a"):
        linked[link].update(links=1, linked=len("".join(link.itertext()).strip()))
    return _sum_up_tree(linked, body)


def _count_text(
    body: Any,
    texts: list[tuple[Any, str]],
    kept: dict[Any, int],
    main_blocks: set[Any],
    link_counts: dict[Any, Counter[str]],
) -> dict[Any, Counter[str]]:
    """Return the counts of characters, main text, main blocks and links in each element."""
    counted: dict[Any, Counter[str]] = {element: Counter() for element in body.iter()}
    for block, text in texts:
        counted[block].update(characters=len(text.strip()), kept=kept.get(block, 0), main=block in main_blocks)
    _sum_up_tree(counted, body)
    for element, counts in counted.items():
        counts.update(link_counts[element])
    return counted


def _sum_up_tree(counted: dict[Any, Counter[str]], body: Any) -> dict[Any, Counter[str]]:
    for element in reversed(list(counted)):
        if element is not body and (counts := counted[element]):
            counted[element.getparent()].update(counts)
    return counted


def _is_menu(counts: Counter[str], characters: int) -> bool:
    return counts["links"] >= _MENU_MIN_LINKS and counts["linked"] > _MENU_LINK_SHARE * characters


def _is_boilerplate(element: Any, counts: Counter[str], total: int, *, by_links: bool) -> bool:
    if element.tag not in BLOCKS or not counts["characters"]:
        return False
    if element.tag in _BOILERPLATE_TAGS or element.get("role") in _BOILERPLATE_ROLES:
        return True
    if counts["kept"] < _MINOR_SHARE * total and _BOILERPLATE_NAMES.search(_get_names(element)):
        return True
    menu = by_links and not counts["kept"] and _is_menu(counts, counts["characters"])
    return menu or not counts["main"]


def _get_names(element: Any) -> str:
    return f"{element.get('id') or ''} {element.get('class') or ''}".lower()


def _find_outermost(body: Any, matches: Callable[[Any], bool]) -> Iterator[Any]:
    pending = list(body)
    while pending:
        element = pending.pop()
        if matches(element):
            yield element
        else:
            pending.extend(element)


def _remove(element: Any) -> None:
    if element.getparent() is not None:
        element.drop_tree()
