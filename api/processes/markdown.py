"""Render Markdown as HTML. Runs in a limited process: some short texts take minutes or produce gigabytes of HTML."""

from __future__ import annotations

from typing import Final

from markdown_it import MarkdownIt

MAX_HTML_BYTES: Final = 512 * 1024


def render(argument: tuple[str, str]) -> str | None:
    """Return Markdown as HTML without active content, or None if the HTML is larger than `MAX_HTML_BYTES`.

    Args:
        argument: The Markdown, and the URL of the folder that relative image paths refer to.
    """
    markdown, files_url = argument
    body = markdown
    if markdown.startswith("---\n") and (end := markdown.find("\n---\n", 4)) > 0:
        body = markdown[end + 5 :]
    tokens = _MARKDOWN.parse(body)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):  # the page itself uses h1 and h2
            token.tag = f"h{min(6, int(token.tag[1:]) + 2)}"
        for child in token.children or []:
            if child.type == "image":
                source = str(child.attrs["src"])
                child.attrs["src"] = source if "://" in source or source.startswith("/") else files_url + source
                child.attrs["loading"] = "lazy"
            elif child.type == "link_open":
                child.attrs["rel"] = "noopener noreferrer nofollow"
    html: str = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
    return html if len(html.encode()) <= MAX_HTML_BYTES else None


_MARKDOWN: Final = MarkdownIt("commonmark", {"html": False}).enable("table")  # HTML in the text is escaped
