"""Give the notes of a page the structure that Markdown can show: admonitions, footnotes, numbers of formulas. Pure."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, Final

from jobledger.workers.processors.session import formulas

_ADMONITION: Final = re.compile(r"(?<![a-z])(admonition|callout|markdown-alert)(?![a-z])", re.IGNORECASE)
_ADMONITION_LABEL: Final = re.compile(r"(admonition|callout|alert)[-_]*(title|heading|label)", re.IGNORECASE)
_ANCHOR_SIGNS: Final = "¶#"
_NUMBER: Final = re.compile(r"\(([A-Z]?\.?\d{1,3}(?:[.\-]\d{1,3}){0,2}[a-z]?)\)")
_NUMBERED_BY_TEX: Final = re.compile(r"\\tag\b|\\begin\{(?:equation|align|gather|multline|eqnarray)\*?\}")
_MAX_LABEL: Final = 100
_MAX_PARTS: Final = 20


def restructure_notes(tree: Any) -> None:
    """Make admonitions quotations with a bold label. Put numbers into their footnotes and formulas."""
    for element in list(tree.iter("div", "aside", "section", "blockquote")):
        if _ADMONITION.search(element.get("class") or ""):
            _make_quotation(element)
        elif element.get("role") == "doc-footnote":
            _move_number(element)
    for formula in list(tree.iter("span")):
        if formula.get(formulas.ATTRIBUTE) == "block":
            _tag_formula(formula)


def _make_quotation(element: Any) -> None:
    label = next(iter(element), None)
    if label is None or len(element) < 2 or not _ADMONITION_LABEL.search(label.get("class") or ""):
        return
    text = _get_text(label)
    if not text or len(text) > _MAX_LABEL:
        return
    tail = label.tail
    label.clear()
    label.tag, label.tail = "p", tail
    strong = label.makeelement("strong")
    strong.text = text[0].upper() + text[1:]
    label.append(strong)
    element.tag = "blockquote"


def _move_number(footnote: Any) -> None:
    """Move the number of a footnote, which is a block beside the text, to the beginning of the text."""
    label, text = next(iter(footnote), None), next(footnote.iter("p"), None)
    number = _get_text(label).strip("[]. ") if label is not None else ""
    if text is None or text is label or not re.fullmatch(r"\w{1,8}|\*", number):
        return
    raised = text.makeelement("sup")
    raised.text, raised.tail = number, f" {text.text or ''}"
    text.text = None
    text.insert(0, raised)
    footnote.remove(label)


def _tag_formula(formula: Any) -> None:
    """Add the number that is beside a displayed formula to its TeX."""
    tex = formula.text or ""
    before, after = formula.getprevious(), formula.getnext()
    is_apart = bool((formula.tail or "").strip())
    for number in (before, None if is_apart else after):
        if number is None or number.tag not in ("span", "div") or (number is before and (number.tail or "").strip()):
            continue
        match = _NUMBER.fullmatch(_get_text(number))
        if match and not _NUMBERED_BY_TEX.search(tex):
            formula.text = f"{tex} \\tag{{{match[1]}}}"
            number.drop_tree()
            return


def _get_text(element: Any) -> str:
    text = "".join(islice(element.itertext(), _MAX_PARTS))
    return " ".join(text.rstrip(_ANCHOR_SIGNS).split())
