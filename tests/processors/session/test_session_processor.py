"""tests: whole sessions, from a local site to Markdown."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from jobledger.workers.processor import Processor, ProcessorError, Results
from jobledger.workers.processors.session import SessionProcessor, SessionSettings
from tests.processors.session.fixtures import (
    CONFERENCE_PAGE,
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_pdf,
    make_settings,
    make_video,
)

PDF = {"Content-Type": "application/pdf"}
WEBM = {"Content-Type": "video/webm"}


@pytest.fixture
def page(site: Site) -> str:
    return site.put("/2025/talks/ledgers/", html(CONFERENCE_PAGE))


async def run(job: RecordingJob, **changes: Any) -> Results:
    return await SessionProcessor(make_settings(**changes)).run(job)


def text_of(job: RecordingJob, results: Results) -> str:
    assert results.markdown is not None
    return job.files[results.markdown.path].decode()


def parts_of(markdown: str) -> tuple[dict[str, Any], str]:
    front, body = re.fullmatch(r"---\n(.*?\n)---\n(.*)", markdown, re.DOTALL).groups()  # type: ignore[union-attr]  # a document without front matter fails the test right here
    return yaml.safe_load(front), body


def images_in(body: str) -> list[tuple[str, str]]:
    tokens = [token for block in MarkdownIt("commonmark").parse(body) for token in block.children or []]
    return [(str(token.attrs["src"]), token.content) for token in tokens if token.type == "image"]


def test_it_is_a_processor() -> None:
    processor: Processor = SessionProcessor(SessionSettings())
    assert (processor.job_type, processor.isolation) == ("session", "process")


def test_importing_it_does_not_load_what_only_a_running_job_needs() -> None:
    heavy = {"trafilatura", "av", "pypdfium2", "PIL", "httpx", "jinja2"}
    code = f"import sys, jobledger.workers.processors.session; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


async def test_a_session_with_everything_becomes_markdown_with_images(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(3), headers=PDF))
    talk = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides, video_url=talk, extra={"id": 7}), tmp_path)

    results = await run(job, keep_audio=True)
    assert {name for name, share in job.shared.items() if share} == {"page", "transcript", "slides"}
    assert {name for name, share in job.shared.items() if not share} == {"enrich", "markdown"}

    front, body = parts_of(text_of(job, results))
    assert front["title"] == "Ledgers that never forget"
    assert front["speaker"] == ["Ada Example", 'Grace "GH" Sample']
    assert front["job_id"] == "job-1"
    assert front["intro"] == "Why an append-only log is the calmest way to keep state."
    assert "How **optimistic** appends work" in body
    assert body.count("\n# ") == 1
    assert [alt for _, alt in images_in(body)] == [f"Slide {n}: Slide of a talk {n}" for n in (1, 2, 3)]
    assert results.metadata["extra"] == {"id": 7}
    assert results.metadata["slides"] == 3
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert len(results.assets) == 7


async def test_every_image_in_the_markdown_is_a_saved_file_beside_it(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides, session="A [b](c) # d"), tmp_path)
    results = await run(job)
    assert results.markdown is not None
    folder = results.markdown.path.rpartition("/")[0]
    linked = {f"{folder}/{target}" for target, _ in images_in(parts_of(text_of(job, results))[1])}
    assert len(linked) == 2
    assert linked <= set(job.files)
    assert {asset.path for asset in results.assets} == set(job.files) - {results.markdown.path}


async def test_progress_rises_to_a_hundred_and_speaks_plainly(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(4), headers=PDF))
    talk = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides, video_url=talk), tmp_path)
    await run(job, keep_audio=True)
    percents = [percent for percent, _ in job.told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {0, 20, 60, 90, 100} <= set(percents)
    assert "Rendering slide 2 of 4" in [message for _, message in job.told]


async def test_the_log_says_what_was_fetched_and_made(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path)
    await run(job)
    assert any(re.search(r"Fetched .*slides\.pdf \(application/pdf\): .* in \d+\.\d s", line) for line in job.lines)
    assert "Rendered 2 of 2 pages" in job.lines


async def test_the_next_attempt_repeats_no_finished_step_and_keeps_its_warnings(
    site: Site, page: str, tmp_path: Path
) -> None:
    slides = site.put("/slides.pptx", SiteResponse(b"PK"))
    first = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path)
    before = await run(first)
    asked = list(site.requested_paths)
    second = RecordingJob(first.parameters, tmp_path / "other", attempt=2, steps=first.steps)
    after = await run(second)
    assert second.ran == []
    assert site.requested_paths == asked
    assert after == before
    assert second.warnings == first.warnings != []


async def test_the_same_session_in_another_language_fetches_nothing_again_and_has_files_of_its_own(
    site: Site, page: str, tmp_path: Path
) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    talk = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    given = {"url": page, "attachments_url": slides, "video_url": talk}
    first = RecordingJob(make_parameters(**given), tmp_path)
    before = await run(first, keep_audio=True)
    asked = list(site.requested_paths)
    finished = {key: output for key, output in first.steps.items() if key[0] != "markdown"}
    second = RecordingJob(make_parameters(**given, target_language="fr"), tmp_path, job_id="job-2", steps=finished)
    after = await run(second, keep_audio=True)
    assert site.requested_paths == asked
    assert second.ran == ["enrich", "markdown"]
    assert before.markdown is not None
    assert after.markdown is not None
    own = after.markdown.path.rpartition("/")[0]
    assert not before.markdown.path.startswith(own)
    assert len(after.assets) == 5
    assert all(asset.path.startswith(f"{own}/assets/") for asset in after.assets)
    assert [asset.sha256 for asset in after.assets] == [asset.sha256 for asset in before.assets]


async def test_a_step_whose_settings_changed_is_run_again(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(1), headers=PDF))
    first = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path)
    await run(first)
    second = RecordingJob(first.parameters, tmp_path, attempt=2, steps=first.steps)
    await run(second, slide_max_side_px=640)
    assert second.ran == ["slides", "markdown"]


async def test_a_page_that_is_gone_fails_the_job(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.url("/nowhere")), tmp_path)
    with pytest.raises(ProcessorError) as failed:
        await run(job)
    assert (failed.value.code, failed.value.transient) == ("HTTP_ERROR", False)
    assert job.files == {}


async def test_a_page_that_is_no_html_fails_the_job_before_it_is_downloaded(site: Site, tmp_path: Path) -> None:
    url = site.put(
        "/page", SiteResponse(b"\x00" * 10, headers={"Content-Type": "application/zip"}, content_length=10**9)
    )
    with pytest.raises(ProcessorError) as failed:
        await run(RecordingJob(make_parameters(url=url), tmp_path))
    assert (failed.value.code, failed.value.transient) == ("NOT_HTML", False)


async def test_a_page_that_takes_too_long_may_be_tried_again(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.put_hanging("/slow")), tmp_path)
    with pytest.raises(ProcessorError) as failed:
        await run(job, page_timeout_seconds=0.2)
    assert (failed.value.code, failed.value.transient) == ("FETCH_TIMEOUT", True)


class StuckAt(RecordingJob):
    """A job whose step does not get past `percent`."""

    percent = 10.0

    async def report_progress(self, percent: float, message: str) -> None:
        await super().report_progress(percent, message)
        if percent == self.percent:
            await asyncio.Event().wait()


async def test_reading_a_page_is_bounded_as_a_whole(site: Site, page: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError) as failed:
        await run(StuckAt(make_parameters(url=page), tmp_path), page_timeout_seconds=1)
    assert (failed.value.code, failed.value.transient) == ("STEP_TIMEOUT", True)


async def test_slides_drawn_before_time_ran_out_are_shown(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(4), headers=PDF))
    job = StuckAt(make_parameters(url=page, attachments_url=slides), tmp_path)
    job.percent = 80  # two of four
    results = await run(job, slides_timeout_seconds=2)
    assert job.warnings == ["The slides were not processed within 2 seconds. Only the first 2 are shown."]
    assert results.metadata["slides"] == 2


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (SiteResponse(b"%PDF-1.7 but then nothing", headers=PDF), "The PDF is damaged"),
        (SiteResponse(make_pdf(2, password="secret"), headers=PDF), "The PDF is protected by a password"),
        (SiteResponse(b"<p>Log in first</p>", headers={"Content-Type": "text/html"}), "It is not a PDF (text/html)"),
        (None, "was not fetched within 0.9 seconds"),
        (SiteResponse(status=503), "answered 503 (Service Unavailable)"),
        (SiteResponse(b"%PDF-", content_length=10**12), "is larger than "),
    ],
)
async def test_slides_that_cannot_be_shown_are_a_warning_and_a_link(
    answer: SiteResponse | None, sentence: str, site: Site, page: str, tmp_path: Path
) -> None:
    url = site.put("/slides", answer) if answer else site.put_hanging("/slides")
    job = RecordingJob(make_parameters(url=page, attachments_url=url), tmp_path)
    results = await run(job, slides_timeout_seconds=30 if answer else 1)
    body = parts_of(text_of(job, results))[1]
    assert len(job.warnings) == 1
    assert sentence in job.warnings[0]
    assert "## Warnings" in body
    assert f"[Slides and attachments]({url})" in body
    assert "## Slides" not in body


async def test_a_presentation_that_is_no_pdf_is_linked_without_being_downloaded(
    site: Site, page: str, tmp_path: Path
) -> None:
    job = RecordingJob(make_parameters(url=page, attachments_url=site.url("/talk%20one.PPT?x=1")), tmp_path)
    await run(job, libreoffice_command=None)
    assert job.warnings == [
        "The attachment is only linked. It is a PowerPoint file, not a PDF. "
        "LibreOffice, which could convert it, is not installed."
    ]
    assert len(site.requested_paths) == 1


async def test_too_many_slides_are_cut_with_a_warning(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(5), headers=PDF))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path)
    results = await run(job, max_pdf_pages=3)
    assert results.metadata["slides"] == 3
    assert job.warnings == ["Only the first 3 of 5 slides are shown."]


async def test_slides_are_jpegs_with_the_longest_side_asked_for(site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(1), headers=PDF))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path)
    await run(job)
    images = {path.rpartition("/")[2]: data for path, data in job.files.items() if path.endswith(".jpg")}
    sizes = {}
    for name, data in images.items():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"
            sizes[name] = max(image.size)
    assert sizes == {"slide-001.jpg": 1280, "slide-001-thumb.jpg": 320}


async def test_the_sound_is_kept_as_16_khz_mono_when_asked_for(site: Site, page: str, tmp_path: Path) -> None:
    talk = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, video_url=talk), tmp_path)
    results = await run(job, keep_audio=True)
    kept = next(asset for asset in results.assets if asset.path.endswith("/assets/audio.wav"))
    with wave.open(io.BytesIO(job.files[kept.path])) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert sound.getnframes() == pytest.approx(32_000, abs=800)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (SiteResponse(make_video(1, sound=False), headers=WEBM), "The recording has no audio."),
        (SiteResponse(b"not a film at all" * 50, headers=WEBM), "damaged or not a supported media file"),
        (html("<p>Watch it here</p>"), "is a web page, not a media file"),
        (
            SiteResponse(b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", headers=WEBM),
            "not a supported media file",
        ),
        (SiteResponse(status=404), "answered 404 (Not Found)"),
        (None, "was not fetched within 0.9 seconds"),
    ],
)
async def test_a_recording_that_cannot_be_heard_is_a_warning_and_a_reason(
    answer: SiteResponse | None, sentence: str, site: Site, page: str, tmp_path: Path
) -> None:
    url = site.put("/talk.webm", answer) if answer else site.put_hanging("/talk.webm")
    job = RecordingJob(make_parameters(url=page, video_url=url), tmp_path)
    results = await run(job, keep_audio=True, transcript_timeout_seconds=30 if answer else 1)
    assert len(job.warnings) == 1
    assert sentence in job.warnings[0]
    transcript = parts_of(text_of(job, results))[1].partition("## Transcript")[2]
    assert "There is no transcript." in transcript
    assert not results.metadata["transcribed"]


async def test_a_recording_that_breaks_off_is_used_as_far_as_it_goes(site: Site, page: str, tmp_path: Path) -> None:
    whole = make_video(6)
    talk = site.put("/talk.webm", SiteResponse(whole[: len(whole) // 2], headers=WEBM))
    job = RecordingJob(make_parameters(url=page, video_url=talk), tmp_path)
    results = await run(job, keep_audio=True)
    assert 2 < results.metadata["audio_seconds"] < 4
    assert any(re.search(r"incomplete: it ends after 0:0\d of 0:0\d", warning) for warning in job.warnings)


async def test_without_transcription_the_recording_is_not_downloaded(site: Site, page: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page, video_url=site.url("/talk.webm")), tmp_path)
    await run(job)
    assert site.requested_paths == ["/2025/talks/ledgers/"]
    assert job.warnings == [
        "There is no transcript. Transcription is not configured. The recording was not downloaded."
    ]


async def test_a_session_without_recording_says_so_without_a_warning(site: Site, page: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page), tmp_path)
    results = await run(job)
    assert job.warnings == []
    assert "There is no transcript. No recording was given." in text_of(job, results)
    assert "Warnings" not in text_of(job, results)


async def test_the_transcription_backend_hears_without_failing(site: Site, page: str, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    talk = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, video_url=talk), tmp_path)
    results = await run(job, transcription={"backend": "pocketsphinx"})
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert job.ran == ["page", "transcript", "slides", "enrich", "markdown"]


async def test_what_is_said_stands_in_the_markdown_with_its_time(
    site: Site, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = iter(["hello *everyone*", "welcome", "and now"])

    class Decoder:
        def __init__(self, **options: Any) -> None:
            self.hyp = lambda: SimpleNamespace(hypstr=next(heard))
            self.start_utt = self.end_utt = lambda: None
            self.process_raw = lambda pcm, full_utt: None

    class Segmenter:
        def __init__(self, sample_rate: int) -> None:
            assert sample_rate == 16_000

        def segment(self, stream: Any) -> Iterator[SimpleNamespace]:
            assert len(stream.read(64_000)) == 64_000
            yield from (SimpleNamespace(start_time=start, pcm=b"") for start in (0.5, 30.0, 75.0))

    monkeypatch.setitem(sys.modules, "pocketsphinx", SimpleNamespace(Decoder=Decoder, Segmenter=Segmenter))
    talk = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, video_url=talk), tmp_path)
    results = await run(job, transcription={"backend": "pocketsphinx"})
    assert "## Transcript\n\n**0:00** hello \\*everyone\\* welcome\n\n**1:15** and now\n\n## Links" in text_of(
        job, results
    )
    assert results.metadata["transcribed"]
    assert job.warnings == []


async def test_a_missing_transcription_backend_is_a_warning_that_says_what_to_install(
    site: Site, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    talk = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    job = RecordingJob(make_parameters(url=page, video_url=talk), tmp_path)
    await run(job, transcription={"backend": "pocketsphinx"})
    assert "pip install pocketsphinx" in job.warnings[0]


async def test_text_in_another_language_than_asked_for_is_one_warning(site: Site, page: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page, target_language="de"), tmp_path)
    results = await run(job)
    assert len(job.warnings) == 1
    assert 'was not translated from "en" to "de"' in job.warnings[0]
    assert "State that is overwritten is" in text_of(job, results)


@pytest.mark.parametrize("percent", [0, 20, 60, 70, 90])
async def test_a_cancelled_job_stops_at_the_next_point(percent: float, site: Site, page: str, tmp_path: Path) -> None:
    slides = site.put("/slides.pdf", SiteResponse(make_pdf(3), headers=PDF))
    job = RecordingJob(make_parameters(url=page, attachments_url=slides), tmp_path, cancel_at=percent)
    with pytest.raises(ProcessorError) as stopped:
        await run(job)
    assert stopped.value.code == "CANCELLED"
    assert "markdown" not in job.ran


async def test_the_operator_can_bring_a_template(site: Site, page: str, tmp_path: Path) -> None:
    own = tmp_path / "own.md.j2"
    own.write_text("{{ session.session | escape_text }} by {{ session.speakers | length }}")
    job = RecordingJob(make_parameters(url=page), tmp_path)
    assert text_of(job, await run(job, template=own)) == "Ledgers that never forget by 2"


@pytest.mark.parametrize("broken", ["{% if %}", "{{ nothing.here }}"])
async def test_a_broken_template_is_named(broken: str, site: Site, page: str, tmp_path: Path) -> None:
    own = tmp_path / "own.md.j2"
    own.write_text(broken)
    with pytest.raises(ProcessorError) as failed:
        await run(RecordingJob(make_parameters(url=page), tmp_path), template=own)
    assert (failed.value.code, failed.value.transient) == ("TEMPLATE_ERROR", False)
