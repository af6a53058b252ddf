"""Select the main text of a page, and remove the rest, such as menus, footers and lists of other talks. Pure.

trafilatura reliably finds the words of the main text, but its output loses table cells, blank lines in code and whole
paragraphs. This module uses only its words. A block of the page whose words trafilatura returns is *extracted*, and is
kept unless it is only links or a table of contents. Other blocks are kept if they belong to extracted ones: parts of
the same table, list or figure, headings above them, prose nearby, and the speakers' names with their biographies. The
names of classes and IDs never remove an extracted block without links. They only prevent that other blocks are kept.
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise, takewhile
from typing import Any, Final, NamedTuple

import trafilatura
from trafilatura.settings import DEFAULT_CONFIG

from jobledger.workers.processors.session import formulas
from jobledger.workers.processors.session.embedded_media import FEATURED_ATTRIBUTE

HEADINGS: Final = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
BLOCKS: Final = HEADINGS | frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol", "p", "pre"),
        *("section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"),
    )
)
_STRUCTURES: Final = frozenset({"table", "ul", "ol", "dl", "figure", "pre", "blockquote", "details"})
_MEDIA: Final = frozenset({"img", "iframe", "video", "audio", "object", "embed"})
_MEDIA_LEVELS: Final = 4
_ITEMS: Final = frozenset({"li", "td", "th", "dd", "dt"})
_SECTIONS: Final = frozenset({"article", "section", "blockquote", "figure", "li", "td"})
_BOILERPLATE_TAGS: Final = frozenset({"nav", "aside", "form"})
_BOILERPLATE_ROLES: Final = frozenset(
    {"navigation", "banner", "contentinfo", "search", "complementary", "dialog", "menu"}
)
_BOILERPLATE_NAMES: Final = re.compile(
    r"(?<![a-z])(nav|navbar|navigation|menu|breadcrumbs?|pager|pagination|side-?bar|cookies?|consent|shar(e|ing)"
    r"|social|newsletter|related|comments?|banner|adverts?|ads|skip|toc|top-?bar|foot(er)?|masthead)(?![a-z])"
)
_FILE: Final = re.compile(
    r"\.(pdf|pptx?|od[pt]|key|zip|mp4|webm|mkv|mp3|ogg|og[av]|m4[av]|srt|vtt)([?#]|$)", re.IGNORECASE
)
_SENTENCE_END: Final = re.compile(r"[.!?:…。！？：][\"'”’»)]*$")
FOOTNOTE: Final = re.compile(r"#_?(user-content-)?(fn|ftn|foot|note|cite|sdfootnote|endnote)", re.IGNORECASE)
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")

# The limits below are chosen by `make evaluate`, on conference pages and on the set of trafilatura.
_MATCH_SHARE: Final = 0.8
"""A block is extracted if trafilatura returns so many of its word triples."""
_MAX_COMPARED_BLOCKS: Final = 3_000
"""For a page with more, trafilatura does not compare its result with that of jusText, which takes quadratic time."""
_MAX_JOINED_CHARACTERS: Final = 300_000_000
_MAIN_SHARE: Final = 0.85
_REGION_SHARE: Final = 0.3
_ADDED_PROSE_SHARE: Final = 0.7
_PROSE_CHARACTERS: Final = 110
_PROSE_LINK_SHARE: Final = 0.3
_PROSE_DISTANCE: Final = 7
_PROSE_SHARE: Final = 0.06
_PROSE_SHARE_AT_END: Final = 0.2
_CONTAINER_LEVELS: Final = 3
_SHORT_CHARACTERS: Final = 25
_MENU_LINKS: Final = 3
_MENU_LINK_SHARE: Final = 0.8
_LINK_CHARACTERS: Final = 40
_LINK_SHARE: Final = 0.7
_STRUCTURE_LINK_SHARE: Final = 0.5
_STRUCTURE_SHARE: Final = 0.3
_MAX_STRUCTURES: Final = 8
_NAMED_CHARACTERS: Final = 80
_NAMED_LINK_SHARE: Final = 0.2
_BIOGRAPHY_BLOCKS: Final = 6
_BIOGRAPHY_LEVELS: Final = 5
_BIOGRAPHY_CHARACTERS: Final = 60
_NAME_WORDS: Final = 8
_MAX_NAMES: Final = 20
_EMPTY_HEADING_CHARACTERS: Final = 40
_LABEL_CHARACTERS: Final = 60
_MAX_HEADING: Final = 200
_QUOTED_CHARACTERS: Final = 80
_MAX_FOOTNOTES: Final = 200
_MAX_HEADING_PARTS: Final = 20

_SETTINGS: Final = deepcopy(DEFAULT_CONFIG)
_SETTINGS.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")  # by default, texts below 250 characters lose their structure


class Selection(NamedTuple):
    """What was selected.

    Attributes:
        is_identified: Whether the main text was found. If not, the page is unchanged.
        omitted_share: The part of the page's prose, from 0 to 1, that was removed although it is not named as
            navigation, comments or the like.
        omitted_text: The beginning of the longest text of that part.
    """

    is_identified: bool
    omitted_share: float = 0.0
    omitted_text: str = ""


def remove_boilerplate(tree: Any, speakers: Sequence[str] = ()) -> Selection:
    """Remove everything but the main text from the tree.

    Args:
        tree: The page.
        speakers: Names of the speakers. They are kept, with the biography next to them.
    """
    body = tree.find("body")
    blocks = _list_blocks(body)
    _mark_extracted(tree, blocks)
    if not any(block.is_extracted for block in blocks):
        return Selection(is_identified=False)
    selector = _Selector(body, blocks)
    selector.select(speakers)
    _keep_captions_as_alternative_texts(blocks)
    selected = [*(block.element for block in blocks if block.is_kept), *selector.list_media()]
    kept = {element for part in selected for element in (part, *part.iterancestors())}
    _remove_others(body, blocks, kept)
    omitted_share, omitted_text = selector.describe_omitted()
    return Selection(is_identified=True, omitted_share=omitted_share, omitted_text=omitted_text)


def _remove_others(body: Any, blocks: Sequence[_Block], kept: set[Any]) -> None:
    """Remove the blocks that are not kept. Rules, empty lines and signs without words stay inside of kept blocks."""
    with_words = {element for block in blocks for element in (block.element, *block.element.iterancestors())}
    for element in list(body.iter()):
        if element.tag not in BLOCKS or element in kept or element.getparent() is None:
            continue
        if element not in with_words and next(element.iter(*_MEDIA), None) is None:
            is_in_structure = any(
                parent.tag in _STRUCTURES for parent in islice(element.iterancestors(), _MEDIA_LEVELS)
            )
            if element.getparent() in kept and (is_in_structure or not "".join(element.itertext()).strip()):
                continue
        if element.tag in ("td", "th") and element.getparent() in kept:  # the other cells stay in their columns
            element.text = None
            del element[:]
        elif element.tail and element.tail.strip():  # an empty paragraph separates the texts around it
            element.clear(keep_tail=True)
            element.tag = "p"
        else:
            element.getparent().remove(element)


@dataclass(eq=False)
class _Block:
    """A block element with its own text, without that of nested blocks.

    Attributes:
        links: Number of links.
        files: Number of links to slides, recordings and other files.
        linked: Length of the text of links to other pages.
        linked_here: Length of the text of links within the page.
    """

    index: int
    element: Any
    text: str
    links: int
    files: int
    linked: int
    linked_here: int
    is_extracted: bool = False
    is_kept: bool = False

    @cached_property
    def size(self) -> int:
        return len(self.text)

    @cached_property
    def words(self) -> list[str]:
        return _split_words(self.text)

    @property
    def is_heading(self) -> bool:
        return self.element.tag in HEADINGS

    @property
    def is_formula(self) -> bool:
        return any(part.get(formulas.ATTRIBUTE) == "block" for part in self.element.iter("span"))

    @property
    def is_prose(self) -> bool:
        return self.size >= _PROSE_CHARACTERS and self.linked < _PROSE_LINK_SHARE * self.size and not self.is_heading

    @property
    def is_menu(self) -> bool:
        """Whether the block is a row of links, or is or is in one long link (`Read also: …`), not to files."""
        if self.files:
            return False
        is_link = self.linked >= _LINK_SHARE * self.size or next(self.element.iterancestors("a"), None) is not None
        if is_link and self.element.tag not in _ITEMS and self.size >= _LINK_CHARACTERS:
            return True
        return self.links >= _MENU_LINKS and self.linked >= _MENU_LINK_SHARE * self.size


def _list_blocks(body: Any) -> list[_Block]:
    """Return the blocks that have text, in document order."""
    texts: dict[Any, list[str]] = {}
    links, files, linked, linked_here = Counter[Any](), Counter[Any](), Counter[Any](), Counter[Any]()
    block_of: dict[Any, Any] = {}
    for element in body.iter():
        parent = block_of.get(element.getparent(), body)
        block = element if element.tag in BLOCKS else parent
        block_of[element] = block
        texts.setdefault(block, []).append(element.text or "")
        if element.tag == "a":
            lengths = linked_here if (element.get("href") or "#").startswith("#") else linked
            lengths[block] += len(" ".join("".join(element.itertext()).split()))
            links[block] += 1
            files[block] += bool(_FILE.search(element.get("href") or ""))
        if element is not body:
            texts.setdefault(parent, []).append(f" {element.tail or ''}")
    joined = ((block, " ".join("".join(pieces).split())) for block, pieces in texts.items())
    with_text = [(block, text) for block, text in joined if re.search(r"\w", text)]
    return [
        _Block(index, block, text, links[block], files[block], linked[block], linked_here[block])
        for index, (block, text) in enumerate(with_text)
    ]


# Extracted blocks ---------------------------------------------------------------------------------------------------


def _mark_extracted(tree: Any, blocks: Sequence[_Block]) -> None:
    """Mark the blocks that trafilatura extracts. Its mode for recall is used if it finds more than twice the prose."""
    best_size = 0
    best: list[_Block] = []
    for favor_recall in (False, True):
        text = _ExtractedText(tree, favor_recall=favor_recall)
        found = text.find(blocks)
        size = sum(block.size - block.linked for block in found)
        if size > 2 * best_size:
            best_size, best = size, found
    for block in best:
        block.is_extracted = True
    _unmark_end(tree, best)


def _unmark_end(tree: Any, extracted: Sequence[_Block]) -> None:
    """Unmark what follows the last paragraph (`Read also`, `Follow us`) and is not found in the mode for precision."""
    last = max((block.index for block in extracted if block.is_prose), default=None)
    end = [block for block in extracted if last is not None and block.index > last]
    if end:
        text = _ExtractedText(tree, favor_precision=True)
        for block in end:
            block.is_extracted = text.contains(block)


class _ExtractedText:
    """The lines and word triples of the main text that trafilatura finds."""

    def __init__(self, tree: Any, *, favor_recall: bool = False, favor_precision: bool = False) -> None:
        text = _extract_text(tree, favor_recall=favor_recall, favor_precision=favor_precision)
        parts = (part for line in text.splitlines() for part in {line, *line.split("|")})
        self._lines = Counter(tuple(_split_words(part)) for part in parts)
        self._triples = set(_list_triples(_split_words(text)))

    def find(self, blocks: Sequence[_Block]) -> list[_Block]:
        """Return the blocks that the text contains.

        Several blocks may be the same one or two words, such as a cell and a label of a fact sheet. If the text has
        them fewer times, the blocks with the most other blocks of the text around them are returned.
        """
        found = [block for block in blocks if self.contains(block)]
        others = {block.index for block in found if len(block.words) > 2}
        same: dict[tuple[str, ...], list[_Block]] = {}
        for block in found:
            if block.index not in others:
                same.setdefault(tuple(block.words), []).append(block)
        chance: set[_Block] = set()
        for words, group in same.items():
            near = {block: len(others.intersection(range(block.index - 3, block.index + 4))) for block in group}
            chance.update(sorted(group, key=near.__getitem__, reverse=True)[self._lines[words] :])
        return [block for block in found if block not in chance]

    def contains(self, block: _Block) -> bool:
        triples = list(_list_triples(block.words))
        if not triples:  # one or two words may match by chance, so the whole line must match
            return tuple(block.words) in self._lines
        return sum(triple in self._triples for triple in triples) >= _MATCH_SHARE * len(triples)


def _extract_text(tree: Any, *, favor_recall: bool, favor_precision: bool) -> str:
    tree = deepcopy(tree)
    for cell in tree.iter("td", "th"):  # trafilatura would create that many cells without a limit
        cell.attrib.pop("colspan", None)
        cell.attrib.pop("rowspan", None)
    _separate_texts(tree)
    is_long = sum(1 for _ in tree.iter(*BLOCKS)) > _MAX_COMPARED_BLOCKS
    text = trafilatura.extract(
        tree,
        include_comments=False,
        favor_recall=favor_recall,
        favor_precision=favor_precision,
        fast=is_long,
        config=_SETTINGS,
    )
    return text or ""


def _separate_texts(tree: Any) -> None:
    """Move texts between very many elements to elements of their own.

    trafilatura joins the text behind each element that it removes to the text before it, which takes quadratic time.
    """
    for parent in list(tree.iter()):
        if len(parent) * sum(len(child.tail or "") for child in parent) > _MAX_JOINED_CHARACTERS:
            for child in list(parent):
                text = child.makeelement("span")
                text.text, child.tail = child.tail, None
                child.addnext(text)


def _list_triples(words: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    return zip(words, words[1:], words[2:], strict=False)


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+", _INVISIBLE.sub("", text).casefold())


# Blocks that belong to them -----------------------------------------------------------------------------------------


class _Selector:
    """Decides which blocks of a page are kept."""

    def __init__(self, body: Any, blocks: Sequence[_Block]) -> None:
        self._blocks = blocks
        self._total = sum(block.size for block in blocks if block.is_extracted)
        self._region = _find_region(body, blocks, self._total)
        self._inside = set(self._region.iter())
        self._named = _find_named_boilerplate(body, self._region)
        structures = _list_structures(body)
        self._structures = {block: structures.get(block.element, ()) for block in blocks}
        self._sums: dict[Any, Counter[str]] = {}
        for block in blocks:
            for structure in self._structures[block]:
                self._sums.setdefault(structure, Counter()).update(
                    size=block.size,
                    links=block.links,
                    files=block.files,
                    linked=block.linked,
                    linked_here=block.linked_here,
                    extracted=block.size * block.is_extracted,
                )

    def select(self, speakers: Sequence[str]) -> None:
        """Set `is_kept` of the blocks."""
        for block in self._blocks:
            block.is_kept = block.is_extracted and not self._is_boilerplate(block)
        if any(block.is_kept for block in self._blocks):
            for _ in range(2):  # code and lists may belong to prose that the first pass keeps
                self._keep_related()
            self._keep_between()
        _keep_speakers(self._blocks, speakers)
        _keep_footnotes(self._blocks)
        _keep_code_labels(self._blocks)
        self._keep_headings()
        self._drop_labels()
        _drop_empty_sections(self._blocks)
        if not any(block.is_kept for block in self._blocks):
            for block in self._blocks:
                block.is_kept = block.is_extracted

    def list_media(self) -> list[Any]:
        """Return the images and players between kept blocks or beside one of them, and the featured image."""
        kept = [block.element for block in self._blocks if block.is_kept]
        parents = {element.getparent() for element in kept}
        media = []
        waiting: list[Any] = []
        remaining = set(kept)
        for element in self._region.iter():
            if element in remaining:
                remaining.remove(element)
                media += waiting
                waiting = []
            elif element.get(FEATURED_ATTRIBUTE) is not None and element not in self._named:
                media.append(element)
            elif element.tag in _MEDIA and element not in self._named and len(remaining) < len(kept):
                around = (element, *element.iterancestors())[:_MEDIA_LEVELS]
                is_beside = any(ancestor.getparent() in parents for ancestor in around)
                (media if is_beside else waiting).append(element)
        return media

    def describe_omitted(self) -> tuple[float, str]:
        """Return the share of the prose that is not kept, and the beginning of its longest text. See `Selection`."""
        omitted = [
            block for block in self._blocks if block.is_prose and not block.is_kept and block.element not in self._named
        ]
        size = sum(block.size for block in omitted)
        share = size / (size + sum(block.size for block in self._blocks if block.is_kept))
        longest = max(omitted, key=lambda block: block.size, default=None)
        return share, textwrap.shorten(longest.text, _QUOTED_CHARACTERS, placeholder=" …") if longest else ""

    def _is_boilerplate(self, block: _Block) -> bool:
        """Return whether an extracted block is a menu, table of contents, or a short link with such a name."""
        if block.is_menu or any(self._is_table_of_contents(structure) for structure in self._structures[block]):
            return True
        is_short_link = block.size < _NAMED_CHARACTERS and block.linked > _NAMED_LINK_SHARE * block.size
        return is_short_link and self._is_named(block.element)

    def _is_table_of_contents(self, structure: Any) -> bool:
        counts = self._sums[structure]
        return counts["links"] >= _MENU_LINKS and counts["linked_here"] >= _MENU_LINK_SHARE * counts["size"]

    def _keep_related(self) -> None:
        """Keep parts of the structures of kept blocks, and prose nearby."""
        kept = [block for block in self._blocks if block.is_kept]
        indexes = [block.index for block in kept]
        first, last = indexes[0], indexes[-1]
        parents = {block.element.getparent() for block in kept}
        sections = parents | {parent.getparent() for parent in parents}
        for block in self._blocks:
            if not self._may_be_kept(block) or any(map(self._is_table_of_contents, self._structures[block])):
                continue
            is_code = block.element.tag == "pre"
            around = sections if is_code or first < block.index < last else set()
            block.is_kept = any(self._belongs(part, parents, around) for part in self._structures[block])
            if not block.is_kept and block.files:
                block.is_kept = block.element.getparent() in parents
            if not block.is_kept and block.is_prose:
                distance = _find_distance(indexes, block.index)
                share = _PROSE_SHARE if block.index < last else _PROSE_SHARE_AT_END
                block.is_kept = (
                    (distance <= _PROSE_DISTANCE and block.size >= share * self._total)
                    or (block.index < first and not block.linked)
                    or block.size > self._total / 2
                )

    def _belongs(self, structure: Any, parents: set[Any], around: set[Any]) -> bool:
        counts = self._sums[structure]
        if counts["linked"] >= _STRUCTURE_LINK_SHARE * counts["size"] and not counts["files"]:
            return False
        parent = structure.getparent()
        is_sibling = structure.tag == "table" or parent in parents or parent.getparent() in around
        return is_sibling or counts["extracted"] >= _STRUCTURE_SHARE * counts["size"]

    def _keep_between(self) -> None:
        """Keep what is between two kept blocks, beside one of them. Rows of links between them do not count."""
        texts = [block for block in self._blocks if block.linked < _STRUCTURE_LINK_SHARE * block.size]
        for before, block, after in zip(texts, texts[1:], texts[2:], strict=False):
            if (
                before.is_kept
                and after.is_kept
                and self._may_be_kept(block)
                and not block.is_heading
                and (block.size >= _SHORT_CHARACTERS or block.is_formula)
                and any(_are_beside(block, neighbour) for neighbour in (before, after))
            ):
                block.is_kept = True

    def _drop_labels(self) -> None:
        """Drop what announces a list that is not kept (`Contents`, `This speaker also appears in:`)."""
        for block, following in pairwise(self._blocks):
            is_list = bool(self._structures[following]) and following.links > 0 and not following.is_kept
            if block.is_kept and is_list and block.size <= _LABEL_CHARACTERS and not block.is_heading:
                is_contents = any(map(self._is_table_of_contents, self._structures[following]))
                is_sentence = _SENTENCE_END.search(block.text) is not None
                block.is_kept = not (block.text.endswith(":") or (is_contents and not is_sentence))

    def _keep_headings(self) -> None:
        for block, following in reversed(list(pairwise(self._blocks))):
            if (
                block.is_heading
                and following.is_kept
                and block.element in self._inside
                and block.linked < _MENU_LINK_SHARE * block.size
                and not self._is_named(block.element.getparent())
            ):
                block.is_kept = True

    def _may_be_kept(self, block: _Block) -> bool:
        return not (block.is_kept or block.is_menu or self._is_named(block.element) or _find_picture(block) is not None)

    def _is_named(self, element: Any) -> bool:
        """Return whether the element is in something that is named as boilerplate, or is not in the region."""
        return element in self._named or element not in self._inside


def _keep_footnotes(blocks: Sequence[_Block]) -> None:
    """Keep the footnotes that kept text refers to."""
    links = chain.from_iterable(block.element.iter("a") for block in blocks if block.is_kept)
    names = {(link.get("href") or "")[1:] for link in islice(filter(_is_footnote_link, links), _MAX_FOOTNOTES)}
    for block in blocks if names else ():
        around = (block.element, *block.element.iterancestors())
        if block.element.tag == "dd" and block.element.getprevious() is not None:  # docutils gives the term the ID
            around = (*around, block.element.getprevious())
        block.is_kept = block.is_kept or any(part.get("id") in names for part in around)


def _is_footnote_link(link: Any) -> bool:
    is_reference = link.get("role") == "doc-noteref" or FOOTNOTE.match(link.get("href") or "")
    return bool(is_reference) and (link.get("href") or "").startswith("#")


def _keep_code_labels(blocks: Sequence[_Block]) -> None:
    """Keep the short text above code, such as a file name, that shares a container only with this code."""
    for block, code in pairwise(blocks):
        if block.is_kept or not code.is_kept or code.element.tag != "pre" or block.size > _LABEL_CHARACTERS:
            continue
        around = {code.element, *code.element.iterancestors()}
        card = block.element if block.element in around else block.element.getparent()
        others = [blocks[index] for index in (block.index - 1, code.index + 1) if 0 <= index < len(blocks)]
        is_alone = not any(card in (other.element, *other.element.iterancestors()) for other in others)
        block.is_kept = card in around and is_alone and not block.links


def _find_picture(block: _Block) -> Any:
    """Return the image in the figure whose caption the block is, or None."""
    figure = next(block.element.iterancestors("figure"), None)
    return next(figure.iter("img"), None) if figure is not None else None


def _keep_captions_as_alternative_texts(blocks: Sequence[_Block]) -> None:
    """Give images the caption that is not kept if it contains their alternative text."""
    for block in blocks:
        image = None if block.is_kept else _find_picture(block)
        if image is not None and " ".join((image.get("alt") or "").split()).casefold() in block.text.casefold():
            image.set("alt", block.text)


def _are_beside(block: _Block, neighbour: _Block) -> bool:
    """Return whether a block is beside another one. The container of a sentence may be larger."""
    levels = _CONTAINER_LEVELS if _SENTENCE_END.search(block.text) else 1
    containers = [set(islice(part.element.iterancestors(), levels)) for part in (block, neighbour)]
    return not containers[0].isdisjoint(containers[1])


def _find_distance(indexes: Sequence[int], index: int) -> int:
    """Return the distance of `index` to the nearest of the sorted indexes."""
    position = bisect(indexes, index)
    return min(abs(nearest - index) for nearest in indexes[max(0, position - 1) : position + 1])


def _find_named_boilerplate(body: Any, region: Any) -> set[Any]:
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


def _list_structures(body: Any) -> dict[Any, tuple[Any, ...]]:
    """Return the lists, tables and figures around each element, but not those with large headings."""
    layout = {ancestor for part in body.iter("h1", "h2", "article") for ancestor in part.iterancestors()}
    structures: dict[Any, tuple[Any, ...]] = {body: ()}
    for element in body.iterdescendants():
        around = structures[element.getparent()]
        is_structure = element.tag in _STRUCTURES and element not in layout
        structures[element] = (*around, element)[-_MAX_STRUCTURES:] if is_structure else around
    return structures


def _find_region(body: Any, blocks: Sequence[_Block], total: int) -> Any:
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


def _drop_empty_sections(blocks: Sequence[_Block]) -> None:
    """Drop each short heading, except of level 1, with nothing that is kept before the next heading of its level."""
    sections: list[_Block] = []
    filled: set[_Block] = set()
    for block in blocks:
        if block.is_heading:
            while sections and sections[-1].element.tag >= block.element.tag:
                sections.pop()
            sections.append(block)
        elif block.is_kept:
            filled.update(sections)
    for block in blocks:
        if block.is_heading and block.element.tag != "h1" and block not in filled:
            block.is_kept = block.is_kept and block.size > _EMPTY_HEADING_CHARACTERS


# Speakers -----------------------------------------------------------------------------------------------------------


def _keep_speakers(blocks: Sequence[_Block], speakers: Sequence[str]) -> None:
    """Keep each speaker's biography with the name above it, or else the name that is nearest to the kept text."""
    indexes = [block.index for block in blocks if block.is_kept]
    names = list(dict.fromkeys(tuple(words) for words in map(_split_words, speakers) if words))
    with_word: dict[str, list[_Block]] = {name[0]: [] for name in names}
    for block in blocks:
        for word in with_word.keys() & set(block.words):
            with_word[word].append(block)
    for name in names:
        found = [block for block in with_word[name[0]] if _contains(block.words, name)]
        named = [block for block in found if _is_about(block.words, name)][:_MAX_NAMES]
        biographies = [(block, *biography) for block in named if (biography := _find_biography(blocks, block))]
        if not biographies and named and indexes and not any(block.is_kept for block in found):
            biographies = [(min(named, key=lambda block: _find_distance(indexes, block.index)),)]
        for block in chain.from_iterable(biographies):
            block.is_kept = True


def _is_about(words: Sequence[str], name: tuple[str, ...]) -> bool:
    """Return whether a block that contains the name begins with it or is short."""
    return tuple(words[: len(name)]) == name or len(words) <= len(name) + _NAME_WORDS


def _contains(words: Sequence[str], name: tuple[str, ...]) -> bool:
    return any(tuple(words[start : start + len(name)]) == name for start in range(len(words) - len(name) + 1))


def _find_biography(blocks: Sequence[_Block], name: _Block) -> list[_Block]:
    """Return the text that follows a speaker's name in the innermost element that has both."""
    following = blocks[name.index + 1 : name.index + 1 + _BIOGRAPHY_BLOCKS]
    around = {block: {block.element, *block.element.iterancestors()} for block in following}
    for card in (name.element, *name.element.iterancestors())[:_BIOGRAPHY_LEVELS]:
        found = [
            block for block in following if card in around[block] and block.linked < _PROSE_LINK_SHARE * block.size
        ]
        for end, block in enumerate(found, start=1):
            if _is_long_enough(block) and not block.is_heading:
                return [*found[:end], *takewhile(_is_long_enough, found[end:])]
    return []


def _is_long_enough(block: _Block) -> bool:
    return block.size >= _BIOGRAPHY_CHARACTERS
