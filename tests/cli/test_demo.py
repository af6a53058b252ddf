"""`jobledger demo`, end to end in its own process: the output contains the texts and slides of all talks."""

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


def test_demo_run_twice_outputs_complete_documents(tmp_path: Path) -> None:
    """A run takes long, so one test checks the documents after the first run and the rest after both."""
    site = tmp_path / "site"
    write_site(site)
    with Installation(tmp_path / "demo") as installation:
        outcome = installation.run("demo", seconds=120)
        assert_output_lists_documents(outcome, installation.directory / "demo-data")
        for talk in TALKS:
            page = find_document(installation.directory / "demo-data", talk)
            assert_document_has_words_of_page_in_order(page, talk)
            assert_document_has_metadata(page, talk)
            assert_document_shows_all_slides(page, talk, site)

        second = installation.run("demo", seconds=120)
        assert_output_lists_documents(second, installation.directory / "demo-data")
        assert {path.name for path in installation.directory.iterdir()} == {"config.yaml", "demo-data"}


def assert_output_lists_documents(outcome: CommandOutcome, copies: Path) -> None:
    assert outcome.exit_code == 0, outcome.out + outcome.err
    assert "\\n" not in outcome.out
    assert "Traceback" not in outcome.err, outcome.err
    for talk in TALKS:
        assert talk.title in outcome.out
    assert outcome.out.count("/api/events/files/") == len(TALKS)
    assert str(copies) in outcome.out
    assert len(list(copies.rglob("*.md"))) == len(TALKS)


def find_document(copies: Path, talk: Talk) -> Path:
    """Return the Markdown copy whose front matter has the title of the talk."""
    [document] = [path for path in copies.rglob("*.md") if read_front_matter(path)["title"] == talk.title]
    return document


def read_front_matter(path: Path) -> dict[str, Any]:
    _, matter, _ = path.read_text(encoding="utf-8").split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(matter)
    return content


def extract_words(markup: str) -> list[str]:
    """Return the words of HTML without its tags."""
    return re.findall(r"\w+", html.unescape(re.sub(r"<[^>]+>", " ", markup)))


def assert_document_has_words_of_page_in_order(page: Path, talk: Talk) -> None:
    _, _, body = page.read_text(encoding="utf-8").split("---\n", 2)
    page_words = extract_words(talk.abstract + talk.body)
    document_words = extract_words(MarkdownIt().enable("table").render(body))
    matcher = SequenceMatcher(None, page_words, document_words, autojunk=False)
    missing = [
        word for kind, start, end, _, _ in matcher.get_opcodes() if kind != "equal" for word in page_words[start:end]
    ]
    assert missing == []


def assert_document_has_metadata(page: Path, talk: Talk) -> None:
    matter = read_front_matter(page)
    assert matter["title"] == talk.title
    assert matter["speaker"] == [speaker.name for speaker in talk.speakers]
    assert matter["track"] == talk.track
    assert matter["date"] == talk.day
    assert matter["language"] == talk.language
    assert {CONFERENCE.name, talk.track} <= set(matter["tags"])
    assert matter["url"].endswith(f"/talks/{talk.slug}/")
    assert talk.start in page.read_text(encoding="utf-8")


def list_images(markdown: str) -> list[str]:
    """Return the paths of the images that a Markdown parser finds."""
    inline = [token for token in MarkdownIt().parse(markdown) if token.type == "inline"]
    images = [child for token in inline for child in token.children or () if child.type == "image"]
    return [unquote(str(image.attrs["src"])) for image in images]


def assert_document_shows_all_slides(page: Path, talk: Talk, site: Path) -> None:
    deck, pages = site / "files" / f"{talk.slug}.pdf", 0
    if deck.exists():
        with pypdfium2.PdfDocument(deck) as document:
            pages = len(document)
    images = list_images(page.read_text(encoding="utf-8"))

    assert pages == talk.page_count
    assert len(images) == len(set(images)) == pages
    for name in images:
        with Image.open(page.parent / name) as image:
            image.load()
            assert image.format == "JPEG"
            assert len(image.getcolors(1 << 24) or []) > 10, f"{name} is an empty page"


def test_demo_foreign_directory_is_refused_and_kept(tmp_path: Path) -> None:
    with Installation(tmp_path / "demo") as installation:
        thesis = installation.directory / "demo-data" / "thesis.txt"
        thesis.parent.mkdir(parents=True)
        thesis.write_text("the only copy")
        outcome = installation.run("demo", seconds=120)
        assert outcome.exit_code == 2
        assert "was not created by the demo" in outcome.err
        assert thesis.read_text() == "the only copy"
