"""Keep the speakers of a talk with their biographies. Pure."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import chain, takewhile
from typing import Final

from jobledger.workers.processors.session.page_blocks import PROSE_LINK_SHARE, Block, split_words

_BIOGRAPHY_BLOCKS: Final = 6
_BIOGRAPHY_LEVELS: Final = 5
_BIOGRAPHY_CHARACTERS: Final = 60
_NAME_WORDS: Final = 8
_MAX_NAMES: Final = 20


def find_distance(indexes: Sequence[int], index: int) -> int:
    """Return the distance of `index` to the nearest of the sorted indexes."""
    position = bisect(indexes, index)
    return min(abs(nearest - index) for nearest in indexes[max(0, position - 1) : position + 1])


def keep_speakers(blocks: Sequence[Block], speakers: Sequence[str]) -> None:
    """Keep each speaker's biography with the name above it, or else the name that is nearest to the kept text."""
    indexes = [block.index for block in blocks if block.is_kept]
    names = list(dict.fromkeys(tuple(words) for words in map(split_words, speakers) if words))
    with_word: dict[str, list[Block]] = {name[0]: [] for name in names}
    for block in blocks:
        for word in with_word.keys() & set(block.words):
            with_word[word].append(block)
    for name in names:
        found = [block for block in with_word[name[0]] if _contains(block.words, name)]
        named = [block for block in found if _is_about(block.words, name)][:_MAX_NAMES]
        biographies = [(block, *biography) for block in named if (biography := _find_biography(blocks, block))]
        if not biographies and named and indexes and not any(block.is_kept for block in found):
            biographies = [(min(named, key=lambda block: find_distance(indexes, block.index)),)]
        for block in chain.from_iterable(biographies):
            block.is_kept = True


def _is_about(words: Sequence[str], name: tuple[str, ...]) -> bool:
    """Return whether a block that contains the name begins with it or is short."""
    return tuple(words[: len(name)]) == name or len(words) <= len(name) + _NAME_WORDS


def _contains(words: Sequence[str], name: tuple[str, ...]) -> bool:
    return any(tuple(words[start : start + len(name)]) == name for start in range(len(words) - len(name) + 1))


def _find_biography(blocks: Sequence[Block], name: Block) -> list[Block]:
    """Return the text that follows a speaker's name in the innermost element that has both."""
    following = blocks[name.index + 1 : name.index + 1 + _BIOGRAPHY_BLOCKS]
    around = {block: {block.element, *block.element.iterancestors()} for block in following}
    for card in (name.element, *name.element.iterancestors())[:_BIOGRAPHY_LEVELS]:
        found = [block for block in following if card in around[block] and block.linked < PROSE_LINK_SHARE * block.size]
        for end, block in enumerate(found, start=1):
            if _is_long_enough(block) and not block.is_heading:
                return [*found[:end], *takewhile(_is_long_enough, found[end:])]
    return []


def _is_long_enough(block: Block) -> bool:
    return block.size >= _BIOGRAPHY_CHARACTERS
