"""Select the main text of a page, and remove the rest, such as menus, footers and lists of other talks. Pure.

trafilatura reliably finds the words of the main text, but its output loses table cells, blank lines in code and whole
paragraphs. This module uses only its words. A block of the page whose words trafilatura returns is *extracted*, and is
kept unless it is only links or a table of contents. Other blocks are kept if they belong to extracted ones: parts of
the same table, list or figure, headings above them, prose nearby, and the speakers' names with their biographies. The
names of classes and IDs never remove an extracted block without links. They only prevent that other blocks are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from jobledger.workers.processors.session.block_selection import MEDIA, MEDIA_LEVELS, BlockSelector, find_picture
from jobledger.workers.processors.session.extracted_text import mark_extracted
from jobledger.workers.processors.session.page_blocks import BLOCKS, Block, list_blocks
from jobledger.workers.processors.session.page_regions import STRUCTURES


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
    blocks = list_blocks(body)
    mark_extracted(tree, blocks)
    if not any(block.is_extracted for block in blocks):
        return Selection(is_identified=False)
    selector = BlockSelector(body, blocks)
    selector.select(speakers)
    _keep_captions_as_alternative_texts(blocks)
    selected = [*(block.element for block in blocks if block.is_kept), *selector.list_media()]
    kept = {element for part in selected for element in (part, *part.iterancestors())}
    _remove_others(body, blocks, kept)
    omitted_share, omitted_text = selector.describe_omitted()
    return Selection(is_identified=True, omitted_share=omitted_share, omitted_text=omitted_text)


def _remove_others(body: Any, blocks: Sequence[Block], kept: set[Any]) -> None:
    """Remove the blocks that are not kept. Rules, empty lines and signs without words stay inside of kept blocks."""
    with_words = {element for block in blocks for element in (block.element, *block.element.iterancestors())}
    for element in list(body.iter()):
        if element.tag not in BLOCKS or element in kept or element.getparent() is None:
            continue
        if element not in with_words and next(element.iter(*MEDIA), None) is None:
            is_in_structure = any(parent.tag in STRUCTURES for parent in islice(element.iterancestors(), MEDIA_LEVELS))
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


def _keep_captions_as_alternative_texts(blocks: Sequence[Block]) -> None:
    """Give images the caption that is not kept if it contains their alternative text."""
    for block in blocks:
        image = None if block.is_kept else find_picture(block)
        if image is not None and " ".join((image.get("alt") or "").split()).casefold() in block.text.casefold():
            image.set("alt", block.text)
