"""Make untrusted text safe to include in Markdown. Pure.

Markdown may contain HTML, so `<script>` in the text of a page would run in the reader's browser. An unclosed code fence
would include everything after it.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from jobledger.ledger.net.url_policy import strip_userinfo

IMAGE_TARGET_PREFIX = "assets/page-image-"
"""Images with other targets are removed: a document must not load anything from other sites."""
COMMONMARK = MarkdownIt("commonmark").enable("table")
_SENTINEL = "\n\n## end of untrusted text\n"

_IN_LINE = re.compile(r"[\\`*\[\]<>~|]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_FENCE = re.compile(r"[ \t]*(?P<markers>(?:(?:[-*+>]|\d{1,9}[.)])[ \t]+)*)(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_TOKENS = re.compile(
    rf"(?P<kept>\\[!-/:-@\[-`{{-~]|!\[(?:[^\[\]\\`<>&!\n]|\\.)*\]\({IMAGE_TARGET_PREFIX}[0-9]{{1,3}}(?:\.[a-z]{{3,4}})?\))"
    r"|(?P<code>(?<!(?<!\\)`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<ticks_alone>`+)"
    r"|(?P<image>!(?=\[))"
    r"|(?P<link>\](?=\((?!https?://|mailto:)))"
    r"|(?P<html><|&(?=#?\w+;))"
)

_TARGETS = {"link_open": ("http://", "https://", "mailto:"), "image": (IMAGE_TARGET_PREFIX,)}


def escape_text(text: str) -> str:
    """Return one line of Markdown that is displayed as `text`, without effect of any markup in it."""
    line = escape_inline_text(" ".join(text.split()))
    if match := re.match(r"(\d{1,9})([.)])(?=\s|$)", line):
        return f"{match.group(1)}\\{line[match.end(1) :]}"
    return f"\\{line}" if re.match(r"(#{1,6}|[+-])(\s|$)|[-=]{2,}", line) else line


def escape_inline_text(text: str) -> str:
    """Return Markdown that is displayed as `text`, except at the start of a line."""
    return _IN_LINE.sub(lambda match: f"\\{match.group()}", text)


def escape_link_target(url: str) -> str:
    """Return `url` as the target of a Markdown link, without user name and password."""
    return re.sub(
        r"[\s\x00-\x20\x7f<>()\[\]\\`\"'|]",
        lambda match: "".join(f"%{byte:02X}" for byte in match.group().encode()),
        strip_userinfo(url),
    )


def sanitize_markdown(markdown: str) -> str:
    """Return the Markdown without raw HTML, and without links to anything but web pages and mailboxes.

    Of images, only those of the page that are stored as assets stay.
    All blocks are closed. If this fails, return the text without its markup.
    """
    text = "\n".join(_sanitize_lines(markdown))
    if _is_safe(text):
        return text
    return "\n\n".join(escape_text(line) for line in markdown.splitlines() if line.strip())


def _sanitize_lines(markdown: str) -> list[str]:
    """Return the lines with inert text outside of fences. Fences are surrounded by blank lines and closed."""
    lines: list[str] = []
    fence = ""
    is_nested = needs_blank = False
    for line in markdown.splitlines():
        opening = _FENCE.match(line)
        if needs_blank and line.strip():
            lines.append("")
        needs_blank = False
        if fence:
            lines.append(line)
            if opening and opening["fence"].startswith(fence) and not opening["info"].strip():
                fence = ""
                needs_blank = not is_nested
        elif opening and "`" not in opening["info"]:
            fence = opening["fence"]
            is_nested = bool(opening["markers"]) or opening.start("fence") > 0  # in a list or quotation
            lines += [line] if is_nested or not lines or not lines[-1] else ["", line]
        else:
            lines.append(_sanitize_line(line.rstrip()))
    if fence:
        lines.append(fence)
    return lines


def _sanitize_line(line: str) -> str:
    line = re.sub(r"^(\s*)\[(?=(?:[^\[\]\\]|\\.)*\]:)", r"\1\\[", line)  # no link definitions
    return _TOKENS.sub(_escape_token, line)


def _escape_token(match: re.Match[str]) -> str:
    token = match.group()
    if match.lastgroup in ("kept", "code") or match.group("code"):
        return token
    if match.group("link"):
        return "\\]"
    return "".join(f"\\{character}" for character in token)


def _is_safe(text: str) -> bool:
    tokens = COMMONMARK.parse(text + _SENTINEL)
    closing = [token.type for token in tokens[-3:]]
    if closing != ["heading_open", "inline", "heading_close"] or tokens[-3].level or tokens[-3].tag != "h2":
        return False
    pieces = [token for block in tokens for token in (block, *(block.children or []))]
    return not any(token.type in ("html_block", "html_inline") for token in pieces) and all(
        str(token.attrs.get("href", token.attrs.get("src", ""))).startswith(_TARGETS[token.type])
        for token in pieces
        if token.type in _TARGETS
    )
