"""api: render Markdown as HTML. Runs in a limited process: some short texts take minutes, or make gigabytes of HTML."""

from __future__ import annotations

from typing import Final

from markdown_it import MarkdownIt

MAX_HTML_BYTES: Final = 512 * 1024


def render(argument: tuple[str, str]) -> str | None:
    """Return Markdown as HTML that runs nothing, or None if it would be too large.

    Args:
        argument: The Markdown, and the address of the folder with the files beside it.
    """
    html = _html(*argument)
    return html if len(html.encode()) <= MAX_HTML_BYTES else None


def _html(markdown: str, files_url: str) -> str:
    body = markdown
    if markdown.startswith("---\n") and (end := markdown.find("\n---\n", 4)) > 0:
        body = markdown[end + 5 :]
    tokens = _MARKDOWN.parse(body)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):  # below the headings of the page
            token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"
        for piece in token.children or []:
            if piece.type == "image":
                source = str(piece.attrs["src"])
                piece.attrs["src"] = source if "://" in source or source.startswith("/") else files_url + source
                piece.attrs["loading"] = "lazy"
            elif piece.type == "link_open":
                piece.attrs["rel"] = "noopener noreferrer nofollow"
    html: str = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return html


_MARKDOWN: Final = MarkdownIt("commonmark", {"html": False}).enable("table")  # HTML in the text is escaped
