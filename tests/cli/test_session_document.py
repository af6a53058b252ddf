"""The document of a session as the API serves it: all images and links can be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
import yaml
from markdown_it import MarkdownIt

from tests.processors.session.fixtures import SiteResponse, html, make_pdf, make_video, serve_site
from tests.support.installation import Installation

TITLE = 'Fünf "Ränder" & <b>ein</b> Rand: [eckig](x) 🦆 — 100 %?'
PAGE = """<html lang="de"><head><title>{title}</title></head><body><main><h1>Rand</h1>
<p>Siehe <a href="/mehr?a=1&amp;b=(2)">mehr</a> und <a href="andere seite.html">eine andere</a>.</p></main>
</body></html>"""


def extract_targets(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and URL of each image and link."""
    for block in MarkdownIt("commonmark").parse(markdown):
        for token in block.children or []:
            if token.type == "image":
                yield "image", str(token.attrs["src"])
            elif token.type == "link_open":
                yield "link", str(token.attrs["href"])


@pytest.mark.timeout(120)
def test_served_document_images_and_links_are_loadable(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    sessions = {"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    with (
        serve_site() as site,
        Installation(tmp_path, mongodb=mongodb, processors=sessions) as installation,
        httpx.Client() as client,
    ):
        # Parentheses are escaped in Markdown as %28 and %29, which the test server does not decode.
        for path in (
            "/mehr?a=1&b=%282%29",
            "/talks/andere%20seite.html",
            "/film%20%281%29.webm",
            "/folien_%5B1%5D.pdf",
        ):
            site.put(path, html("<p>Da.</p>"))
        parameters = {
            **{"event": "Rand/Konferenz: 2025", "session": TITLE, "track": "A|B*C", "filename": "Fünf Ränder?.md"},
            "url": site.put("/talks/rand.html", html(PAGE.format(title="Rand"))),
            "video_url": site.put("/film (1).webm".replace(" ", "%20"), SiteResponse(make_video(1))),
            "attachments_url": site.put("/folien_[1].pdf", SiteResponse(make_pdf(3))),
            **{"source_language": "de", "target_language": "de"},
        }
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
        url = installation.commands[-1].url
        outcome = installation.run("submit", "-", "--wait", stdin=json.dumps(parameters), JOBLEDGER_URL=url)
        assert outcome.exit_code == 0, outcome.out + outcome.err
        [job] = client.get(f"{url}/api/events/jobs").json()["jobs"]
        document_url = urljoin(url, job["results"]["markdown_url"])
        document = client.get(document_url)
        assert document.headers["content-type"].startswith("text/markdown")
        _, front, body = document.text.split("---\n", 2)
        assert yaml.safe_load(front)["title"] == TITLE
        found_targets = list(extract_targets(body))
        for kind, target in found_targets:
            answer = client.get(urljoin(document_url, target))
            assert answer.status_code == 200, target
            assert kind == "link" or answer.headers["content-type"] == "image/jpeg"
    assert [kind for kind, _ in found_targets].count("image") == 3
    assert [kind for kind, _ in found_targets].count("link") == 5
