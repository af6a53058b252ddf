"""Decide which blocks of a page are kept, beside those that are extracted. Pure."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice, pairwise
from typing import Any, Final

from jobledger.workers.processors.session.embedded_media import FEATURED_ATTRIBUTE
from jobledger.workers.processors.session.page_blocks import FOOTNOTE, MENU_LINK_SHARE, MENU_LINKS, Block
from jobledger.workers.processors.session.page_regions import find_named_boilerplate, find_region, list_structures
from jobledger.workers.processors.session.speaker_blocks import find_distance, keep_speakers

# The limits here and in the modules beside it are chosen by `make evaluate`, on conference pages and on the set of
# trafilatura.
MEDIA: Final = frozenset({"img", "iframe", "video", "audio", "object", "embed"})
MEDIA_LEVELS: Final = 4
_SENTENCE_END: Final = re.compile(r"[.!?:…。！？：][\"'”’»)]*$")
_PROSE_DISTANCE: Final = 7
_PROSE_SHARE: Final = 0.06
_PROSE_SHARE_AT_END: Final = 0.2
_CONTAINER_LEVELS: Final = 3
_SHORT_CHARACTERS: Final = 25
_STRUCTURE_LINK_SHARE: Final = 0.5
_STRUCTURE_SHARE: Final = 0.3
_NAMED_CHARACTERS: Final = 80
_NAMED_LINK_SHARE: Final = 0.2
_EMPTY_HEADING_CHARACTERS: Final = 40
_LABEL_CHARACTERS: Final = 60
_QUOTED_CHARACTERS: Final = 80
_MAX_FOOTNOTES: Final = 200


class BlockSelector:
    """Decides which blocks of a page are kept."""

    def __init__(self, body: Any, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._total = sum(block.size for block in blocks if block.is_extracted)
        self._region = find_region(body, blocks, self._total)
        self._inside = set(self._region.iter())
        self._named = find_named_boilerplate(body, self._region)
        structures = list_structures(body)
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
        keep_speakers(self._blocks, speakers)
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
            elif element.tag in MEDIA and element not in self._named and len(remaining) < len(kept):
                around = (element, *element.iterancestors())[:MEDIA_LEVELS]
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

    def _is_boilerplate(self, block: Block) -> bool:
        """Return whether an extracted block is a menu, table of contents, or a short link with such a name."""
        if block.is_menu or any(self._is_table_of_contents(structure) for structure in self._structures[block]):
            return True
        is_short_link = block.size < _NAMED_CHARACTERS and block.linked > _NAMED_LINK_SHARE * block.size
        return is_short_link and self._is_named(block.element)

    def _is_table_of_contents(self, structure: Any) -> bool:
        counts = self._sums[structure]
        return counts["links"] >= MENU_LINKS and counts["linked_here"] >= MENU_LINK_SHARE * counts["size"]

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
                distance = find_distance(indexes, block.index)
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
                and block.linked < MENU_LINK_SHARE * block.size
                and not self._is_named(block.element.getparent())
            ):
                block.is_kept = True

    def _may_be_kept(self, block: Block) -> bool:
        return not (block.is_kept or block.is_menu or self._is_named(block.element) or find_picture(block) is not None)

    def _is_named(self, element: Any) -> bool:
        """Return whether the element is in something that is named as boilerplate, or is not in the region."""
        return element in self._named or element not in self._inside


def _keep_footnotes(blocks: Sequence[Block]) -> None:
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


def _keep_code_labels(blocks: Sequence[Block]) -> None:
    """Keep the short text above code, such as a file name, that shares a container only with this code."""
    for block, code in pairwise(blocks):
        if block.is_kept or not code.is_kept or code.element.tag != "pre" or block.size > _LABEL_CHARACTERS:
            continue
        around = {code.element, *code.element.iterancestors()}
        card = block.element if block.element in around else block.element.getparent()
        others = [blocks[index] for index in (block.index - 1, code.index + 1) if 0 <= index < len(blocks)]
        is_alone = not any(card in (other.element, *other.element.iterancestors()) for other in others)
        block.is_kept = card in around and is_alone and not block.links


def find_picture(block: Block) -> Any:
    """Return the image in the figure whose caption the block is, or None."""
    figure = next(block.element.iterancestors("figure"), None)
    return next(figure.iter("img"), None) if figure is not None else None


def _are_beside(block: Block, neighbour: Block) -> bool:
    """Return whether a block is beside another one. The container of a sentence may be larger."""
    levels = _CONTAINER_LEVELS if _SENTENCE_END.search(block.text) else 1
    containers = [set(islice(part.element.iterancestors(), levels)) for part in (block, neighbour)]
    return not containers[0].isdisjoint(containers[1])


def _drop_empty_sections(blocks: Sequence[Block]) -> None:
    """Drop each short heading, except of level 1, with nothing that is kept before the next heading of its level."""
    sections: list[Block] = []
    filled: set[Block] = set()
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
