"""The step `slides` on unusual attachments: what the document shows, and what the warnings say."""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobledger.workers.processors.session import attachments, pdf_rendering
from jobledger.workers.processors.session.fetcher import Fetcher
from jobledger.workers.processors.session.pipeline import run
from jobledger.workers.sandbox import runner
from tests.processors.session import decks
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    make_parameters,
    make_pdf,
    make_settings,
    read_document,
)
from tests.processors.session.presentations import (
    convert_with_libreoffice,
    find_processes,
    make_flat_presentation_with_notes,
    needs_libreoffice,
)
from tests.support.event_loop_clock import advance_clock

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None or not runner.is_available(),
    reason="install Tesseract and a sandbox: apt-get install tesseract-ocr bubblewrap",
)


class Attachment:
    """Runs session jobs with an attachment."""

    def __init__(self, site: Site, page_url: str, folder: Path) -> None:
        self._site = site
        self._page_url = page_url
        self._folder = folder

    async def process(
        self,
        content: bytes,
        path: str = "/slides.pdf",
        *,
        media_type: str | None = None,
        parameters: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[str, RecordingJob]:
        """Return the document and the job."""
        headers = {"Content-Type": media_type} if media_type else {}
        url = self._site.put(path, SiteResponse(content, headers=headers))
        job = RecordingJob(make_parameters(url=self._page_url, attachments_url=url, **(parameters or {})), self._folder)
        limits = make_settings(**settings)
        results = await run(job, limits, Fetcher(limits, lock_directory=self._folder / "locks"))
        return read_document(job, results), job


@pytest.fixture
def attachment(site: Site, page_url: str, tmp_path: Path) -> Attachment:
    return Attachment(site, page_url, tmp_path)


def list_slides(document: str) -> list[int]:
    return [int(number) for number in re.findall(r"\(assets/slide-(\d+)\.jpg\)", document)]


# Pages that cannot be rendered ---------------------------------------------------------------------------------------


async def test_endless_page_is_named_and_other_pages_are_shown(
    attachment: Attachment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page needs about 0.4 GB per second. With the usual limit, it may run out of memory before the timeout.
    monkeypatch.setattr(pdf_rendering, "_LIMITS", runner.ResourceLimits(memory_bytes=8 * 1024**3))
    document, job = await attachment.process(decks.make_deck_with_endless_page(), slide_timeout_seconds=4)
    assert job.warnings == ["Slide 2 is not shown. The page was not rendered within 4 seconds."]
    assert re.findall(r"!\[(.*)\]\((.*)\)", document) == [
        ("Slide 1: Before", "assets/slide-001.jpg"),
        ("Slide 3: After", "assets/slide-003.jpg"),
    ]
    assert find_processes(tmp_path) == []


async def test_crashed_renderer_continues_with_next_page(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf_rendering, "_LIMITS", runner.ResourceLimits(cpu_seconds=2))
    document, job = await attachment.process(decks.make_deck_with_endless_page())
    assert job.warnings == [
        "Slide 2 is not shown. The page could not be rendered: the renderer crashed or ran out of memory."
    ]
    assert list_slides(document) == [1, 3]


async def test_slides_are_rendered_without_a_sandbox(attachment: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = runner.ProbeResult("landlock", is_working=False, reason="none")
    monkeypatch.setattr(runner, "probe_methods", lambda: (probe,))
    document, job = await attachment.process(make_pdf(2))
    assert (job.warnings, list_slides(document)) == ([], [1, 2])


# Overlays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has_labels", "shown"),
    [(True, [1, 4, 6, 7, 8]), (False, [1, 4, 5, 6, 7, 8])],  # without labels, changed colours may mean something
)
async def test_overlays_are_merged(has_labels: bool, shown: list[int], attachment: Attachment) -> None:
    document, job = await attachment.process(decks.make_beamer_deck(has_labels=has_labels))
    assert list_slides(document) == shown
    assert f"Animation steps that are not shown: {8 - len(shown)}\n" in document
    assert "Slide 4: Why a ledger State is lost History helps Audits are easy" in document
    assert len(job.files) == 2 * len(shown) + 1
    assert job.warnings == []


async def test_overlays_are_kept_if_not_merged_by_setting(attachment: Attachment) -> None:
    document, _ = await attachment.process(decks.make_beamer_deck(has_labels=True), merge_overlays=False)
    assert list_slides(document) == [*range(1, 9)]
    assert "omitted" not in document


async def test_animation_steps_without_text_are_merged_if_pictures_are_contained(attachment: Attachment) -> None:
    noise = Image.effect_noise((1600, 900), 80)
    content = decks.make_picture_deck(*map(decks.make_circles, (1, 2, 3)), noise)
    document, _ = await attachment.process(content, ocr="never")
    assert list_slides(document) == [3, 4]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["Results", "Revenue 5"], ["Results", "Revenue 6"]),
        (["Results", "one two"], ["Results", "two one"]),
        (["Results"], ["", "Results", "at another place"]),
    ],
)
async def test_page_with_other_content_is_not_merged(
    first: list[str], second: list[str], attachment: Attachment
) -> None:
    document, _ = await attachment.process(decks.make_text_deck(first, second))
    assert list_slides(document) == [1, 2]


async def test_page_is_not_merged_if_its_invisible_text_would_be_lost(attachment: Attachment) -> None:
    deck = decks.make_deck()
    for words in ("for screen readers", ""):
        deck.add_page()
        deck.text(15, 15, "Results")
        deck.set_text_color(255)
        deck.text(15, 50, words)
        deck.set_text_color(0)
    document, _ = await attachment.process(decks.finish(deck))
    assert list_slides(document) == [1, 2]


async def test_page_number_may_change_between_merged_pages(attachment: Attachment) -> None:
    content = decks.make_text_deck(["Agenda"], ["Agenda", "First point"], footer="{page}")
    document, _ = await attachment.process(content)
    assert list_slides(document) == [2]


# Notes --------------------------------------------------------------------------------------------------------------


async def test_annotations_are_notes_and_survive_merging(attachment: Attachment) -> None:
    document, _ = await attachment.process(decks.make_deck_with_annotations("Say *hello*", "Smile"))
    assert "(assets/slide-002.jpg)\n\nSpeaker notes:\n\n- Say \\*hello\\*\n- Smile\n" in document


async def test_notes_beside_the_slide_are_separated(attachment: Attachment) -> None:
    document, job = await attachment.process(decks.make_deck_with_notes_beside("Tell the joke", "And wait"))
    assert "![Slide 1: Topic 1](assets/slide-001.jpg)\n\nSpeaker notes:\n\n- Tell the joke\n" in document
    [content] = [content for path, content in job.files.items() if path.endswith("slide-001.jpg")]
    with Image.open(io.BytesIO(content)) as image:
        assert image.width / image.height == pytest.approx(16 / 9, rel=0.01)
        assert image.getpixel((image.width - 20, image.height - 20)) == pytest.approx((250, 240, 200), abs=4)


async def test_wide_page_is_whole_if_it_has_no_notes(attachment: Attachment) -> None:
    deck = decks.make_deck(width=320)
    deck.add_page()
    deck.text(170, 40, "On the right")
    document, _ = await attachment.process(decks.finish(deck))
    assert "![Slide 1: On the right]" in document
    assert "Speaker notes" not in document


@needs_libreoffice
@pytest.mark.timeout(180)
@pytest.mark.parametrize("suffix", ["fodp", "pptx", "ppt"])
async def test_converted_presentation_has_notes_of_visible_slides(
    suffix: str, attachment: Attachment, tmp_path: Path
) -> None:
    content = make_flat_presentation_with_notes()
    if suffix != "fodp":
        content = await asyncio.to_thread(convert_with_libreoffice, suffix, content, tmp_path)
    document, job = await attachment.process(content, f"/deck.{suffix}")
    slides = document[document.index("## Slides") : document.index("## Transcript")]
    assert slides.split("\n\n")[1:] == [
        "![Slide 1: First](assets/slide-001.jpg)",
        *("Speaker notes:", "- Note one"),
        "![Slide 2: Third](assets/slide-002.jpg)",
        *("Speaker notes:", "- Note three"),
        "",
    ]
    assert job.warnings == []


# Empty and other attachments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (decks.make_pdf_without_pages(), "The slides are only linked. The PDF has no pages."),
        (decks.make_text_deck([], [], []), "The slides are only linked. All 3 pages are blank."),
    ],
)
async def test_empty_deck_is_named(content: bytes, warning: str, attachment: Attachment) -> None:
    document, job = await attachment.process(content)
    assert job.warnings == [warning]
    assert "## Slides" not in document
    assert len(job.files) == 1


async def test_presentation_without_slides_is_named(attachment: Attachment) -> None:
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("ppt/presentation.xml", '<p:presentation xmlns:p="p"/>')
    _, job = await attachment.process(package.getvalue(), "/deck.pptx")
    assert job.warnings == ["The attachment is only linked. It has no slides."]


async def test_blank_pages_of_other_decks_are_shown(attachment: Attachment) -> None:
    document, _ = await attachment.process(decks.make_text_deck([], ["Title"], []))
    assert list_slides(document) == [1, 2, 3]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
async def test_picture_is_shown_as_slide(kind: str, attachment: Attachment) -> None:
    picture = Image.linear_gradient("L").resize((3000, 1500))
    document, job = await attachment.process(decks.encode_picture(picture, kind), f"/poster.{kind.lower()}")
    assert list_slides(document) == [1]
    [content] = [content for path, content in job.files.items() if path.endswith("slide-001.jpg")]
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (1280, 640))
    assert job.warnings == []


async def test_damaged_picture_is_only_linked(attachment: Attachment) -> None:
    content = decks.encode_picture(decks.make_circles(1), "PNG")[:300]
    _, job = await attachment.process(content, "/poster.png")
    assert job.warnings == ["The slides are only linked. The picture is damaged."]


def make_archive(*, compression: int = zipfile.ZIP_DEFLATED, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("__MACOSX/._slides.pdf", b"metadata")
        archive.writestr("readme.txt", b"Hello")
        for name, content in files.items():
            archive.writestr(f"talk/{name}.pdf", content)
    return buffer.getvalue()


async def test_only_presentation_of_archive_is_shown(attachment: Attachment) -> None:
    document, job = await attachment.process(make_archive(slides=make_pdf(2)), "/slides.zip")
    assert (list_slides(document), job.warnings) == ([1, 2], [])


REVEAL_DECK = b"""<!doctype html><html><body><div class="reveal"><div class="slides">
<section><h1>Ledgers</h1><p>by <b>Ada</b></p><aside class="notes">Say hello</aside></section>
<section><section><h2>Up</h2><ul><li>one</li><li>two</li></ul></section><section><h2>Down</h2></section></section>
</div></div><script>Reveal.initialize()</script></body></html>"""


@pytest.mark.parametrize(
    ("path", "content", "reason"),
    [
        ("/a.zip", make_archive(), "It is a ZIP archive that contains no presentation, not a PDF."),
        (
            "/a.zip",
            make_archive(compression=zipfile.ZIP_STORED, one=make_pdf(1), two=make_pdf(1)),
            "It is a ZIP archive that contains 2 presentations (one.pdf, two.pdf), not a PDF.",
        ),
        ("/a.zip", make_archive(one=bytes(3_000_000)), "The presentation in the ZIP archive is larger than 2.0 MB."),
        ("/a.zip", make_archive(one=b"none"), "The presentation in the archive is damaged."),
        (
            "/a",
            b"<!DOCTYPE html><form>Please sign in</form>",
            "It is not a PDF (text/html). The web page asks to log in.",
        ),
        ("/a", b"<!DOCTYPE html><div data-marpit-svg>x</div>", "It is an HTML presentation (Marp), not a PDF."),
        ("/a", b"<html>Hello</html>", "It is not a PDF (text/html)."),
        (
            "/a.pptx",
            b"\xd0\xcf\x11\xe0" + "EncryptedPackage".encode("utf-16-le"),
            "It is a presentation that is protected by a password.",
        ),
        ("/a.7z", b"", "It is an archive, not a PDF."),
        ("/a", b"", "The file is empty."),
    ],
)
async def test_other_attachment_is_named(path: str, content: bytes, reason: str, attachment: Attachment) -> None:
    _, job = await attachment.process(content, path, slides_max_bytes=2_000_000)
    assert job.warnings == [f"The attachment is only linked. {reason}"]


async def test_reveal_js_deck_shows_texts_and_notes(attachment: Attachment) -> None:
    document, job = await attachment.process(REVEAL_DECK, "/deck.html", media_type="text/html")
    slides = document[document.index("## Slides") : document.index("## Transcript")]
    assert slides.split("\n\n")[1:] == [
        *("### Slide 1", "- Ledgers\n- by Ada", "Speaker notes:", "- Say hello"),
        *("### Slide 2", "- Up\n- one\n- two", "### Slide 3", "- Down", ""),
    ]
    assert job.warnings == ["Only the text of the slides is shown. It is an HTML presentation (reveal.js), not a PDF."]


async def test_reveal_js_deck_in_markdown_has_slides_and_notes(attachment: Attachment) -> None:
    deck = b"""<!doctype html><div class="reveal"><div class="slides">
    <section data-markdown><textarea data-template>
    ## One *point*

    - first

    Note: Speak slowly

    ---

    Two</textarea></section>
    <section data-visibility="hidden"><h2>Backup</h2></section>
    <section data-visibility="hidden"><section><h2>Backup</h2></section></section><section>Last</section>
    </div></div><script>Reveal.initialize()</script>"""
    document, _ = await attachment.process(deck, "/deck.html", media_type="text/html")
    slides = document[document.index("## Slides") : document.index("## Transcript")]
    assert slides.split("\n\n")[1:] == [
        *("### Slide 1", "- One point\n- first", "Speaker notes:", "- Speak slowly"),
        *("### Slide 2", "- Two", "### Slide 3", "- Last", ""),
    ]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "https://docs.google.com/presentation/d/1aB-c/edit#slide=id.p",
            "https://docs.google.com/presentation/d/1aB-c/export/pdf",
        ),
        ("https://docs.google.com/presentation/d/e/2PACX-1/pub", None),
        ("https://drive.google.com/file/d/1aB/view?usp=sharing", "https://drive.google.com/uc?export=download&id=1aB"),
        ("https://www.dropbox.com/s/1/a.pdf?rlkey=2&dl=0", "https://www.dropbox.com/s/1/a.pdf?rlkey=2&dl=1"),
        ("https://github.com/o/r/blob/main/a%20b.pdf", "https://github.com/o/r/raw/main/a%20b.pdf"),
        (
            "https://gitlab.conference.example/o/r/-/blob/main/a.pdf",
            "https://gitlab.conference.example/o/r/-/raw/main/a.pdf",
        ),
        ("https://conference.example/blob/a.pdf", None),
    ],
)
def test_viewer_page_has_download_url(url: str, expected: str | None) -> None:
    assert attachments.get_download_url(url) == (expected or url)


# Text ---------------------------------------------------------------------------------------------------------------


async def test_repeated_footer_is_shown_once(attachment: Attachment) -> None:
    content = decks.make_text_deck(["Ledgers"], ["Why"], ["How"], footer="Jane Doe / FOSDEM 2025 / {page}")
    document, _ = await attachment.process(content)
    assert re.findall(r"!\[(.*)\]", document) == [
        "Slide 1: Ledgers Jane Doe / FOSDEM 2025 / 1",
        "Slide 2: Why",
        "Slide 3: How",
    ]


@needs_tesseract
async def test_text_of_scanned_slides_is_recognized(attachment: Attachment) -> None:
    content = decks.make_picture_deck(decks.make_text_picture("Optimistic appends"), decks.make_circles(2))
    document, job = await attachment.process(content)
    assert re.findall(r"!\[(.*)\]", document) == ["Slide 1 (recognized text): Optimistic appends", "Slide 2"]
    assert job.warnings == []
    document, _ = await attachment.process(content, ocr="never")
    assert "Optimistic" not in document


@needs_tesseract
async def test_missing_language_data_is_named(attachment: Attachment) -> None:
    content = decks.make_picture_deck(decks.make_text_picture("Optimistic appends"))
    _, job = await attachment.process(content, parameters={"source_language": "eo"})
    assert job.warnings == [
        'The text of slide 1 was not recognized. Tesseract has no data for the language "eo". '
        "Install the data with: apt install tesseract-ocr-epo."
    ]


class SlowRecognitionJob(RecordingJob):
    """The step's time for text recognition has passed when it begins."""

    async def report_progress(self, percent: float, message: str) -> None:
        await super().report_progress(percent, message)
        if message.startswith("Recognizing"):
            advance_clock(280)


@needs_tesseract
async def test_slow_text_recognition_keeps_the_slides(site: Site, page_url: str, tmp_path: Path) -> None:
    content = decks.make_picture_deck(decks.make_text_picture("Optimistic appends"))
    url = site.put("/slides.pdf", SiteResponse(content))
    job = SlowRecognitionJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    results = await run(job, make_settings(), Fetcher(make_settings(), lock_directory=tmp_path / "locks"))
    assert list_slides(read_document(job, results)) == [1]
    assert job.warnings == ["There was not enough time to recognize the text of slide 1."]
