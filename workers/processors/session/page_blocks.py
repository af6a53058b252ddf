"""The blocks of a page: elements with their own text, without that of nested blocks. Pure."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from jobledger.workers.processors.session import formulas
from jobledger.workers.processors.session.embedded_media import is_item_page

HEADINGS: Final = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
BLOCKS: Final = HEADINGS | frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol", "p", "pre"),
        *("section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul"),
    )
)
_ITEMS: Final = frozenset({"li", "td", "th", "dd", "dt"})
_FILE: Final = re.compile(
    r"\.(pdf|pptx?|od[pt]|key|zip|mp4|webm|mkv|mp3|ogg|og[av]|m4[av]|srt|vtt)([?#]|$)", re.IGNORECASE
)
FOOTNOTE: Final = re.compile(r"#_?(user-content-)?(fn|ftn|foot|note|cite|sdfootnote|endnote)", re.IGNORECASE)
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_PROSE_CHARACTERS: Final = 110
PROSE_LINK_SHARE: Final = 0.3
MENU_LINKS: Final = 3
MENU_LINK_SHARE: Final = 0.8
_LINK_CHARACTERS: Final = 40
_LINK_SHARE: Final = 0.7


@dataclass(eq=False)
class Block:
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
        return split_words(self.text)

    @property
    def is_heading(self) -> bool:
        return self.element.tag in HEADINGS

    @property
    def is_formula(self) -> bool:
        return any(part.get(formulas.ATTRIBUTE) == "block" for part in self.element.iter("span"))

    @property
    def is_prose(self) -> bool:
        return self.size >= _PROSE_CHARACTERS and self.linked < PROSE_LINK_SHARE * self.size and not self.is_heading

    @property
    def is_menu(self) -> bool:
        """Whether the block is a row of links, or is or is in one long link (`Read also: …`), not to files."""
        if self.files:
            return False
        is_link = self.linked >= _LINK_SHARE * self.size or next(self.element.iterancestors("a"), None) is not None
        if is_link and self.element.tag not in _ITEMS and self.size >= _LINK_CHARACTERS:
            return True
        return self.links >= MENU_LINKS and self.linked >= MENU_LINK_SHARE * self.size


def list_blocks(body: Any) -> list[Block]:
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
            files[block] += _is_material(element.get("href") or "")
        if element is not body:
            texts.setdefault(parent, []).append(f" {element.tail or ''}")
    joined = ((block, " ".join("".join(pieces).split())) for block, pieces in texts.items())
    with_text = [(block, text) for block, text in joined if re.search(r"\w", text)]
    return [
        Block(index, block, text, links[block], files[block], linked[block], linked_here[block])
        for index, (block, text) in enumerate(with_text)
    ]


def _is_material(url: str) -> bool:
    return _FILE.search(url) is not None or is_item_page(url)


def split_words(text: str) -> list[str]:
    """Return the words of a text in a form to compare. Invisible characters do not divide words."""
    return re.findall(r"\w+", _INVISIBLE.sub("", text).casefold())
