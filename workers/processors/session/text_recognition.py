"""Recognize the text of slides without a text layer with Tesseract if it is installed. It runs in the sandbox."""

from __future__ import annotations

import asyncio
import csv
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from jobledger.workers.processors.session import slide_text
from jobledger.workers.processors.session.document import get_primary_subtag
from jobledger.workers.processors.session.pdf_rendering import Slide
from jobledger.workers.processors.session.step_context import StepContext
from jobledger.workers.sandbox import runner

_PROGRAM: Final = "tesseract"
_LANGUAGES: Final = {
    **{
        "ar": "ara",
        "bg": "bul",
        "ca": "cat",
        "cs": "ces",
        "da": "dan",
        "de": "deu",
        "el": "ell",
        "en": "eng",
        "eo": "epo",
    },
    **{"es": "spa", "et": "est", "fa": "fas", "fi": "fin", "fr": "fra", "he": "heb", "hi": "hin", "hr": "hrv"},
    **{"hu": "hun", "id": "ind", "it": "ita", "ja": "jpn", "ko": "kor", "lt": "lit", "lv": "lav", "nb": "nor"},
    **{"nl": "nld", "no": "nor", "pl": "pol", "pt": "por", "ro": "ron", "ru": "rus", "sk": "slk", "sl": "slv"},
    **{"sr": "srp", "sv": "swe", "th": "tha", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "chi_sim"},
}
"""Names of Tesseract's language data by language code. Others have the code itself, such as `eus`."""
_LIMITS: Final = runner.ResourceLimits(cpu_seconds=300, memory_bytes=2 * 1024**3, file_bytes=0, processes=16)
_MAX_OUTPUT_BYTES: Final = 1024 * 1024
_MIN_CONFIDENCE: Final = 60.0
"""Words with a lower confidence, in percent, are mostly shapes in pictures."""


def is_installed() -> bool:
    """Return whether Tesseract is installed."""
    return shutil.which(_PROGRAM) is not None


async def recognize_slides(ctx: StepContext, slides: list[Slide], images: Mapping[int, Path], deadline: float) -> None:
    """Set the texts of the slides that have an image. Problems are warnings.

    Args:
        ctx: The context of the step.
        slides: All slides of the presentation.
        images: JPEG files by number of the slide.
        deadline: Time of the event loop when the recognition ends.
    """
    if not images:
        return
    numbers = slide_text.format_slides(sorted(images))
    data = _LANGUAGES.get(subtag := get_primary_subtag(ctx.parameters.source_language), subtag)
    try:
        if data not in await _list_languages(ctx.job.scratch_dir):
            package = f"tesseract-ocr-{data.replace('_', '-')}"
            await ctx.warn(
                f"The text of {numbers} was not recognized. Tesseract has no data for the language "
                f'"{ctx.parameters.source_language}". Install the data with: apt install {package}.',
                repeat_on_restart=True,
            )
            return
        await _recognize_slides(ctx, slides, images, data, deadline)
    except runner.SandboxUnavailable as error:
        await ctx.warn(f"The text of {numbers} was not recognized. {error}", repeat_on_restart=True)


async def _recognize_slides(
    ctx: StepContext, slides: list[Slide], images: Mapping[int, Path], data: str, deadline: float
) -> None:
    remaining_characters = slide_text.MAX_TOTAL_CHARACTERS - sum(len(slide.text) for slide in slides)
    missed: list[int] = []
    loop = asyncio.get_running_loop()
    for index, slide in enumerate(slides):
        if slide.number not in images:
            continue
        await ctx.job.report_progress(80, f"Recognizing the text of slide {slide.number}")
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + ctx.settings.slide_timeout_seconds)):
                text = await _recognize(images[slide.number], data, ctx.job.scratch_dir)
        except TimeoutError:
            missed.append(slide.number)
            continue
        text = text[:remaining_characters]
        remaining_characters -= len(text)
        slides[index] = slide.model_copy(update={"text": text, "is_recognized": bool(text)})
    if missed:
        message = f"There was not enough time to recognize the text of {slide_text.format_slides(missed)}."
        await ctx.warn(message, repeat_on_restart=True)


async def _list_languages(scratch: Path) -> set[str]:
    output = await _run(["--list-langs"], scratch)
    return set(output.decode(errors="replace").split("\n")[1:])  # the first line is a heading


async def _recognize(image: Path, data: str, scratch: Path) -> str:
    """Return the recognized lines of an image."""
    table = (await _run([str(image), "stdout", "-l", data, "tsv"], scratch, image)).decode(errors="replace")
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in csv.DictReader(table.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE):
        with suppress(KeyError, TypeError, ValueError):  # the output was cut
            if float(row["conf"]) >= _MIN_CONFIDENCE:
                lines[row["block_num"], row["par_num"], row["line_num"]].append(row["text"])
    cleaned = (slide_text.clean_line(" ".join(words)) for words in lines.values())
    return "\n".join(line for line in cleaned if line)[: slide_text.MAX_SLIDE_CHARACTERS]


async def _run(arguments: list[str], scratch: Path, *readable_paths: Path) -> bytes:
    program = runner.Program(
        [shutil.which(_PROGRAM) or _PROGRAM, *arguments],
        scratch,
        readable_paths,
        {"OMP_THREAD_LIMIT": "1"},  # more threads make it slower on a busy machine
        _LIMITS,
    )
    return (await runner.run_program(program, max_output=_MAX_OUTPUT_BYTES)).output
