"""A session's document as a reader gets it: from the running service, with every image and every link alive."""

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


def targets(markdown: str) -> Iterator[tuple[str, str]]:
    """What a reader's browser would ask for: images and links."""
    for block in MarkdownIt("commonmark").parse(markdown):
        for piece in block.children or []:
            if piece.type == "image":
                yield "image", str(piece.attrs["src"])
            elif piece.type == "link_open":
                yield "link", str(piece.attrs["href"])


@pytest.mark.timeout(120)
def test_every_image_and_link_of_a_served_document_is_alive(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    mongodb = {"uri": mongodb_uri, "db_name": db_name}
    sessions = {"session": {"allowed_private_hosts": ["127.0.0.1"]}}
    with (
        serve_site() as site,
        Installation(tmp_path, mongodb=mongodb, processors=sessions) as installation,
        httpx.Client() as client,
    ):
        # Brackets are escaped in Markdown: %28 is the same to a server, if not to this simple one.
        for path in (
            "/mehr?a=1&b=%282%29",
            "/talks/andere%20seite.html",
            "/film%20%281%29.webm",
            "/folien_%5B1%5D.pdf",
        ):
            site.put(path, html("<p>Da.</p>"))
        asked = {
            **{"event": "Rand/Konferenz: 2025", "session": TITLE, "track": "A|B*C", "filename": "Fünf Ränder?.md"},
            "url": site.put("/talks/rand.html", html(PAGE.format(title="Rand"))),
            "video_url": site.put("/film (1).webm".replace(" ", "%20"), SiteResponse(make_video(1))),
            "attachments_url": site.put("/folien_[1].pdf", SiteResponse(make_pdf(3))),
            **{"source_language": "de", "target_language": "de"},
        }
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
        url = installation.commands[-1].url
        ended = installation.run("submit", "-", "--wait", stdin=json.dumps(asked), JOBLEDGER_URL=url)
        assert ended.exit_code == 0, ended.out + ended.err
        [job] = client.get(f"{url}/api/events/jobs").json()["jobs"]
        address = urljoin(url, job["results"]["markdown_url"])
        served = client.get(address)
        assert served.headers["content-type"].startswith("text/markdown")
        _, front, body = served.text.split("---\n", 2)
        assert yaml.safe_load(front)["title"] == TITLE
        found = list(targets(body))
        for kind, target in found:
            answer = client.get(urljoin(address, target))
            assert answer.status_code == 200, target
            assert kind == "link" or answer.headers["content-type"] == "image/jpeg"
    assert [kind for kind, _ in found].count("image") == 3
    assert [kind for kind, _ in found].count("link") == 5
