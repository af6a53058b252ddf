"""Read the code of a page: its lines without line numbers and buttons, and its language. Pure."""

from __future__ import annotations

import re
import textwrap
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any, Final

import yaml

_LINE_ELEMENTS: Final = frozenset({"div", "p", "li", "tr", "dt", "dd", "ol", "ul", "table", "section"})
_LINE_CLASSES: Final = frozenset({"line", "token-line", "code-line", "view-line", "hljs-ln-line", "ec-line"})
_LINE_NUMBER_CLASS: Final = re.compile(
    r"line-?(no|num|number)s?|linenos?|gutter|blob-num|hljs-ln|(^|\s)(ln|lnt|lnlinks|gl)(\s|$)", re.I
)
_NOT_CODE: Final = frozenset({"button", "script", "style", "svg", "template", "clipboard-copy"})
_INVISIBLE: Final = re.compile("[\u200b\ufeff\u2060]")
_MAX_FIELD_CHARACTERS: Final = 300

_DECLARED: Final = re.compile(
    r"(?:^|\s)(?:language|lang|highlight(?:-source|-text)?|code|src|brush|syntax|type)[-:]\s*"
    r"([a-z][\w+#.-]{0,19})(?=[\s;:,{]|$)"
)
_NATURAL_LANGUAGE: Final = re.compile(r"[a-z]{2,3}([-_][a-z]{2,4})?", re.I)
_LANGUAGE_ATTRIBUTES: Final = (
    "data-lang",
    "data-language",
    "data-code-language",
    "data-syntax",
    "data-enlighter-language",
)


def is_prose(pre: Any) -> bool:
    """Return whether the element `pre` contains paragraphs of text, and not code."""
    if find_code_language(pre) or any(True for _ in pre.iter("code", "samp", "kbd", "span")):
        return False
    lines = [line for line in "".join(pre.itertext()).splitlines() if line.strip()]
    return bool(lines) and max(map(len, lines)) > 120 and not re.search(r"[;{}]\s*$|^\s+\S", "\n".join(lines), re.M)


def extract_code(element: Any) -> str:
    """Return the lines of an lxml element `pre` or `code`, without common indentation."""
    lines = _Lines()
    lines.add(element)
    text = _INVISIBLE.sub("", "".join(lines.parts)).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    return textwrap.dedent(re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip())


class _Lines:
    """The text of code. An element that is displayed as a line ends with exactly one line break."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._missing_breaks = 0

    def add(self, element: Any) -> None:
        """Add the text of an element, in a loop because highlighted code may be deeply nested."""
        pending: list[tuple[Any, int | None]] = [(element, None)]
        while pending:
            current, start = pending.pop()
            if start is not None:
                if current is not element:
                    has_break = len(self.parts) > start and self.parts[-1].endswith("\n")
                    if _is_line(current) and not has_break:
                        self._missing_breaks += 1
                    self._add_text(current.tail)
                continue
            pending.append((current, len(self.parts)))
            if not isinstance(current.tag, str) or current.tag in _NOT_CODE or _is_line_number(current):
                continue
            if current.tag == "br":
                if not _ends_line(current):
                    self._add_text("\n")
                    current.tail = re.sub(r"\A[ \t]*\r?\n", "", current.tail or "")  # the source has one as well
                continue
            if _is_line(current) and current is not element and self._is_within_line():
                self._missing_breaks += 1
            self._add_text(current.text)
            pending.extend((child, None) for child in reversed(current))

    def _is_within_line(self) -> bool:
        return not self._missing_breaks and bool(self.parts) and not self.parts[-1].endswith("\n")

    def _add_text(self, text: str | None) -> None:
        if not text:
            return
        if self._missing_breaks and text.startswith(("\n", "\r\n")):
            text = text.lstrip("\r")[1:]
            self.parts.append("\n")
            self._missing_breaks -= 1
        if text:
            self.parts.append("\n" * self._missing_breaks + text)
            self._missing_breaks = 0


def _is_line(element: Any) -> bool:
    if element.tag in _LINE_ELEMENTS:
        return True
    is_block = re.search(r"display:\s*(block|grid|flex)", element.get("style") or "")
    return element.tag in ("span", "code") and bool(
        is_block or _LINE_CLASSES & set((element.get("class") or "").split())
    )


def _ends_line(line_break: Any) -> bool:
    """Return whether the line break is the last content of an element that is displayed as a line."""
    element = line_break
    while not (element.tail or "").strip("\r\n") and element.getnext() is None:
        element = element.getparent()
        if element is None or element.tag == "pre":
            return False
        if _is_line(element):
            return True
    return False


def _is_line_number(element: Any) -> bool:
    names = f"{element.get('class') or ''} {element.get('id') or ''}"
    is_marked = _LINE_NUMBER_CLASS.search(names) or "user-select:none" in (element.get("style") or "").replace(" ", "")
    return bool(is_marked) and bool(re.fullmatch(r"[\s\d$>#]*", "".join(element.itertext())))


def has_line_numbers(cell: Any) -> bool:
    """Return whether a table cell contains only the line numbers of a listing."""
    text = "".join(cell.itertext())
    is_listing = any(True for _ in cell.iter("pre")) or bool(_LINE_NUMBER_CLASS.search(cell.get("class") or ""))
    return is_listing and bool(re.fullmatch(r"[\s\d]*", text))


@cache
def _load_languages() -> dict[str, Any]:
    text = files(__package__).joinpath("code_languages.yaml").read_text(encoding="utf-8")
    return {
        name: set(value.split()) if isinstance(value, str) else value for name, value in yaml.safe_load(text).items()
    }


def find_code_language(element: Any) -> str:
    """Return the language declared by a code block, or by the elements directly around or inside it."""
    code = element if element.tag == "code" else next(element.iter("code"), None)
    parents = [above for above in element.iterancestors() if above.tag in ("div", "figure", "td", "pre")][:3]
    parents += _find_parents_of_listing(element)
    own = [element] if code is None or code is element else [element, code]
    found = (_find_declared_language(candidate, is_code=candidate in own) for candidate in [*own, *parents])
    return next(filter(None, found), "")


def _find_parents_of_listing(element: Any) -> list[Any]:
    """Return the elements around the table of a listing with line numbers, which was perhaps made a `div`."""
    names = {"highlighttable", "lntable", "rouge-table", "codehilitetable", "code-table"}
    tables = (above for above in element.iterancestors() if names & set((above.get("class") or "").split()))
    table = next(tables, None)
    return [] if table is None else list(islice(table.iterancestors("div", "figure"), 2))


def _find_declared_language(element: Any, *, is_code: bool) -> str:
    names = [element.get(attribute) or "" for attribute in _LANGUAGE_ATTRIBUTES]
    classes = (element.get("class") or "").lower()[:_MAX_FIELD_CHARACTERS]
    names += [match.group(1) for match in _DECLARED.finditer(classes)]
    known = _load_languages()["languages"]
    if is_code or _load_languages()["highlighters"] & set(classes.split()):
        names += [name for name in classes.split() if name in known]
    declared = (element.get("lang") or "").strip().lower()
    if is_code and (declared in known or not _NATURAL_LANGUAGE.fullmatch(declared)):
        names.append(declared)
    return next(filter(None, map(_normalize_language, names)), "")


def _normalize_language(name: str) -> str:
    name = name.strip().lower().rstrip(".")
    languages = _load_languages()
    is_usable = re.fullmatch(r"[a-z][\w+#.-]{0,19}", name) and name not in languages["no_language"]
    return languages["same_language"].get(name, name) if is_usable else ""
