"""Write a paragraph of styled text as Markdown. Pure.

The text is a list of runs, each with one style. Markdown cannot express every style at every place: `**` must touch the
text, and needs white space or punctuation around it if the text begins or ends with punctuation (CommonMark 0.31, 6.2).
Spaces and punctuation are therefore moved out of the emphasis, or it is omitted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from markdown_it import MarkdownIt

from jobledger.workers.processors.session.safe_markdown import escape_inline_text

_RENDERER: Final = MarkdownIt("commonmark").enable("strikethrough")
_CJK: Final = r"\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uff64"
_LINE_END_IN_CJK: Final = re.compile(f"(?<=[{_CJK}])[ \t]*[\r\n]\\s*(?=[{_CJK}])")
_SPACES: Final = re.compile(r"[ \t\r\n\f\u00a0]*[ \t\r\n\f][ \t\r\n\f\u00a0]*|\u00a0{2,}")
_BLOCK_START: Final = re.compile(r"(\d{1,9}(?=[.)](?:\s|$))|(?=(?:#{1,6}|[+-])(?:\s|$)|[-=]{2,}|:?-+:?\s*\|))")
LINK: Final = "link"
EMPHASIS: Final = {"bold": "**", "italic": "*", "deleted": "~~"}
"""Markers by the field of `Style`."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a run of text is displayed."""

    link: str | None = None
    bold: bool = False
    italic: bool = False
    deleted: bool = False
    code: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """A piece of a paragraph. `markup` is written unchanged and has priority over `text`. A line break has neither."""

    text: str = ""
    style: Style = Style()
    markup: str = ""

    @property
    def is_break(self) -> bool:
        return not self.text and not self.markup


def write_paragraphs(runs: Sequence[Run]) -> list[str]:
    """Return the paragraphs of the runs. Two line breaks in a row separate paragraphs; one is written as backslash."""
    paragraphs: list[list[str]] = [[]]
    breaks = 0
    for is_break, group in groupby(runs, key=lambda run: run.is_break):
        part = list(group)
        if is_break:
            breaks += len(part)
        elif line := write_line(part):
            if breaks > 1 and paragraphs[-1]:
                paragraphs.append([])
            paragraphs[-1].append(escape_line_start(line))
            breaks = 0
    return ["\\\n".join(lines) for lines in paragraphs if lines]


def write_line(runs: Sequence[Run]) -> str:
    """Return the runs as one line of Markdown, whose start is not escaped."""
    cleaned = _collapse_spaces([run if not run.is_break else Run(" ") for run in runs])
    line = _write(cleaned, [LINK, *EMPHASIS]).strip()
    for kinds in (["bold", "deleted"], ["italic"], []):
        if not _is_ambiguous(line) or _count_visible_markers(line) == _count_markers(cleaned):
            break
        line = _write(cleaned, [LINK, *kinds]).strip()
    return line


def _is_ambiguous(line: str) -> bool:
    """Return whether markers of nested or adjacent emphasis touch, so that parsers may pair them differently."""
    return "***" in line or "~~*" in line or "*~~" in line


def _count_visible_markers(line: str) -> int:
    """Return the number of asterisks and tildes that a reader sees outside of code."""
    children = _RENDERER.parseInline(line)[0].children or []
    return sum(token.content.count("*") + token.content.count("~") for token in children if token.type == "text")


def _count_markers(runs: Sequence[Run]) -> int:
    return sum(run.text.count("*") + run.text.count("~") for run in runs if not run.markup and not run.style.code)


def escape_line_start(line: str) -> str:
    """Escape characters that would make the line a heading, list item or rule."""
    return _BLOCK_START.sub(lambda match: f"{match.group()}\\", line, count=1) if _BLOCK_START.match(line) else line


def _collapse_spaces(runs: Sequence[Run]) -> list[Run]:
    """Collapse white space as HTML does, and join adjacent runs with the same style."""
    joined: list[Run] = []
    for run in runs:
        if joined and not run.markup and not joined[-1].markup and joined[-1].style == run.style:
            joined[-1] = replace(joined[-1], text=joined[-1].text + run.text)
        else:
            joined.append(run)
    collapsed: list[Run] = []
    ends_with_space = True
    for run in joined:
        if run.markup:
            collapsed.append(run)
            ends_with_space = False
            continue
        text = _SPACES.sub(" ", _LINE_END_IN_CJK.sub("", run.text))
        if ends_with_space:
            text = text.lstrip(" \u00a0")
        if text:
            collapsed.append(replace(run, text=text))
            ends_with_space = text[-1] in " \u00a0"
    return collapsed


def _write(runs: Sequence[Run], kinds: Sequence[str], before: str = "", after: str = "") -> str:
    """Return the Markdown of the runs, with the given kinds of markup. The kind that extends furthest is outside.

    `before` and `after` are the characters of text that surround it, without asterisks of emphasis.
    """
    written = ""
    start = 0
    while start < len(runs):
        kind, end = _choose_markup(runs, start, kinds)
        group = runs[start:end]
        previous = written.rstrip("*")[-1:] or before
        following = _get_first_character(runs[end], kinds) if end < len(runs) else after
        if kind == LINK:
            written = re.sub(r"!$", r"\\!", written)  # would make the link an image
            written += _write_link(group)
        elif kind:
            others = [other for other in kinds if other != kind]
            written += _write_emphasis(group, kind, others, previous, following)
        else:
            written += "".join(map(_write_run, group))
        start = end
    return written


def _choose_markup(runs: Sequence[Run], start: int, kinds: Sequence[str]) -> tuple[str, int]:
    """Return the kind of markup that begins at `start`, if any, and where it ends."""
    chosen, furthest = "", start + 1
    for kind in kinds:
        value = getattr(runs[start].style, kind)
        if not value:
            continue
        end = next((n for n in range(start, len(runs)) if getattr(runs[n].style, kind) != value), len(runs))
        if kind == LINK:
            return kind, end
        if not chosen or end > furthest:
            chosen, furthest = kind, end
    return chosen, furthest


def _write_link(runs: Sequence[Run]) -> str:
    prefix, inner, suffix = _split_spaces(_write(runs, list(EMPHASIS), "[", "]"))
    return f"{prefix}[{inner}]({runs[0].style.link}){suffix}" if inner else prefix or suffix


def _write_emphasis(runs: Sequence[Run], kind: str, others: Sequence[str], before: str, after: str) -> str:
    marker = EMPHASIS[kind]
    # Within other emphasis, a marker between two punctuation characters could belong to either.
    is_inner = len(others) < len(EMPHASIS) - 1
    separates = _is_text if is_inner else _is_letter
    head, body, tail = _split_borders(runs, is_head_moved=separates(before), is_tail_moved=separates(after))
    before, after = head[-1:] or before, tail[:1] or after
    prefix, inner, suffix = _split_spaces(_write(body, others, before, after))
    text = inner.strip("*")
    opens = not _is_punctuation(text[:1] or ".") or not separates(prefix or before)
    closes = not _is_punctuation(text[-1:] or ".") or not separates(suffix or after)
    if not text or not opens or not closes:
        marker = ""
    return f"{head}{prefix}{marker}{inner}{marker}{suffix}{tail}"


def _split_borders(runs: Sequence[Run], *, is_head_moved: bool, is_tail_moved: bool) -> tuple[str, list[Run], str]:
    """Return the punctuation at the borders of the runs that has to be outside of emphasis, and the runs without it."""
    head = tail = ""
    body = list(runs)
    if is_head_moved and not body[0].markup and not body[0].style.code:
        core = body[0].text.lstrip("".join(filter(_is_punctuation, set(body[0].text))))
        head, body[0] = body[0].text[: len(body[0].text) - len(core)], replace(body[0], text=core)
    if is_tail_moved and not body[-1].markup and not body[-1].style.code:
        core = body[-1].text.rstrip("".join(filter(_is_punctuation, set(body[-1].text))))
        tail, body[-1] = body[-1].text[len(core) :], replace(body[-1], text=core)
    return escape_inline_text(head), [run for run in body if not run.is_break], escape_inline_text(tail)


def _split_spaces(text: str) -> tuple[str, str, str]:
    core = text.strip(" \u00a0")
    start = text.find(core) if core else len(text)
    return text[:start], core, text[start + len(core) :]


def _write_run(run: Run) -> str:
    if run.markup:
        return run.markup
    return _write_code(run.text) if run.style.code else escape_inline_text(run.text)


def _write_code(text: str) -> str:
    prefix, code, suffix = _split_spaces(text)
    if not code:
        return prefix
    ticks = "`" * (1 + max(map(len, re.findall("`+", code)), default=0))
    padding = " " if "`" in (code[0], code[-1]) else ""
    return f"{prefix}{ticks}{padding}{code}{padding}{ticks}{suffix}"


def _get_first_character(run: Run, kinds: Sequence[str]) -> str:
    """Return the first character of the Markdown of a run, without asterisks."""
    if run.style.link is not None and LINK in kinds:
        return "["
    if run.markup:
        return run.markup[0]
    if run.style.code:
        return "`" if not run.text.startswith(" ") else " "
    return run.text[0]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _is_text(character: str) -> bool:
    return bool(character) and not character.isspace()


def _is_letter(character: str) -> bool:
    return _is_text(character) and not _is_punctuation(character)
