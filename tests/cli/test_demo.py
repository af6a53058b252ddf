"""`jobledger demo`, end to end in a process of its own: what was said and shown is what comes out."""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pypdfium2
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from jobledger.cli.demo_site import write_site
from jobledger.cli.demo_site.conference import Talk, load_conference
from tests.support.installation import CommandOutcome, Installation
from tests.support.mongodb_provider import needs_local_mongod

CONFERENCE = load_conference()
TALKS = CONFERENCE.talks

pytestmark = [needs_local_mongod, pytest.mark.timeout(300)]


def test_the_demo_shows_what_was_said_and_can_be_repeated(tmp_path: Path) -> None:
    """One test, because running it takes a while: what is shown is checked after the first run, the rest after both."""
    site = tmp_path / "site"
    write_site(site)
    with Installation(tmp_path / "demo") as installation:
        ended = installation.run("demo", seconds=120)
        tells_where_everything_is(ended, installation.directory / "demo-data")
        for talk in TALKS:
            page = page_of(installation.directory / "demo-data", talk)
            has_every_word_of_the_page_in_order(page, talk)
            has_the_metadata_of_the_session(page, talk)
            shows_every_page_of_the_slides(page, talk, site)

        again = installation.run("demo", seconds=120)
        tells_where_everything_is(again, installation.directory / "demo-data")
        assert {path.name for path in installation.directory.iterdir()} == {"config.yaml", "demo-data"}


def tells_where_everything_is(ended: CommandOutcome, copies: Path) -> None:
    assert ended.exit_code == 0, ended.out + ended.err
    assert "\\n" not in ended.out
    assert "Traceback" not in ended.err, ended.err
    for talk in TALKS:
        assert talk.title in ended.out
    assert ended.out.count("/api/events/files/") == len(TALKS)
    assert str(copies) in ended.out
    assert len(list(copies.rglob("*.md"))) == len(TALKS)


def page_of(copies: Path, talk: Talk) -> Path:
    """The Markdown copy for a talk, found by what its front matter says."""
    [found] = [path for path in copies.rglob("*.md") if front_matter(path)["title"] == talk.title]
    return found


def front_matter(path: Path) -> dict[str, Any]:
    _, matter, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(matter)
    return content


def words(markup: str) -> list[str]:
    """The words of HTML, without its tags."""
    return re.findall(r"\w+", html.unescape(re.sub(r"<[^>]+>", " ", markup)))


def has_every_word_of_the_page_in_order(page: Path, talk: Talk) -> None:
    _, _, body = page.read_text(encoding="utf-8").split("---\n", 2)
    said, shown = words(talk.abstract + talk.body), words(MarkdownIt().enable("table").render(body))
    compared = SequenceMatcher(None, said, shown, autojunk=False)
    lost = [word for kind, start, end, _, _ in compared.get_opcodes() if kind != "equal" for word in said[start:end]]
    assert lost == []


def has_the_metadata_of_the_session(page: Path, talk: Talk) -> None:
    matter = front_matter(page)
    assert matter["title"] == talk.title
    assert matter["speaker"] == [speaker.name for speaker in talk.speakers]
    assert matter["track"] == talk.track
    assert matter["date"] == talk.day
    assert matter["language"] == talk.language
    assert {CONFERENCE.name, talk.track} <= set(matter["tags"])
    assert matter["url"].endswith(f"/talks/{talk.slug}/")
    assert talk.start in page.read_text(encoding="utf-8")


def images_in(markdown: str) -> list[str]:
    """The files that Markdown shows as images, as any reader of Markdown finds them."""
    inline = [token for token in MarkdownIt().parse(markdown) if token.type == "inline"]
    images = [child for token in inline for child in token.children or () if child.type == "image"]
    return [unquote(str(image.attrs["src"])) for image in images]


def shows_every_page_of_the_slides(page: Path, talk: Talk, site: Path) -> None:
    deck, pages = site / "files" / f"{talk.slug}.pdf", 0
    if deck.exists():
        with pypdfium2.PdfDocument(deck) as document:
            pages = len(document)
    shown = images_in(page.read_text(encoding="utf-8"))

    assert pages == talk.page_count
    assert len(shown) == len(set(shown)) == pages
    for name in shown:
        with Image.open(page.parent / name) as image:
            image.load()
            assert image.format == "JPEG"
            assert len(image.getcolors(1 << 24) or []) > 10, f"{name} is an empty page"


def test_a_directory_that_is_not_from_a_demo_is_left_alone(tmp_path: Path) -> None:
    with Installation(tmp_path / "demo") as installation:
        thesis = installation.directory / "demo-data" / "thesis.txt"
        thesis.parent.mkdir(parents=True)
        thesis.write_text("the only copy")
        ended = installation.run("demo", seconds=120)
        assert ended.exit_code == 2
        assert "was not created by the demo" in ended.err
        assert thesis.read_text() == "the only copy"
