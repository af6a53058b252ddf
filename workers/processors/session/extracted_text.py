"""Find the blocks of a page that trafilatura extracts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Final

import trafilatura
from trafilatura.settings import DEFAULT_CONFIG

from jobledger.workers.processors.session.page_blocks import BLOCKS, Block, split_words

_MATCH_SHARE: Final = 0.8
"""A block is extracted if trafilatura returns so many of its word triples."""
_MAX_COMPARED_BLOCKS: Final = 3_000
"""For a page with more, trafilatura does not compare its result with that of jusText, which takes quadratic time."""
_MAX_JOINED_CHARACTERS: Final = 300_000_000
_SETTINGS: Final = deepcopy(DEFAULT_CONFIG)
_SETTINGS.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")  # by default, texts below 250 characters lose their structure


def mark_extracted(tree: Any, blocks: Sequence[Block]) -> None:
    """Mark the blocks that trafilatura extracts. Its mode for recall is used if it finds more than twice the prose."""
    best_size = 0
    best: list[Block] = []
    for favor_recall in (False, True):
        text = _ExtractedText(tree, favor_recall=favor_recall)
        found = text.find(blocks)
        size = sum(block.size - block.linked for block in found)
        if size > 2 * best_size:
            best_size, best = size, found
    for block in best:
        block.is_extracted = True
    _unmark_end(tree, best)


def _unmark_end(tree: Any, extracted: Sequence[Block]) -> None:
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
        self._lines = Counter(tuple(split_words(part)) for part in parts)
        self._triples = set(_list_triples(split_words(text)))

    def find(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the blocks that the text contains.

        Several blocks may be the same one or two words, such as a cell and a label of a fact sheet. If the text has
        them fewer times, the blocks with the most other blocks of the text around them are returned.
        """
        found = [block for block in blocks if self.contains(block)]
        others = {block.index for block in found if len(block.words) > 2}
        same: dict[tuple[str, ...], list[Block]] = {}
        for block in found:
            if block.index not in others:
                same.setdefault(tuple(block.words), []).append(block)
        chance: set[Block] = set()
        for words, group in same.items():
            near = {block: len(others.intersection(range(block.index - 3, block.index + 4))) for block in group}
            chance.update(sorted(group, key=near.__getitem__, reverse=True)[self._lines[words] :])
        return [block for block in found if block not in chance]

    def contains(self, block: Block) -> bool:
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
