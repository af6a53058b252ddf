"""Warnings of a German document are in German, with their numbers and URLs."""

from __future__ import annotations

import re
import time
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from jobledger.workers.processors import session
from jobledger.workers.processors.session.messages import localize_message
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_pdf,
    read_document,
    split_front_matter,
)
from tests.processors.session.test_session_processor import run

GERMAN = yaml.safe_load(files(session).joinpath("messages.yaml").read_text(encoding="utf-8"))["de"]
SENTENCE = "Dieser Vortrag zeigt, wie ein Protokoll, das nur wächst, die Wiederherstellung einfach macht. "
FORMAT = re.compile(r"\{\w*\}")


@pytest.mark.parametrize("english", GERMAN)
def test_translation_has_the_placeholders_of_the_message(english: str) -> None:
    assert sorted(FORMAT.findall(GERMAN[english])) == sorted(FORMAT.findall(english))


@pytest.mark.parametrize(
    ("english", "german"),
    [
        (
            "The page is too long. Only its first 200,000 characters are used.",
            "Die Seite ist zu lang. Nur ihre ersten 200.000 Zeichen werden verwendet.",
        ),
        ("They were not fetched within 0.5 seconds.", "Sie wurden nicht innerhalb von 0,5 Sekunden geladen."),
        (
            "The slides are only linked. https://a.example/x.pdf responded with 404 (Not Found). It was tried 4 times.",
            "Die Folien sind nur verlinkt. https://a.example/x.pdf antwortete mit 404 (Not Found). "
            "Es wurde 4-mal versucht.",
        ),
        (
            'The text was not translated from "en" to "de". There are 300,000 characters, more than 200,000.',
            "Der Text wurde nicht übersetzt (von „en“ nach „de“). Es sind 300.000 Zeichen, mehr als die erlaubten "
            "200.000.",
        ),
        (
            "The transcript was not translated completely (1 of 3 parts): the model is busy.",
            "Das Transkript wurde nicht vollständig übersetzt (1 von 3 Teilen): the model is busy.",
        ),
        (r"A reason with {number} and \1 stays.", r"A reason with {number} and \1 stays."),
    ],
)
def test_message_is_translated_with_its_values(english: str, german: str) -> None:
    assert localize_message(english, "de") == german
    assert localize_message(english, "en") == localize_message(english, "xx") == english


@pytest.mark.parametrize("part", ["x", "The text of ", 'not translated from "', "Slides ", "9,", " "])
def test_long_message_is_translated_in_time(part: str) -> None:
    started = time.process_time()
    localize_message(part * (20_000 // len(part)), "de")
    assert time.process_time() - started < 2


async def test_warnings_of_german_document_have_no_english_words(site: Site, tmp_path: Path) -> None:
    site.put("/1.png", SiteResponse(status=503))
    body = f"<p>{SENTENCE * 3}</p><p><img src=/1.png alt=Bild></p><p>{SENTENCE}</p>"
    url = site.put("/vortrag", html(f"<html lang=de><body><main><h1>Titel</h1>{body}</main>"))
    slides_url = site.put("/folien.pdf", SiteResponse(make_pdf(5)))
    parameters = make_parameters(
        url=url,
        session="Titel",
        speakers=[],
        source_language="de",
        target_language="en",
        video_url=site.url("/video.mp4"),
        attachments_url=slides_url,
    )
    job = RecordingJob(parameters, tmp_path)
    document = read_document(job, await run(job, max_pdf_pages=2, use_subtitles="always"))
    text = split_front_matter(document)[1]
    assert "## Hinweise" in text
    assert len(job.warnings) == 4
    german = re.sub(r"https?://\S+", "", text.partition("## Transkript")[2])
    assert not re.search(r"\b(?:the|is|of|was|were|are|not|with|no)\b", german)
    assert "Nur die ersten 2 von 5 Folien werden gezeigt." in german
