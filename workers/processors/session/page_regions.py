"""Find the region of the main text, and what is named as boilerplate in it. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

from jobledger.workers.processors.session.page_blocks import HEADINGS, Block

STRUCTURES: Final = frozenset({"table", "ul", "ol", "dl", "figure", "pre", "blockquote", "details"})
_SECTIONS: Final = frozenset({"article", "section", "blockquote", "figure", "li", "td"})
_BOILERPLATE_TAGS: Final = frozenset({"nav", "aside", "form"})
_BOILERPLATE_ROLES: Final = frozenset(
    {"navigation", "banner", "contentinfo", "search", "complementary", "dialog", "menu"}
)
_BOILERPLATE_NAMES: Final = re.compile(
    r"(?<![a-z])(nav|navbar|navigation|menu|breadcrumbs?|pager|pagination|side-?bar|cookies?|consent|shar(e|ing)"
    r"|social|newsletter|related|comments?|banner|adverts?|ads|skip|toc|top-?bar|foot(er)?|masthead)(?![a-z])"
)
_MAIN_SHARE: Final = 0.85
_REGION_SHARE: Final = 0.3
_ADDED_PROSE_SHARE: Final = 0.7
_MAX_STRUCTURES: Final = 8
_MAX_HEADING: Final = 200
_MAX_HEADING_PARTS: Final = 20


def find_named_boilerplate(body: Any, region: Any) -> set[Any]:
    """Return the elements whose names, or those of an element around them, are those of boilerplate.

    The region and what is around it do not count: wrappers of whole pages have all kinds of names.
    """
    wrappers = {region, *region.iterancestors()}
    named: set[Any] = set()
    for element in body.iterdescendants():
        if element not in wrappers and (
            element.getparent() in named
            or element.tag in _BOILERPLATE_TAGS
            or element.get("role") in _BOILERPLATE_ROLES
            or _is_page_footer(element)
            or _BOILERPLATE_NAMES.search(_get_names(element))
        ):
            named.add(element)
    return named


def _get_names(element: Any) -> str:
    """Return the ID and classes. An ID that generators derive from a heading (`related-work`) does not count."""
    identifier = (element.get("id") or "").lower()
    if identifier and _BOILERPLATE_NAMES.search(identifier) and _is_slug_of_heading(identifier, element):
        identifier = ""
    return f"{identifier} {(element.get('class') or '').lower()}"


def _is_slug_of_heading(identifier: str, element: Any) -> bool:
    heading = next(element.iter(*HEADINGS), None)
    text = "".join(islice(heading.itertext(), _MAX_HEADING_PARTS))[:_MAX_HEADING] if heading is not None else ""
    return identifier == re.sub(r"\W+", "-", text.lower()).strip("-_")


def list_structures(body: Any) -> dict[Any, tuple[Any, ...]]:
    """Return the lists, tables and figures around each element, but not those with large headings."""
    layout = {ancestor for part in body.iter("h1", "h2", "article") for ancestor in part.iterancestors()}
    structures: dict[Any, tuple[Any, ...]] = {body: ()}
    for element in body.iterdescendants():
        around = structures[element.getparent()]
        is_structure = element.tag in STRUCTURES and element not in layout
        structures[element] = (*around, element)[-_MAX_STRUCTURES:] if is_structure else around
    return structures


def find_region(body: Any, blocks: Sequence[Block], total: int) -> Any:
    """Return the element in which other blocks may belong to the main text.

    It is the outermost `main` or `article` around most of the extracted text, or else the largest element of whose text
    enough is extracted.
    """
    extracted, unlinked, prose = Counter[Any](), Counter[Any](), Counter[Any]()
    for block in blocks:
        extracted[block.element] = block.size * block.is_extracted
        unlinked[block.element] = max(0, block.size - block.linked)
        prose[block.element] = block.size * block.is_prose
    for element in reversed(list(body.iterdescendants())):
        for counter in (extracted, unlinked, prose):
            counter[element.getparent()] += counter[element]
    region = body
    while inner := [child for child in region if extracted[child] >= _MAIN_SHARE * total]:
        region = inner[0]
    landmarks = [
        element
        for element in (region, *region.iterancestors())
        if element.tag in ("main", "article") or element.get("role") == "main"
    ]
    if landmarks:
        return landmarks[-1]
    while region is not body:
        parent = region.getparent()
        is_mostly_extracted = extracted[parent] >= _REGION_SHARE * unlinked[parent]
        added = unlinked[parent] - unlinked[region]
        if not is_mostly_extracted and prose[parent] - prose[region] < _ADDED_PROSE_SHARE * max(1, added):
            break
        region = parent
    return region


def _is_page_footer(element: Any) -> bool:
    """Return whether the element is the footer of the page. The footer of an article or quote belongs to its text."""
    return element.tag == "footer" and not any(parent.tag in _SECTIONS for parent in element.iterancestors())
