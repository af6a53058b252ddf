"""Reduce a page to what a reader sees: remove scripts and hidden elements, show what scripts would show. Pure."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, Final

import lxml.etree  # type: ignore[import-untyped]  # it ships no types

from jobledger.workers.processors.session import embedded_media, formulas
from jobledger.workers.processors.session.page_blocks import HEADINGS
from jobledger.workers.processors.session.page_notes import restructure_notes

_NO_TEXT: Final = ("script", "style", "template", "canvas", "select", "textarea", "datalist")
_BUTTONS_WITH_TEXT: Final = HEADINGS | {"summary", "dt", "legend", "caption"}
_FOR_SCREEN_READERS: Final = frozenset(
    {
        "sr-only",
        "visually-hidden",
        "visuallyhidden",
        "screen-reader-text",
        "screen-reader",
        "skip-link",
        "skip-to-content",
        "skip-nav",
    }
)
_MAX_SCREEN_READER_CHARACTERS: Final = 80
_HEADING_ANCHOR: Final = re.compile(r"[\s¶#§∞🔗\ue000-\uf8ff]*")
_REMOVED_TAG: Final = "removed"
_MAX_TEXTS: Final = 200
_MIN_LABEL_WORDS: Final = 3
_MAX_TAB_LISTS: Final = 100
_MAIN_PARTS: Final = ("main", "article", "h1")


def remove_non_text_elements(tree: Any) -> None:
    """Remove scripts, form controls, hidden elements and anchor links of headings. Formulas become text.

    Images and players stay: `html_markdown` writes them. Panels of tabs are shown below each other.
    """
    _use_noscript_images(tree)
    formulas.replace_formulas(tree)
    _replace_custom_players(tree)
    _show_tabs(tree)
    links_with_text: dict[Any, bool] = {}
    for drawing in list(tree.iter("svg")):
        _replace_drawing(drawing, links_with_text)
    for control in list(tree.iter("button", "input")):
        _replace_control(control)
    lxml.etree.strip_elements(tree, *_NO_TEXT, with_tail=False)
    body = tree.find("body")
    length = len("".join(body.itertext())) if body is not None else 0
    for element in list(tree.iter()):
        if _is_hidden(element) and not _is_main_part(element, length):
            _remove(element)
    for link in list(tree.iter("a")):
        if (link.get("href") or "#").startswith("#") and not len(link) and _HEADING_ANCHOR.fullmatch(link.text or ""):
            _remove(link)
    lxml.etree.strip_tags(tree, _REMOVED_TAG)
    restructure_notes(tree)


def _use_noscript_images(tree: Any) -> None:
    """Give images that a script would load the source in their `noscript` element. Remove all `noscript` elements."""
    for element in list(tree.iter("noscript")):
        images = list(element.iter("img"))
        is_image = len(images) == 1 and not "".join(element.itertext()).strip()
        neighbours = [element.getprevious(), element.getnext()]
        placeholder = next((found for near in neighbours if near is not None for found in near.iter("img")), None)
        if is_image and placeholder is None and element.getparent() is not None:
            images[0].tail = ""
            element.addprevious(images[0])
        elif is_image and placeholder is not None and not embedded_media.find_image_source(placeholder):
            placeholder.set("src", images[0].get("src") or "")
        _remove(element)


def _replace_custom_players(tree: Any) -> None:
    for element in list(tree.iter()):
        if not isinstance(element.tag, str) or element.tag in ("a", "img", "iframe", "video", "audio"):
            continue
        if player := embedded_media.find_custom_player(element):
            frame = element.makeelement("iframe", {"src": player.url, "title": player.title})
            frame.tail = element.tail
            if element.getparent() is not None:
                element.getparent().replace(element, frame)


def _show_tabs(tree: Any) -> None:
    """Give every panel of tabs the label of its tab, and remove the row of tabs."""
    by_id = {element.get("id"): element for element in tree.iter() if element.get("id")}
    for tabs in tree.xpath("//*[@role='tablist']")[:_MAX_TAB_LISTS]:
        labels = [tab for tab in tabs.iter() if tab.get("role") == "tab"]
        parent = tabs.getparent()
        following = [panel for panel in parent.iter() if panel.get("role") == "tabpanel"] if parent is not None else []
        panels = [by_id.get((tab.get("aria-controls") or "").strip()) for tab in labels]
        if None in panels:
            panels = following if len(following) == len(labels) else []
        if not panels:
            continue
        for tab, panel in zip(labels, panels, strict=True):
            label = panel.makeelement("p")
            strong = label.makeelement("strong")
            strong.text = " ".join("".join(tab.itertext()).split())
            label.append(strong)
            label.tail, panel.text = panel.text, None
            panel.insert(0, label)
            panel.attrib.pop("hidden", None)
            panel.attrib.pop("aria-hidden", None)
        _remove(tabs)


def _replace_drawing(drawing: Any, links_with_text: dict[Any, bool]) -> None:
    """Replace an SVG drawing by its description, if it has one and is not an icon.

    `links_with_text` says of links and buttons whether they have other text. It is filled here.
    """
    title = next((child.text for child in drawing if isinstance(child.tag, str) and child.tag.endswith("title")), None)
    label = " ".join((drawing.get("aria-label") or title or "").split())
    link = next(drawing.iterancestors("a", "button"), None)
    if link is not None and link not in links_with_text:
        links_with_text[link] = bool("".join(link.xpath(".//text()[not(ancestor::svg)]")).strip())
    is_only_content = link is not None and not links_with_text[link]
    if label and (is_only_content or (drawing.get("role") == "img" and len(label.split()) >= _MIN_LABEL_WORDS)):
        text = drawing.makeelement("span")
        text.text, text.tail = label, drawing.tail
        drawing.getparent().replace(drawing, text)
        links_with_text[link] = True
    else:
        _remove(drawing)


def _replace_control(control: Any) -> None:
    """Replace check boxes of lists by signs. Keep only buttons that are the whole text of a heading."""
    if (
        control.tag == "input"
        and control.get("type") == "checkbox"
        and next(control.iterancestors("li"), None) is not None
    ):
        box = control.makeelement("span")
        box.text = "☑ " if control.get("checked") is not None else "☐ "
        box.tail = (control.tail or "").lstrip()
        control.getparent().replace(control, box)
    elif control.tag == "button" and _is_only_content(control, next(control.iterancestors(*_BUTTONS_WITH_TEXT), None)):
        control.tag = _REMOVED_TAG
    else:
        _remove(control)


def _is_only_content(control: Any, container: Any) -> bool:
    return container is not None and _get_first_words(control) == _get_first_words(container)


def _get_first_words(element: Any) -> list[str]:
    """Return the words of an element. Of a long one, only the first, so that the time per element is constant."""
    return "".join(islice(element.itertext(), _MAX_TEXTS)).split()


def _is_hidden(element: Any) -> bool:
    if not isinstance(element.tag, str) or element.get(formulas.ATTRIBUTE):
        return False
    if element.get("hidden") not in (None, "until-found") or element.get("aria-hidden") == "true":
        return True
    if re.search(r"(^|;)\s*(display\s*:\s*none|visibility\s*:\s*hidden)", element.get("style") or "", re.IGNORECASE):
        return element.tag != "iframe" and element.get("role") != "tabpanel"
    if not _FOR_SCREEN_READERS & set((element.get("class") or "").lower().split()):
        return False
    is_short = len("".join(element.itertext()).strip()) <= _MAX_SCREEN_READER_CHARACTERS
    return is_short and element.tag not in HEADINGS


def _is_main_part(element: Any, length: int) -> bool:
    """Return whether the element contains most of the page, which an open dialog or a script may hide."""
    if element.tag not in ("div", "main", "article", "section", "body", "html"):
        return False
    return any(True for _ in element.iter(*_MAIN_PARTS)) and len("".join(element.itertext())) > length / 2


def _remove(element: Any) -> None:
    """Remove an element, but not the text behind it. An empty element keeps it until all are removed at once.

    Joining the texts of each takes quadratic time.
    """
    if element.getparent() is None:
        return
    if element.tail:
        element.clear(keep_tail=True)
        element.tag = _REMOVED_TAG
    else:
        element.getparent().remove(element)
