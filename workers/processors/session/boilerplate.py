"""session: which elements of a page are its own, and which belong to the site around it. Pure.

trafilatura is good at telling which words belong to the page, but what it makes of them loses table cells, blank lines
of code and whole sentences. So it is asked for the words only: every element that holds some of them stays as it was
written, and so does what stands in between, unless it looks like a menu.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from configparser import ConfigParser
from copy import deepcopy
from typing import Any, Final

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
_AROUND: Final = frozenset({"nav", "footer"})
_ROLES: Final = frozenset({"navigation", "banner", "contentinfo", "search", "complementary", "dialog", "menu"})
_NAMED_LIKE_A_MENU: Final = re.compile(
    r"(?<![a-z])(nav|navbar|navigation|menu|breadcrumbs?|pager|pagination|side-?bar|cookies?|consent|shar(e|ing)"
    r"|social|newsletter|related|comments?|banner|adverts?|ads|skip|toc|top-?bar|foot(er)?|masthead)(?![a-z])"
)
_FOR_SCREEN_READERS: Final = re.compile(r"skip-?(link|to|nav)|screen-?reader|sr-only|visually-?hidden")
_ANCHOR_SIGN: Final = re.compile(r"[\s¶#§∞🔗]*")
_MENU_LINKS: Final = 3
_MENU_SHARE: Final = 0.6
_SMALL_SHARE: Final = 0.3
_OWN_SHARE: Final = 0.8
_AS_GOOD_AS_ALL: Final = 0.85
_LONG_TEXT: Final = 80
_PARTS_OF_LISTS: Final = frozenset({"tbody", "tr", "li", "dd", "dt"})


def remove_non_text_elements(tree: Any) -> None:
    """Remove in place what is not text for a reader: scripts, forms' controls, hidden parts, signs to link headings."""
    for element in list(tree.iter(*_NO_TEXT)):
        _remove(element)
    for element in list(tree.iterfind(".//*[@hidden]")) + list(tree.iterfind(".//*[@aria-hidden='true']")):
        _remove(element)
    for element in [element for element in tree.iter() if _FOR_SCREEN_READERS.search(_names(element))]:
        _remove(element)
    for link in list(tree.iter("a")):
        if (link.get("href") or "#").startswith("#") and not len(link) and _ANCHOR_SIGN.fullmatch(link.text or ""):
            _remove(link)


def remove_boilerplate(tree: Any) -> bool:
    """Remove in place what belongs to the site around the page. False, and nothing is removed: it cannot be told."""
    body = tree.find("body")
    own = _ExtractedText(tree)
    texts = [(block, text) for block, text in _texts_of_blocks(body) if re.search(r"\w", text)]
    linked = _linked(body)
    kept = {block: len(text) for block, text in texts if own.holds(text) and not _is_menu(linked[block], len(text))}
    if not kept:
        return False
    blocks = [block for block, _ in texts]
    middle = _middle(body, kept)
    if middle is body:
        places = [place for place, block in enumerate(blocks) if block in kept]
        within = set(blocks[places[0] : places[-1] + 1])
    else:
        elements = set(middle.iter())
        within = {block for block in blocks if block in elements or kept.get(block, 0) >= _LONG_TEXT}
    within |= set(_headings_above(blocks, min(place for place, block in enumerate(blocks) if block in within)))
    counted = _counted(body, texts, kept, within, linked)
    most = counted[body]["kept"]
    for element in _outermost(
        body, lambda element: _is_around(element, counted[element], most, by_links=middle is body)
    ):
        _remove(element)
    return True


class _ExtractedText:
    """What trafilatura takes for the page's own: its lines, and which words stand side by side in them."""

    def __init__(self, tree: Any) -> None:
        said = _own_text(tree)
        self._lines = {tuple(_words(part)) for line in said.splitlines() for part in (line, *line.split("|"))}
        words = _words(said)
        self._neighbours = set(zip(words, words[1:], words[2:], strict=False))

    def holds(self, text: str) -> bool:
        words = _words(text)
        groups = list(zip(words, words[1:], words[2:], strict=False))
        if not groups:  # a word or two are said by chance as well
            return tuple(words) in self._lines
        return sum(group in self._neighbours for group in groups) >= _OWN_SHARE * len(groups)


def _own_text(tree: Any) -> str:
    tree = deepcopy(tree)
    for cell in tree.iter("td", "th"):  # it would make as many cells as they say, for any number
        cell.attrib.pop("colspan", None)
        cell.attrib.pop("rowspan", None)
    return (
        trafilatura.extract(
            tree,
            output_format="txt",
            favor_recall=True,
            include_comments=False,
            include_tables=True,
            config=_SETTINGS,
        )
        or ""
    )


def _extraction_settings() -> ConfigParser:
    """Below 250 characters trafilatura gives up the structure and dumps the text; talks are often that short."""
    settings = deepcopy(DEFAULT_CONFIG)
    settings.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")
    return settings


_SETTINGS = _extraction_settings()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _texts_of_blocks(body: Any) -> list[tuple[Any, str]]:
    """Every block with the text that stands in it and in no block inside it, in the order of the page."""
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


def _middle(body: Any, kept: dict[Any, int]) -> Any:
    """The innermost element that holds as good as all of the page's own text."""
    held: Counter[Any] = Counter()
    for block, size in kept.items():
        held[block] += size
        for above in block.iterancestors():
            held[above] += size
    middle = body
    while inner := [child for child in middle if held[child] >= _AS_GOOD_AS_ALL * held[body]]:
        middle = inner[0]
    return (
        middle if middle.tag not in _PARTS_OF_LISTS else next(middle.iterancestors("table", "ul", "ol", "dl"), middle)
    )


def _headings_above(blocks: list[Any], first: int) -> list[Any]:
    """From the last `h1` above, if it is no link home; else the headings just above."""
    for place in range(first, -1, -1):
        if blocks[place].tag == "h1" and not _is_link(blocks[place]):
            return blocks[place:first]
    begin = first
    while begin and blocks[begin - 1].tag in HEADINGS and not _is_link(blocks[begin - 1]):
        begin -= 1
    return blocks[begin:first]


def _is_link(heading: Any) -> bool:
    linked = "".join(text for link in heading.iter("a") for text in link.itertext())
    return bool(linked.strip()) and _words(linked) == _words("".join(heading.itertext()))


def _linked(body: Any) -> dict[Any, Counter[str]]:
    """How many links stand in each element, and how much of its text they are."""
    linked: dict[Any, Counter[str]] = {element: Counter() for element in body.iter()}
    for link in body.iter("a"):
        linked[link].update(links=1, linked=len("".join(link.itertext()).strip()))
    return _summed(linked, body)


def _counted(
    body: Any, texts: list[tuple[Any, str]], kept: dict[Any, int], within: set[Any], linked: dict[Any, Counter[str]]
) -> dict[Any, Counter[str]]:
    """How much of what is in each element."""
    counted: dict[Any, Counter[str]] = {element: Counter() for element in body.iter()}
    for block, text in texts:
        counted[block].update(characters=len(text.strip()), kept=kept.get(block, 0), within=block in within)
    _summed(counted, body)
    for element, counts in counted.items():
        counts.update(linked[element])
    return counted


def _summed(counted: dict[Any, Counter[str]], body: Any) -> dict[Any, Counter[str]]:
    for element in reversed(list(counted)):
        if element is not body and (counts := counted[element]):
            counted[element.getparent()].update(counts)
    return counted


def _is_menu(counts: Counter[str], characters: int) -> bool:
    return counts["links"] >= _MENU_LINKS and counts["linked"] > _MENU_SHARE * characters


def _is_around(element: Any, counts: Counter[str], most: int, *, by_links: bool) -> bool:
    if element.tag not in BLOCKS or not counts["characters"]:
        return False
    if element.tag in _AROUND or element.get("role") in _ROLES:
        return True
    if counts["kept"] < _SMALL_SHARE * most and _NAMED_LIKE_A_MENU.search(_names(element)):
        return True
    menu = by_links and not counts["kept"] and _is_menu(counts, counts["characters"])
    return menu or not counts["within"]


def _names(element: Any) -> str:
    return f"{element.get('id') or ''} {element.get('class') or ''}".lower()


def _outermost(body: Any, wanted: Any) -> Iterator[Any]:
    waiting = list(body)
    while waiting:
        element = waiting.pop()
        if wanted(element):
            yield element
        else:
            waiting.extend(element)


def _remove(element: Any) -> None:
    if element.getparent() is not None:
        element.drop_tree()
