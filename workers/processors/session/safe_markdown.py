"""session: text from outside, made safe to stand in our Markdown. Pure.

Markdown may hold HTML, so a page that says `<script>` in its text would run it in a reader's browser, and a stray
fence would swallow everything after it.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from jobledger.ledger.net.url_policy import strip_userinfo

_COMMONMARK = MarkdownIt("commonmark").enable("table")
_SENTINEL = "\n\n## end of what came from outside\n"

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
    """One line of Markdown that reads exactly as `text`: no markup in it takes effect."""
    line = escape_inline_text(" ".join(text.split()))
    if found := re.match(r"(\d{1,9})([.)])(?=\s|$)", line):
        return f"{found.group(1)}\\{line[found.end(1) :]}"
    return f"\\{line}" if re.match(r"(#{1,6}|[+-])(\s|$)|[-=]{2,}", line) else line


def escape_inline_text(text: str) -> str:
    """A piece of a line that reads exactly as `text`, wherever but at the line's beginning."""
    return _IN_LINE.sub(lambda found: f"\\{found.group()}", text)


def escape_link_target(url: str) -> str:
    """`url` as the target of a Markdown link, without user name and password."""
    return re.sub(
        r"[\s\x00-\x20\x7f<>()\[\]\\`\"'|]",
        lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()),
        strip_userinfo(url),
    )


def sanitize_markdown(markdown: str) -> str:
    """The same Markdown without raw HTML, images and links other than to the web, and closed in itself.

    Where that does not succeed, the text without its markup.
    """
    text = "\n".join(_sanitize_lines(markdown))
    if _is_safe(text):
        return text
    return "\n\n".join(escape_text(line) for line in markdown.splitlines() if line.strip())


def _sanitize_lines(markdown: str) -> list[str]:
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            lines.append(line)
            if mark and mark.group(1).startswith(fence) and not mark.group(2).strip():
                fence = ""
                lines.append("")
        elif mark and "`" not in mark.group(2):
            fence = mark.group(1)
            lines += ["", line]
        else:
            lines.append(_sanitize_line(line.rstrip()))
    if fence:
        lines.append(fence)
    return lines


def _sanitize_line(line: str) -> str:
    line = re.sub(r"^(\s*)\[(?=[^\]]*\]:)", r"\1\\[", line)  # no link definitions
    return _TOKENS.sub(_escape_token, line)


def _escape_token(found: re.Match[str]) -> str:
    token = found.group()
    if found.lastgroup in ("kept", "code") or found.group("code"):
        return token
    if found.group("link"):
        return "\\]"
    return "".join(f"\\{character}" for character in token)


def _is_safe(text: str) -> bool:
    tokens = _COMMONMARK.parse(text + _SENTINEL)
    closing = [token.type for token in tokens[-3:]]
    if closing != ["heading_open", "inline", "heading_close"] or tokens[-3].level or tokens[-3].tag != "h2":
        return False
    pieces = [token for block in tokens for token in (block, *(block.children or []))]
    return not any(token.type in ("html_block", "html_inline", "image") for token in pieces) and all(
        str(token.attrs.get("href", "")).startswith(("http://", "https://", "mailto:"))
        for token in pieces
        if token.type == "link_open"
    )
