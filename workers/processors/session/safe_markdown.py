"""Make untrusted text safe to include in Markdown. Pure.

Markdown may contain HTML, so `<script>` in the text of a page would run in the reader's browser. An unclosed code fence
would include everything after it.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from jobledger.ledger.net.url_policy import strip_userinfo

COMMONMARK = MarkdownIt("commonmark").enable("table")
_SENTINEL = "\n\n## end of untrusted text\n"

_IN_LINE = re.compile(r"[\\`*\[\]<>~|]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)")
_TOKENS = re.compile(
    r"(?P<kept>\\[!-/:-@\[-`{-~])"
    r"|(?P<code>(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<ticks_alone>`+)"
    r"|(?P<image>!(?=\[))"
    r"|(?P<link>\](?=\((?!https?://|mailto:)))"
    r"|(?P<html><|&(?=#?\w+;))"
)


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
    """Return the Markdown without raw HTML, images and links to anything but web pages and mailboxes.

    All blocks are closed. If this fails, return the text without its markup.
    """
    text = "\n".join(_sanitize_lines(markdown))
    if _is_safe(text):
        return text
    return "\n\n".join(escape_text(line) for line in markdown.splitlines() if line.strip())


def _sanitize_lines(markdown: str) -> list[str]:
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        opening = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            lines.append(line)
            if opening and opening.group(1).startswith(fence) and not opening.group(2).strip():
                fence = ""
                lines.append("")
        elif opening and "`" not in opening.group(2):
            fence = opening.group(1)
            lines += ["", line]
        else:
            lines.append(_sanitize_line(line.rstrip()))
    if fence:
        lines.append(fence)
    return lines


def _sanitize_line(line: str) -> str:
    line = re.sub(r"^(\s*)\[(?=[^\]]*\]:)", r"\1\\[", line)  # no link definitions
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
    return not any(token.type in ("html_block", "html_inline", "image") for token in pieces) and all(
        str(token.attrs.get("href", "")).startswith(("http://", "https://", "mailto:"))
        for token in pieces
        if token.type == "link_open"
    )
