"""The session processor as a whole, from a local website to Markdown and files."""

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
from markdown_it import MarkdownIt
from PIL import Image

from jobledger.workers.processor import Processor, ProcessorError, Results
from jobledger.workers.processors.session import SessionProcessor, SessionSettings
from tests.processors.session.fixtures import (
    RecordingJob,
    Site,
    SiteResponse,
    html,
    make_parameters,
    make_pdf,
    make_settings,
    make_video,
    read_document,
    split_front_matter,
)
from tests.support.event_loop_clock import advance_clock
from tests.support.polling import poll_until

PDF = {"Content-Type": "application/pdf"}
WEBM = {"Content-Type": "video/webm"}


async def run(job: RecordingJob, **changes: Any) -> Results:
    return await SessionProcessor(make_settings(**changes)).run(job)


async def run_until_fetch_timeout(job: RecordingJob, site: Site, path: str, **changes: Any) -> Results:
    """Run a job with a step timeout of 1000 seconds, of which a fetch may use 900. Let `path` time out."""
    running = asyncio.create_task(run(job, read_timeout_seconds=10_000, **changes))
    await poll_until(lambda: path in site.requested_paths)
    advance_clock(950)
    return await running


def find_images(body: str) -> list[tuple[str, str]]:
    tokens = [token for block in MarkdownIt("commonmark").parse(body) for token in block.children or []]
    return [(str(token.attrs["src"]), token.content) for token in tokens if token.type == "image"]


def test_session_processor_has_type_and_isolation() -> None:
    processor: Processor = SessionProcessor(SessionSettings())
    assert (processor.job_type, processor.isolation) == ("session", "process")


def test_import_does_not_load_libraries_of_running_jobs() -> None:
    heavy = {"trafilatura", "av", "pypdfium2", "PIL", "httpx", "jinja2"}
    code = f"import sys, jobledger.workers.processors.session; print(sorted({heavy} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_preload_loads_the_model_that_detects_languages() -> None:
    code = (
        "from importlib import import_module; from jobledger.workers.processors import session\n"
        "for module in session.SessionProcessor.preload: import_module(module)\n"
        "from jobledger.workers.processors.session.language import load_identifier\n"
        "print(load_identifier.cache_info().currsize)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "1"


async def test_session_with_all_material_gives_markdown_with_images(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(3), headers=PDF))
    video_url = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(
        make_parameters(url=page_url, attachments_url=slides_url, video_url=video_url, extra={"id": 7}), tmp_path
    )

    results = await run(job, keep_audio=True)
    assert {name for name, max_age in job.share_max_ages.items() if max_age} == {"page", "transcript", "slides"}
    assert {name for name, max_age in job.share_max_ages.items() if not max_age} == {"enrich", "markdown"}

    front_matter, body = split_front_matter(read_document(job, results))
    assert front_matter["title"] == "Ledgers that never forget"
    assert front_matter["speaker"] == ["Ada Example", 'Grace "GH" Sample']
    assert front_matter["job_id"] == "job-1"
    assert front_matter["intro"] == "Why an append-only log is the calmest way to keep state."
    assert "How **optimistic** appends work" in body
    assert body.count("\n# ") == 1
    assert [alt for _, alt in find_images(body)] == [f"Slide {n}: Slide of a talk {n}" for n in (1, 2, 3)]
    assert results.metadata["extra"] == {"id": 7}
    assert results.metadata["slides"] == 3
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert len(results.assets) == 7


async def test_images_in_markdown_are_saved_files_in_its_folder(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url, session="A [b](c) # d"), tmp_path)
    results = await run(job)
    assert results.markdown is not None
    folder = results.markdown.path.rpartition("/")[0]
    linked_paths = {
        f"{folder}/{target}" for target, _ in find_images(split_front_matter(read_document(job, results))[1])
    }
    assert len(linked_paths) == 2
    assert linked_paths <= set(job.files)
    assert {asset.path for asset in results.assets} == set(job.files) - {results.markdown.path}


async def test_progress_rises_to_100_with_readable_messages(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(4), headers=PDF))
    video_url = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url, video_url=video_url), tmp_path)
    await run(job, keep_audio=True)
    percents = [percent for percent, _ in job.progress]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {0, 20, 60, 90, 100} <= set(percents)
    assert "Rendering slide 2 of 4" in [message for _, message in job.progress]


async def test_log_names_fetched_and_rendered_files(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    await run(job)
    assert any(
        re.search(r"Fetched .*slides\.pdf \(application/pdf\): .* in \d+\.\d s", message)
        for message in job.log_messages
    )
    assert "Rendered 2 of 2 pages" in job.log_messages


async def test_next_attempt_reuses_steps_and_their_warnings(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pptx", SiteResponse(b"PK"))
    first = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    first_results = await run(first)
    first_requests = list(site.requested_paths)
    second = RecordingJob(first.parameters, tmp_path / "second", attempt=2, steps=first.steps)
    second_results = await run(second)
    assert second.executed_steps == []
    assert site.requested_paths == first_requests
    assert second_results == first_results
    assert second.warnings == first.warnings != []


async def test_same_session_in_other_language_reuses_steps_with_own_files(
    site: Site, page_url: str, tmp_path: Path
) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(2), headers=PDF))
    video_url = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    urls = {"url": page_url, "attachments_url": slides_url, "video_url": video_url}
    first = RecordingJob(make_parameters(**urls), tmp_path)
    first_results = await run(first, keep_audio=True)
    first_requests = list(site.requested_paths)
    cached_steps = {key: output for key, output in first.steps.items() if key[0] != "markdown"}
    second = RecordingJob(make_parameters(**urls, target_language="fr"), tmp_path, job_id="job-2", steps=cached_steps)
    second_results = await run(second, keep_audio=True)
    assert site.requested_paths == first_requests
    assert second.executed_steps == ["enrich", "markdown"]
    assert first_results.markdown is not None
    assert second_results.markdown is not None
    folder = second_results.markdown.path.rpartition("/")[0]
    assert not first_results.markdown.path.startswith(folder)
    assert len(second_results.assets) == 5
    assert all(asset.path.startswith(f"{folder}/assets/") for asset in second_results.assets)
    assert [asset.sha256 for asset in second_results.assets] == [asset.sha256 for asset in first_results.assets]


async def test_step_with_changed_settings_runs_again(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(1), headers=PDF))
    first = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    await run(first)
    second = RecordingJob(first.parameters, tmp_path, attempt=2, steps=first.steps)
    await run(second, thumbnail_max_side_px=160)
    assert second.executed_steps == ["slides", "markdown"]


async def test_missing_page_fails_job(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.url("/nowhere")), tmp_path)
    with pytest.raises(ProcessorError) as caught:
        await run(job)
    assert (caught.value.code, caught.value.transient) == ("HTTP_ERROR", False)
    assert job.files == {}


async def test_page_that_is_not_html_fails_job_before_download(site: Site, tmp_path: Path) -> None:
    url = site.put(
        "/page", SiteResponse(b"\x00" * 10, headers={"Content-Type": "application/zip"}, content_length=10**9)
    )
    with pytest.raises(ProcessorError) as caught:
        await run(RecordingJob(make_parameters(url=url), tmp_path))
    assert (caught.value.code, caught.value.transient) == ("NOT_HTML", False)


async def test_page_fetch_timeout_is_transient(site: Site, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=site.put_hanging("/slow")), tmp_path)
    with pytest.raises(ProcessorError) as caught:
        await run_until_fetch_timeout(job, site, "/slow", page_timeout_seconds=1000)
    assert (caught.value.code, caught.value.transient) == ("FETCH_TIMEOUT", True)


class StuckJob(RecordingJob):
    """A job whose step stops at `stuck_at_percent`, until it times out."""

    stuck_at_percent = 10.0

    async def report_progress(self, percent: float, message: str) -> None:
        await super().report_progress(percent, message)
        if percent == self.stuck_at_percent:
            advance_clock(1000)
            await asyncio.Event().wait()


async def test_page_step_timeout_is_transient(site: Site, page_url: str, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError) as caught:
        await run(StuckJob(make_parameters(url=page_url), tmp_path))
    assert (caught.value.code, caught.value.transient) == ("STEP_TIMEOUT", True)


async def test_slides_rendered_before_step_timeout_are_shown(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(4), headers=PDF))
    job = StuckJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    job.stuck_at_percent = 73  # after two of four slides
    results = await run(job)
    assert job.warnings == ["The slides were not processed within 300 seconds. Only the first 2 are shown."]
    assert results.metadata["slides"] == 2


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (SiteResponse(b"%PDF-1.7 but then nothing", headers=PDF), "The PDF is damaged"),
        (SiteResponse(make_pdf(2, password="secret"), headers=PDF), "The PDF is protected by a password"),
        (SiteResponse(b"<p>Log in first</p>", headers={"Content-Type": "text/html"}), "It is not a PDF (text/html)"),
        (None, "was not fetched within 900 seconds"),
        (SiteResponse(status=503), "responded with 503 (Service Unavailable)"),
        (SiteResponse(b"%PDF-", content_length=10**12), "is larger than "),
    ],
)
async def test_unusable_slides_are_linked_with_warning(
    response: SiteResponse | None, message: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    url = site.put("/slides", response) if response else site.put_hanging("/slides")
    job = RecordingJob(make_parameters(url=page_url, attachments_url=url), tmp_path)
    if response:
        results = await run(job)
    else:
        results = await run_until_fetch_timeout(job, site, "/slides", slides_timeout_seconds=1000)
    body = split_front_matter(read_document(job, results))[1]
    assert len(job.warnings) == 1
    assert message in job.warnings[0]
    assert "## Warnings" in body
    assert f"[Slides and attachments]({url})" in body
    assert "## Slides" not in body


async def test_presentation_is_linked_without_download_if_not_convertible(
    site: Site, page_url: str, tmp_path: Path
) -> None:
    job = RecordingJob(make_parameters(url=page_url, attachments_url=site.url("/talk%20one.PPT?x=1")), tmp_path)
    await run(job, libreoffice_command=None)
    assert job.warnings == [
        "The attachment is only linked. It is a PowerPoint file, not a PDF. "
        "LibreOffice, which could convert it, is not installed."
    ]
    assert len(site.requested_paths) == 1


async def test_too_many_slides_are_cut_with_warning(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(5), headers=PDF))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    results = await run(job, max_pdf_pages=3)
    assert results.metadata["slides"] == 3
    assert job.warnings == ["Only the first 3 of 5 slides are shown."]


async def test_slides_are_jpegs_of_configured_size(site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(1), headers=PDF))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path)
    await run(job)
    images = {path.rpartition("/")[2]: data for path, data in job.files.items() if path.endswith(".jpg")}
    sizes = {}
    for name, data in images.items():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"
            sizes[name] = max(image.size)
    assert sizes == {"slide-001.jpg": 1280, "slide-001-thumb.jpg": 320}


async def test_keep_audio_saves_16_khz_mono_wav(site: Site, page_url: str, tmp_path: Path) -> None:
    video_url = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    results = await run(job, keep_audio=True)
    audio_file = next(asset for asset in results.assets if asset.path.endswith("/assets/audio.wav"))
    with wave.open(io.BytesIO(job.files[audio_file.path])) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (16_000, 1, 2)
        assert sound.getnframes() == pytest.approx(32_000, abs=800)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (SiteResponse(make_video(1, sound=False), headers=WEBM), "The recording has no audio."),
        (SiteResponse(b"not a film at all" * 50, headers=WEBM), "damaged or not a supported media file"),
        (html("<p>Watch it here</p>"), "is a web page, not a media file"),
        (
            SiteResponse(b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", headers=WEBM),
            "file:/etc/passwd is not an http or https URL",
        ),
        (SiteResponse(status=404), "responded with 404 (Not Found)"),
        (None, "was not fetched within 900 seconds"),
    ],
)
async def test_unusable_recording_is_a_warning_with_reason(
    response: SiteResponse | None, message: str, site: Site, page_url: str, tmp_path: Path
) -> None:
    url = site.put("/talk.webm", response) if response else site.put_hanging("/talk.webm")
    job = RecordingJob(make_parameters(url=page_url, video_url=url), tmp_path)
    if response:
        results = await run(job, keep_audio=True)
    else:
        results = await run_until_fetch_timeout(
            job, site, "/talk.webm", keep_audio=True, transcript_timeout_seconds=1000
        )
    assert len(job.warnings) == 1
    assert message in job.warnings[0]
    transcript = split_front_matter(read_document(job, results))[1].partition("## Transcript")[2]
    assert "There is no transcript." in transcript
    assert not results.metadata["transcribed"]


async def test_truncated_recording_is_used_with_warning(site: Site, page_url: str, tmp_path: Path) -> None:
    video = make_video(6)
    video_url = site.put("/talk.webm", SiteResponse(video[: len(video) // 2], headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    results = await run(job, keep_audio=True)
    assert 2 < results.metadata["audio_seconds"] < 4
    assert any(re.search(r"incomplete: it ends after 0:0\d of 0:0\d", warning) for warning in job.warnings)


async def test_recording_is_not_downloaded_without_transcription(site: Site, page_url: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page_url, video_url=site.url("/talk.webm")), tmp_path)
    await run(job)
    assert site.requested_paths == ["/2025/talks/ledgers/"]
    assert job.warnings == [
        "There is no transcript. Transcription is not configured. The recording was not downloaded."
    ]


async def test_session_without_recording_has_no_warning(site: Site, page_url: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page_url), tmp_path)
    results = await run(job)
    assert job.warnings == []
    assert "There is no transcript. No recording was given." in read_document(job, results)
    assert "Warnings" not in read_document(job, results)


async def test_pocketsphinx_backend_runs_on_tone(site: Site, page_url: str, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx", reason="install pocketsphinx: pip install pocketsphinx")
    video_url = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    results = await run(job, transcription={"backend": "pocketsphinx"})
    assert results.metadata["audio_seconds"] == pytest.approx(2, abs=0.1)
    assert job.executed_steps == ["page", "transcript", "slides", "enrich", "markdown"]


async def test_recognized_speech_is_in_markdown_with_timecodes(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hypotheses = iter(["hello *everyone*", "welcome", "and now"])

    class Decoder:
        def __init__(self, **options: Any) -> None:
            self.hyp = lambda: SimpleNamespace(hypstr=next(hypotheses))
            self.start_utt = self.end_utt = lambda: None
            self.process_raw = lambda pcm, full_utt: None

    class Segmenter:
        def __init__(self, sample_rate: int) -> None:
            assert sample_rate == 16_000

        def segment(self, stream: Any) -> Iterator[SimpleNamespace]:
            assert len(stream.read(64_000)) == 64_000
            yield from (SimpleNamespace(start_time=start, pcm=b"") for start in (0.5, 30.0, 75.0))

    monkeypatch.setitem(sys.modules, "pocketsphinx", SimpleNamespace(Decoder=Decoder, Segmenter=Segmenter))
    video_url = site.put("/talk.webm", SiteResponse(make_video(2), headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    results = await run(job, transcription={"backend": "pocketsphinx"})
    assert "## Transcript\n\n**0:00** hello \\*everyone\\* welcome\n\n**1:15** and now\n\n## Links" in read_document(
        job, results
    )
    assert results.metadata["transcribed"]
    assert job.warnings == []


async def test_missing_pocketsphinx_is_a_warning_with_install_command(
    site: Site, page_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    video_url = site.put("/talk.webm", SiteResponse(make_video(1), headers=WEBM))
    job = RecordingJob(make_parameters(url=page_url, video_url=video_url), tmp_path)
    await run(job, transcription={"backend": "pocketsphinx"})
    assert "pip install pocketsphinx" in job.warnings[0]


async def test_untranslated_text_is_one_warning(site: Site, page_url: str, tmp_path: Path) -> None:
    job = RecordingJob(make_parameters(url=page_url, target_language="de"), tmp_path)
    results = await run(job)
    assert len(job.warnings) == 1
    assert 'was not translated from "en" to "de"' in job.warnings[0]
    assert "State that is overwritten is" in read_document(job, results)


@pytest.mark.parametrize("percent", [0, 20, 60, 66, 80])
async def test_cancelled_job_stops_at_next_check(percent: float, site: Site, page_url: str, tmp_path: Path) -> None:
    slides_url = site.put("/slides.pdf", SiteResponse(make_pdf(3), headers=PDF))
    job = RecordingJob(make_parameters(url=page_url, attachments_url=slides_url), tmp_path, cancel_at_percent=percent)
    with pytest.raises(ProcessorError) as caught:
        await run(job)
    assert caught.value.code == "CANCELLED"
    assert "markdown" not in job.executed_steps


async def test_template_of_settings_is_used(site: Site, page_url: str, tmp_path: Path) -> None:
    template = tmp_path / "own.md.j2"
    template.write_text("{{ session.session | escape_text }} by {{ session.speakers | length }}")
    job = RecordingJob(make_parameters(url=page_url), tmp_path)
    assert read_document(job, await run(job, template=template)) == "Ledgers that never forget by 2"


@pytest.mark.parametrize("source", ["{% if %}", "{{ nothing.here }}"])
async def test_invalid_template_is_permanent_error(source: str, site: Site, page_url: str, tmp_path: Path) -> None:
    template = tmp_path / "own.md.j2"
    template.write_text(source)
    with pytest.raises(ProcessorError) as caught:
        await run(RecordingJob(make_parameters(url=page_url), tmp_path), template=template)
    assert (caught.value.code, caught.value.transient) == ("TEMPLATE_ERROR", False)


async def test_page_that_is_cut_is_fetched_again_and_used_with_a_warning(site: Site, tmp_path: Path) -> None:
    text = "<main><h1>A talk</h1><p>This is the first half of the abstract.</p>"
    cut = SiteResponse(text.encode(), headers={"Content-Type": "text/html"}, content_length=5000)
    job = RecordingJob(make_parameters(url=site.put("/cut", cut)), tmp_path)
    results = await run(job)
    assert "This is the first half of the abstract." in read_document(job, results)
    assert [warning for warning in job.warnings if "was not received completely" in warning] == job.warnings[:1]
    assert not any(name == "page" for name, _ in job.get_steps_after_restart())
    assert site.requested_paths == ["/cut", "/cut"]


async def test_page_that_is_cut_before_its_text_is_transient_error(site: Site, tmp_path: Path) -> None:
    cut = SiteResponse(b"<html><head>", headers={"Content-Type": "text/html"}, content_length=5000)
    with pytest.raises(ProcessorError) as caught:
        await run(RecordingJob(make_parameters(url=site.put("/cut", cut)), tmp_path))
    assert (caught.value.code, caught.value.transient) == ("NETWORK_ERROR", True)


async def test_page_with_lost_characters_has_a_warning(site: Site, tmp_path: Path) -> None:
    body = "<main><h1>Größe</h1><p>Übung, Übung.</p></main>".encode() + b"<p>\xff</p>"
    page = SiteResponse(body, headers={"Content-Type": "text/html; charset=utf-8"})
    job = RecordingJob(make_parameters(url=site.put("/broken", page)), tmp_path)
    await run(job)
    assert "One character of the page could not be read in the encoding utf-8" in job.warnings[0]
